"""What the interpreted kernels are tested with: Triton's interpreter made honest, guarded memory, tolerances.

As it comes, the interpreter multiplies bfloat16 as integers, cuts it off instead of rounding it, and lets a kernel
read and write whatever memory it likes; it also gives zeros where a masked load without `other` leaves a GPU with
anything at all. Here such a kernel fails. Run in a process of its own with TRITON_INTERPRET=1.
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

assert triton.knobs.runtime.interpret, "the kernels would be compiled: set TRITON_INTERPRET=1"

BOUNDS = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}
DTYPES = list(BOUNDS)
BAND = 1 << 16  # elements before and after every guarded tensor
ALIGNMENT = 64  # bytes: as torch's own
POISON, CANARY = 0xFF, 0xCB  # every byte: NaN in any floating dtype and -1 in any integer; an unlikely value


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(found: Tensor, expected: Tensor, torch_same_dtype: Tensor | None = None) -> None:
    """Relative Frobenius error against float64 on the same rounded inputs; no row is worse than 4 times the bound.

    `torch_same_dtype`: what torch makes of it in that dtype; 1.5 times its error is allowed, or one rounding.
    """
    assert expected.dtype == torch.float64
    assert found.shape == expected.shape
    bound, right = BOUNDS[found.dtype], expected.flatten(1)
    wrong = found.double().flatten(1) - right
    assert wrong.norm() <= bound * right.norm()
    assert (wrong.norm(dim=1) <= 4 * bound * right.norm(dim=1)).all()
    if torch_same_dtype is not None:
        assert torch_same_dtype.dtype == found.dtype
        own = (torch_same_dtype.double().flatten(1) - right).norm()
        assert wrong.norm() <= max(1.5 * own, torch.finfo(found.dtype).eps / 2 * right.norm())


def _extent(tensor: Tensor) -> int:
    """Elements from the first of a tensor to its last, those between its rows included."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return last + 1 if tensor.numel() else 0


class Guards:
    """Tensors inside larger buffers whose other bytes must stay as they are."""

    def __init__(self) -> None:
        self._placed: list[tuple[Tensor, Tensor, int]] = []

    def place(self, like: Tensor, fill: int) -> Tensor:
        """A tensor of the same dtype, shape and strides, in a buffer full of one byte."""
        size = like.element_size()
        buffer = torch.full(((2 * BAND + _extent(like)) * size + ALIGNMENT,), fill, dtype=torch.uint8)
        first = BAND * size + -buffer.data_ptr() % ALIGNMENT
        tensor = buffer[first : first + (BAND + _extent(like)) * size].view(like.dtype)
        tensor = tensor.as_strided(like.shape, like.stride())
        self._placed.append((buffer, tensor, fill))
        return tensor

    def check(self) -> None:
        """AssertionError: something was written around a placed tensor or between its rows. Empties the tensors."""
        for buffer, tensor, fill in self._placed:
            with torch.inference_mode():  # some were made in it, and may be changed nowhere else
                tensor.copy_(torch.full((tensor.element_size(),), fill, dtype=torch.uint8).view(tensor.dtype))
            assert (buffer == fill).all(), f"memory around a tensor of {tuple(tensor.shape)} was written"


_guards: list[Guards] = []


def guarded(tensor: Tensor) -> Tensor:
    """A copy with the same strides between bands of NaN (-1 where integers), checked when the test ends."""
    placed = _guards[-1].place(tensor, POISON)
    return placed.copy_(tensor)


@pytest.fixture(autouse=True)
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever the kernels' files allocate lies between canaries, and is itself made of them."""
    _guards.append(Guards())

    def between_canaries(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocated(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            ours = str(sys._getframe(1).f_globals["__name__"]).startswith("triton_embed.kernels.")
            if not ours or tensor.device.type != "cpu":
                return tensor
            with _disable_current_modes():  # what a test counts is not this
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
    """fp32 -> the bits of bfloat16, rounded to even as a GPU does."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _to_float32(handle: Any) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32)


class HonestBuilder(interpreter.InterpreterBuilder):
    """The interpreter's operations, with bfloat16 and memory as on a GPU."""

    spans: tuple[tuple[int, int], ...] = ()  # [first, last) addresses of the tensors that a kernel was given

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32:
            return interpreter.TensorHandle(_to_bfloat16(src.data), tl.bfloat16)
        if dst_type.scalar == tl.float32 and src.dtype.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_to_float32(src), tl.float32)
        assert tl.bfloat16 not in (src.dtype.scalar, dst_type.scalar), "bfloat16 is converted from and to fp32 alone"
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        return self.cast_impl(src, dst_type)

    def create_dot(self, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        assert d.dtype.scalar == tl.float32, "every product is summed in fp32"
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

    def _check(self, ptrs: Any, mask: Any, does: str) -> None:
        addresses = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)]
        inside = np.zeros(addresses.shape, bool)
        for first, last in self.spans:
            inside |= (addresses >= first) & (addresses < last)
        assert inside.all(), f"a kernel {does} outside the tensors it was given"


def _span(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + _extent(tensor) * tensor.element_size()


def _make_honest() -> None:
    builder, call = interpreter.interpreter_builder, interpreter.GridExecutor.__call__
    builder.__class__ = HonestBuilder

    def recorded(self: Any, *args: Any, **kwargs: Any) -> None:
        builder.spans = tuple(_span(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with np.errstate(all="ignore"), warnings.catch_warnings():  # NaN is as ordinary here as on a GPU
            warnings.simplefilter("ignore", RuntimeWarning)
            warnings.simplefilter("ignore", DeprecationWarning)  # 3.6 makes numbers of arrays of one value
            call(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = recorded


_make_honest()


def pytest_configure(config: pytest.Config) -> None:
    # 3.6's interpreter, for a loop from and to loaded numbers
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array:DeprecationWarning")
