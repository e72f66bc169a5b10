"""What a CPU computes in: bf16 where it has instructions for it and the vectors stay right, else fp32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Of vectors in bf16 to those of the same weights in fp32.
LEAST_COSINE = 0.999


def fast_dtype() -> torch.dtype:
    """bf16 on x86 CPUs that multiply it (avx512_bf16, amx); others emulate it, slower than fp32."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def in_fp32(network: nn.Module) -> Iterator[None]:
    """The layers of a network whose weights are not packed yet compute in fp32 here, each weight widened for its own
    product alone: a whole network in fp32 may not fit."""

    def widen(_: nn.Module, given: tuple[object, ...]) -> tuple[object, ...]:
        return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given)

    stacks = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    hooks = [stack[0].register_forward_pre_hook(widen) for stack in stacks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
