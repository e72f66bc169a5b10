"""Kernel launches: a kernel is compiled and bound once per layout, then launched without Triton's argument checks.

Triton's `kernel[grid](...)` inspects every argument on each call (9 to 12 µs); a bound kernel only passes them on.
"""

from collections.abc import Mapping
from typing import Any

import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

ALIGNMENT = 16  # bytes; compiled kernels assume that pointers are aligned to this

_bound_kernels: dict[tuple[object, ...], Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int] | tuple[int],
    arguments: tuple[Tensor | int | float | None, ...],
    constants: Mapping[str, object],
    num_warps: int = 4,
    num_stages: int = 1,
) -> None:
    """Launch `kernel` on the current stream of the current device, which holds the tensors.

    Args:
        arguments: The first parameters: tensors, None for absent ones, and numbers that change from batch to batch. The
            kernel must name those numbers in `do_not_specialize`; otherwise a request would trigger compilation.
        constants: The remaining parameters in order, all constexpr.

    Raises:
        ValueError: A tensor is not aligned to 16 bytes, or `constants` do not match the kernel's parameters.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if not isinstance(kernel, JITFunction):  # Triton's interpreter (TRITON_INTERPRET=1)
        _check_order(kernel, len(arguments), constants)
        kernel[grid](*arguments, **constants, **options)
        return
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if any(tensor.data_ptr() % ALIGNMENT for tensor in tensors):
        raise ValueError(f"{kernel.__name__}: every tensor must start at a multiple of {ALIGNMENT} bytes")
    layout = tuple(getattr(argument, "dtype", argument is None) for argument in arguments)
    key = (kernel.__name__, tensors[0].device.index, num_warps, num_stages, layout, *constants.values())
    bound = _bound_kernels.get(key)
    if bound is None:
        _check_order(kernel, len(arguments), constants)
        # Triton 3.10 and later do not fuse multiply-add by default.
        _bound_kernels[key] = kernel[grid](*arguments, **constants, **options, enable_fp_fusion=True)
        return
    bound[(*grid, 1, 1)[:3]](*arguments, *constants.values())


def _check_order(kernel: Any, argument_count: int, constants: Mapping[str, object]) -> None:
    """Check the order of the constants, because a bound kernel takes its parameters by position."""
    names = list(kernel.arg_names[argument_count:])
    if names != list(constants):
        raise ValueError(f"{kernel.__name__} takes the constants {names}, got {list(constants)}")


def interpreted() -> bool:
    """Return whether this process was started with TRITON_INTERPRET=1: kernels then run in Python, on CPU memory."""
    return bool(triton.knobs.runtime.interpret)


def bound_count() -> int:
    """Count the kernels compiled and bound so far. The count stays constant once a server is warm."""
    return len(_bound_kernels)
