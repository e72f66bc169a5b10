"""The strict interpreter of conftest: a kernel that is wrong on a GPU is wrong here too."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from conftest import Guards, assert_close, guarded, random


@triton.jit
def _copy_kernel(x, y, first, count, OTHER: tl.constexpr, SIZE: tl.constexpr):  # noqa: N803
    """Set y[i] = x[first + i] where i < count, else `OTHER`."""
    index = tl.arange(0, SIZE)
    mask = index < count
    values = (
        tl.load(x + first + index, mask=mask) if OTHER is None else tl.load(x + first + index, mask=mask, other=OTHER)
    )
    tl.store(y + index, values)


@triton.jit
def _matmul_kernel(a, b, c, SIZE: tl.constexpr):  # noqa: N803
    """Compute c = a @ b in c's dtype, all [SIZE,SIZE]."""
    index = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(a + index), tl.load(b + index), input_precision="ieee")
    tl.store(c + index, product.to(c.dtype.element_ty))


@triton.jit
def _sum_kernel(x, y, SIZE: tl.constexpr):  # noqa: N803
    """Compute y = x + x in the dtype of x."""
    index = tl.arange(0, SIZE)
    tl.store(y + index, tl.load(x + index) + tl.load(x + index))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_products_match_torch_in_every_dtype(dtype: torch.dtype) -> None:
    a, b = random(32, 32, dtype=dtype), random(32, 32, dtype=dtype, seed=1)
    c = guarded(torch.zeros(32, 32, dtype=dtype))
    _matmul_kernel[(1,)](guarded(a), guarded(b), c, 32)
    assert_close(c, a.double() @ b.double(), torch_same_dtype=a @ b)


def test_bfloat16_is_rounded_to_even() -> None:
    halves = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20, 3e38, float("inf"), float("nan")])
    values = torch.cat([halves, random(25)])
    a = torch.zeros(32, 32)
    a[0] = values
    c = guarded(torch.zeros(32, 32, dtype=torch.bfloat16))
    _copy_kernel[(1,)](a, c, 0, 32, 0.0, 32)
    assert torch.equal(c[0].nan_to_num(7), values.bfloat16().nan_to_num(7))


def test_bfloat16_arithmetic_is_rejected() -> None:
    x = random(16).bfloat16()
    with pytest.raises((InterpreterError, AssertionError), match="bfloat16"):
        _sum_kernel[(1,)](x, torch.empty_like(x), 16)


@pytest.mark.parametrize(("first", "count"), [(1, 16), (-1, 16), (1 << 30, 1)])
def test_read_outside_the_tensors_is_rejected(first: int, count: int) -> None:
    with pytest.raises((InterpreterError, AssertionError), match="reads outside"):
        _copy_kernel[(1,)](guarded(random(16)), torch.zeros(16), first, count, 0.0, 16)


@pytest.mark.parametrize("size", [15, 1])
def test_write_outside_the_tensors_is_rejected(size: int) -> None:
    with pytest.raises((InterpreterError, AssertionError), match="writes outside"):
        _copy_kernel[(1,)](random(16), guarded(torch.zeros(size)), 0, 16, 0.0, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_masked_load_without_other_gives_nan(dtype: torch.dtype) -> None:
    x, y = random(16).to(dtype), torch.zeros(16, dtype=dtype)
    _copy_kernel[(1,)](x, y, 0, 9, None, 16)
    assert torch.equal(y[:9], x[:9])
    assert y[9:].isnan().all()


@pytest.mark.parametrize("offset", [-1, 5, 40])
def test_write_around_or_between_guarded_rows_is_detected(offset: int) -> None:
    guards = Guards()
    placed = guards.place(torch.empty_strided((4, 5), (10, 1)), 0xFF).copy_(random(4, 5))
    guards.check()
    torch.as_strided(placed, (1,), (1,), placed.storage_offset() + offset).fill_(1.0)
    with pytest.raises(AssertionError, match="was written"):
        guards.check()
