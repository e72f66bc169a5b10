"""How a kernel is started: compiled once for each layout, bound, and from then on launched without asking again.

A `kernel[grid](...)` of Triton looks at every argument each time (9 to 12 µs); a bound one only passes them on.
"""

from collections.abc import Mapping
from typing import Any

import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

ALIGNMENT = 16  # bytes: what Triton assumes of a pointer it specialised a kernel for

_bound: dict[tuple[object, ...], Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int] | tuple[int],
    arguments: tuple[Tensor | int | float | None, ...],
    constants: Mapping[str, object],
    num_warps: int = 4,
    num_stages: int = 1,
) -> None:
    """Start `kernel` on the current stream of the current device, which holds the tensors.

    `arguments` are its first parameters: tensors, None where one is absent, and numbers that change from batch to
    batch (which the kernel must name in `do_not_specialize`, or a request would compile). `constants` are the rest of
    its parameters, in order, all constexpr. ValueError: a tensor that is not aligned to 16 bytes.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if not isinstance(kernel, JITFunction):  # the interpreter of TRITON_INTERPRET=1
        _check_order(kernel, len(arguments), constants)
        kernel[grid](*arguments, **constants, **options)
        return
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if any(tensor.data_ptr() % ALIGNMENT for tensor in tensors):
        raise ValueError(f"{kernel.__name__}: a tensor does not start at a multiple of {ALIGNMENT} bytes")
    layout = tuple(getattr(argument, "dtype", argument is None) for argument in arguments)
    key = (kernel.__name__, tensors[0].device.index, num_warps, num_stages, layout, *constants.values())
    bound = _bound.get(key)
    if bound is None:
        _check_order(kernel, len(arguments), constants)
        # Fused multiply-add is no longer Triton's default from 3.10 on.
        _bound[key] = kernel[grid](*arguments, **constants, **options, enable_fp_fusion=True)
        return
    bound[(*grid, 1, 1)[:3]](*arguments, *constants.values())


def _check_order(kernel: Any, arguments: int, constants: Mapping[str, object]) -> None:
    """A bound kernel takes its parameters by their places alone."""
    names = list(kernel.arg_names[arguments:])
    if names != list(constants):
        raise ValueError(f"{kernel.__name__} takes the constants {names}, got {list(constants)}")


def interpreted() -> bool:
    """Whether this process was started with TRITON_INTERPRET=1: kernels then run in Python, on a CPU's memory."""
    return bool(triton.knobs.runtime.interpret)


def bound() -> int:
    """How many kernels have been compiled and bound: it stands still once a server is warm."""
    return len(_bound)
