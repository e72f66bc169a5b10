"""Test support for interpreted kernels: a strict version of Triton's interpreter, guarded memory, and tolerances.

The stock interpreter multiplies bfloat16 as integers, truncates instead of rounding it, and lets a kernel read and
write any memory. It also returns zeros where a masked load without `other` is undefined on a GPU. Here such a kernel
fails. Run these tests in a separate process with TRITON_INTERPRET=1.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import interpreter

assert triton.knobs.runtime.interpret, "Set TRITON_INTERPRET=1: these tests run kernels in the interpreter"

BOUNDS = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}
DTYPES = list(BOUNDS)
BAND = 1 << 16  # elements before and after every guarded tensor
ALIGNMENT = 64  # bytes, as torch aligns
POISON, CANARY = 0xFF, 0xCB  # byte values: NaN in any floating dtype and -1 in any integer; an unlikely value


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(actual: Tensor, expected: Tensor, torch_same_dtype: Tensor | None = None) -> None:
    """Check the relative Frobenius error against float64 on the same rounded inputs; a row may have 4 times the bound.

    Args:
        torch_same_dtype: The result of torch in that dtype. The error may be 1.5 times that of torch, or one rounding.
    """
    assert expected.dtype == torch.float64
    assert actual.shape == expected.shape
    bound, reference = BOUNDS[actual.dtype], expected.flatten(1)
    error = actual.double().flatten(1) - reference
    assert error.norm() <= bound * reference.norm()
    assert (error.norm(dim=1) <= 4 * bound * reference.norm(dim=1)).all()
    if torch_same_dtype is not None:
        assert torch_same_dtype.dtype == actual.dtype
        torch_error = (torch_same_dtype.double().flatten(1) - reference).norm()
        assert error.norm() <= max(1.5 * torch_error, torch.finfo(actual.dtype).eps / 2 * reference.norm())


def _extent(tensor: Tensor) -> int:
    """Count the elements from the first of a tensor to its last, including those between its rows."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return last + 1 if tensor.numel() else 0


class Guards:
    """Tensors inside larger buffers whose other bytes must not change."""

    def __init__(self) -> None:
        self._placed: list[tuple[Tensor, Tensor, int]] = []

    def place(self, like: Tensor, fill: int) -> Tensor:
        """Create a tensor of the same dtype, shape and strides inside a buffer filled with one byte value."""
        size = like.element_size()
        buffer = torch.full(((2 * BAND + _extent(like)) * size + ALIGNMENT,), fill, dtype=torch.uint8)
        first = BAND * size + -buffer.data_ptr() % ALIGNMENT
        tensor = buffer[first : first + (BAND + _extent(like)) * size].view(like.dtype)
        tensor = tensor.as_strided(like.shape, like.stride())
        self._placed.append((buffer, tensor, fill))
        return tensor

    def check(self) -> None:
        """Check that nothing was written around a placed tensor or between its rows. This overwrites the tensors.

        Raises:
            AssertionError: Memory outside the tensors was written.
        """
        for buffer, tensor, fill in self._placed:
            with torch.inference_mode():  # tensors created in inference mode may only be changed there
                tensor.copy_(torch.full((tensor.element_size(),), fill, dtype=torch.uint8).view(tensor.dtype))
            assert (buffer == fill).all(), f"Memory around a tensor of {tuple(tensor.shape)} was written"


_guards: list[Guards] = []


def guarded(tensor: Tensor) -> Tensor:
    """Copy a tensor, with its strides, between bands of NaN (-1 for integers) that are checked when the test ends."""
    placed = _guards[-1].place(tensor, POISON)
    return placed.copy_(tensor)


