"""The dtype on a CPU: bf16 if the CPU has instructions for it and the vectors stay accurate, else fp32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# A model falls back to fp32 if the cosine of any vector in bf16 and in fp32 is lower.
MIN_ACCURATE_COSINE = 0.999


def fast_dtype() -> torch.dtype:
    """Return bf16 on x86 CPUs that have instructions for it (avx512_bf16, AMX), else fp32, which is faster there."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def in_fp32(network: nn.Module) -> Iterator[None]:
    """Run the layers of a network in fp32 while the context lasts. Its weights must not be packed yet.

    Each weight is widened only for its own product, because a whole network in fp32 may not fit into memory.
    """

    def widen(_: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
        return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)

    stacks = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    hooks = [stack[0].register_forward_pre_hook(widen) for stack in stacks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