@pytest.fixture(autouse=True)
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Write canaries into all memory that the kernel modules allocate, and around it."""
    _guards.append(Guards())

    def between_canaries(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocated(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            from_kernels = str(sys._getframe(1).f_globals["__name__"]).startswith("triton_embed.kernels.")
            if not from_kernels or tensor.device.type != "cpu":
                return tensor
            with _disable_current_modes():  # hide this from tests that count operations
                return _guards[-1].place(tensor, CANARY)

        return allocated

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, between_canaries(getattr(torch, name)))
    yield
    monkeypatch.undo()
    _guards.pop().check()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Convert fp32 to the bits of bfloat16, rounded to even as on a GPU."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _to_float32(handle: Any) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32)


class StrictBuilder(interpreter.InterpreterBuilder):
    """The interpreter's operations, with bfloat16 and memory access as on a GPU."""

    spans: tuple[tuple[int, int], ...] = ()  # [first, last) addresses of the tensors passed to a kernel

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32:
            return interpreter.TensorHandle(_to_bfloat16(src.data), tl.bfloat16)
        if dst_type.scalar == tl.float32 and src.dtype.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_to_float32(src), tl.float32)
        assert tl.bfloat16 not in (src.dtype.scalar, dst_type.scalar), "bfloat16 converts only from and to fp32"
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        return self.cast_impl(src, dst_type)

    def create_dot(self, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        assert d.dtype.scalar == tl.float32, "products must be summed in fp32"
        product = np.matmul(_to_float32(a), _to_float32(b))
        return interpreter.TensorHandle(product + d.data, tl.float32)

    def binary_op(self, lhs: Any, rhs: Any, op: Any) -> Any:
        assert tl.bfloat16 not in (lhs.dtype.scalar, rhs.dtype.scalar), "the interpreter takes bfloat16 for integers"
        return super().binary_op(lhs, rhs, op)

    def unary_op(self, arg: Any, op: Any) -> Any:
        assert arg.dtype.scalar != tl.bfloat16, "the interpreter takes bfloat16 for integers"
        return super().unary_op(arg, op)

    def create_masked_load(self, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        self._check(ptrs, mask, "reads")
        if other is None:
            element = ptrs.get_element_ty()
            data = np.full(ptrs.data.shape, POISON, np.uint8)[..., None].repeat(element.primitive_bitwidth // 8, -1)
            other = interpreter.TensorHandle(data.view(interpreter._get_np_dtype(element))[..., 0], element)
        return super().create_masked_load(ptrs, mask, other, *rest)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        self._check(ptrs, mask, "writes")
        return super().create_masked_store(ptrs, value, mask, *rest)

    def _check(self, ptrs: Any, mask: Any, access: str) -> None:
        addresses = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)]
        inside = np.zeros(addresses.shape, bool)
        for first, last in self.spans:
            inside |= (addresses >= first) & (addresses < last)
        assert inside.all(), f"A kernel {access} outside its tensors"


def _span(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + _extent(tensor) * tensor.element_size()


def _install_strict_builder() -> None:
    builder, call = interpreter.interpreter_builder, interpreter.GridExecutor.__call__
    builder.__class__ = StrictBuilder
    patch, patched_modules = interpreter._patch_lang, set[str]()

    def patch_once_per_launch(fn: Any) -> Any:
        # Triton patches its language again for every function that a kernel calls: a third of the time of a test.
        if fn.__module__ in patched_modules:
            return interpreter._LangPatchScope()
        patched_modules.add(fn.__module__)
        return patch(fn)

    def call_with_spans(self: Any, *args: Any, **kwargs: Any) -> None:
        patched_modules.clear()
        builder.spans = tuple(_span(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with np.errstate(all="ignore"), warnings.catch_warnings():  # as on a GPU, NaN causes no warning
            warnings.simplefilter("ignore", RuntimeWarning)
            warnings.simplefilter("ignore", DeprecationWarning)  # Triton 3.6 converts arrays of one value to numbers
            call(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = call_with_spans
    interpreter._patch_lang = patch_once_per_launch


_install_strict_builder()


def pytest_configure(config: pytest.Config) -> None:
    # Triton 3.6's interpreter warns about loops whose bounds are loaded from memory.
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array:DeprecationWarning")
