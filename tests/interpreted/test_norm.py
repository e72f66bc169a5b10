"""Norm kernels against torch in float64: many widths, sums, gathered rows, lookups, strides, NaN."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from conftest import DTYPES, assert_close, guarded, random
from triton_embed.kernels.gpu.blocks import Config
from triton_embed.kernels.gpu.norm import add_layer_norm, add_rms_norm, embed_layer_norm, post_layer_norm

EPS = 1e-3
SHAPES = [
    # rows, width, config
    (1, 1, None),
    (1, 60, None),
    (7, 60, None),
    (33, 60, None),
    (7, 64, Config(block_m=8)),
    (8, 384, Config(block_m=8)),
    (9, 384, Config(block_m=8)),
    (33, 384, None),
    (7, 1000, None),
    (1, 1024, None),
    (33, 1024, Config(block_m=4)),
    (3, 3584, None),
    (2, 8192, None),
]
INTEGERS = [torch.int32, torch.int64]


def rms_norm(total: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.rms_norm(total, weight.shape, weight, EPS)


def layer_norm(total: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(total, weight.shape, weight, bias, EPS)


Sum = tuple[Tensor, Tensor | None]
OPS: dict[str, tuple[Callable[..., Sum], Callable[..., Tensor]]] = {
    # our op (x, residual, weight, bias, eps, rows, config) -> y and the sum, and the norm of torch
    "rms": (lambda x, r, w, b, *rest: add_rms_norm(x, r, w, *rest), rms_norm),
    "layer": (add_layer_norm, layer_norm),
    "post": (lambda *arguments: (post_layer_norm(*arguments)[0], None), layer_norm),
}


def parameters(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return guarded(random(width, dtype=dtype, seed=3)), guarded(random(width, dtype=dtype, seed=4))


def check(op: str, y: Tensor, total: Tensor | None, expected: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Check y and the sum against `expected`, the sum as torch rounds it."""
    if total is not None:
        assert torch.equal(total, expected)
    torch_norm = OPS[op][1]
    assert_close(y, torch_norm(expected.double(), weight.double(), bias.double()), torch_norm(expected, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width", "config"), SHAPES)
@pytest.mark.parametrize("op", OPS)
def test_norm_of_a_sum(op: str, rows: int, width: int, config: Config | None, dtype: torch.dtype) -> None:
    x, residual = (guarded(random(rows, width, dtype=dtype, seed=seed)) for seed in (0, 1))
    weight, bias = parameters(width, dtype)
    y, total = OPS[op][0](x, residual, weight, bias, EPS, None, config)
    assert y.dtype == dtype
    check(op, y, total, x + residual, weight, bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_norm_uses_the_rounded_sum(op: str, dtype: torch.dtype) -> None:
    """Check the error: the norm of the exact sum would have 1.4 times the error of one rounding."""
    x, residual = (guarded(random(33, 384, dtype=dtype, seed=seed)) for seed in (0, 1))
    (weight, bias), torch_norm = parameters(384, dtype), OPS[op][1]
    y, _ = OPS[op][0](x, residual, weight, bias, EPS, None, None)
    expected = torch_norm((x + residual).double(), weight.double(), bias.double())
    torch_error = torch_norm(x + residual, weight, bias) - expected
    assert (y - expected).norm() <= 1.1 * torch_error.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [60, 384, 3584])
@pytest.mark.parametrize("op", OPS)
def test_norm_without_a_residual(op: str, width: int, dtype: torch.dtype) -> None:
    x, (weight, bias) = guarded(random(7, width, dtype=dtype)), parameters(width, dtype)
    y, total = OPS[op][0](x, None, weight, bias, EPS, None, None)
    assert total is None or total is x
    check(op, y, total, x, weight, bias)


@pytest.mark.parametrize("integer", INTEGERS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_residual_rows_are_gathered(op: str, integer: torch.dtype) -> None:
    x, residual = guarded(random(7, 60)), guarded(random(40, 64, seed=1)[:, :60])
    weight, bias = parameters(60, torch.float32)
    rows = torch.tensor([39, 0, 7, 7, 1, 38, 2], dtype=integer)
    y, total = OPS[op][0](x, residual, weight, bias, EPS, guarded(rows), Config(block_m=4))
    check(op, y, total, x + residual[rows], weight, bias)


@pytest.mark.parametrize("op", OPS)
def test_strided_rows(op: str) -> None:
    x, residual = guarded(random(7, 80)[:, :60]), guarded(random(7, 3, 60, seed=1)[:, 1])
    weight, bias = parameters(60, torch.float32)
    y, total = OPS[op][0](x, residual, weight, bias, EPS, None, Config(block_m=2))
    assert y.is_contiguous()
    check(op, y, total, x + residual, weight, bias)


@pytest.mark.parametrize("op", OPS)
def test_row_strides_beyond_32_bits(op: str) -> None:
    far = torch.empty(2**31 + 24, dtype=torch.float16).as_strided((3, 24), (2**30, 1))
    far.copy_(random(3, 24, dtype=torch.float16))
    weight, bias = parameters(24, torch.float16)
    near = guarded(random(3, 24, dtype=torch.float16, seed=1))
    for x, residual, rows in ((far, near, None), (near, far, guarded(torch.tensor([2, 0, 1], dtype=torch.int32)))):
        y, total = OPS[op][0](x, residual, weight, bias, EPS, rows, None)
        check(op, y, total, x + (residual if rows is None else residual[rows]), weight, bias)


@pytest.mark.parametrize("op", OPS)
def test_epsilon_matters_for_small_rows(op: str) -> None:
    x, (weight, bias) = guarded(0.02 * random(7, 60)), parameters(60, torch.float32)
    y, total = OPS[op][0](x, None, weight, bias, EPS, None, None)
    check(op, y, total, x, weight, bias)


@pytest.mark.parametrize("op", ["layer", "post"])
def test_large_mean_keeps_the_variance_precise(op: str) -> None:
    x, (weight, bias) = guarded(300 + random(7, 384)), parameters(384, torch.float32)
    y, _ = OPS[op][0](x, None, weight, bias, EPS, None, None)
    expected = layer_norm(x.double(), weight.double(), bias.double())
    assert (y - expected).norm() <= 3e-5 * expected.norm()  # fp32 represents a mean of 300 to within 2e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("op", OPS)
def test_nonfinite_values_stay_in_their_row(op: str, bad: float) -> None:
    x, (weight, bias) = random(7, 60), parameters(60, torch.float32)
    residual = random(7, 60, seed=1)
    clean, _ = OPS[op][0](guarded(x), residual, weight, bias, EPS, None, Config(block_m=8))
    x[3, 59] = bad
    y, _ = OPS[op][0](guarded(x), residual, weight, bias, EPS, None, Config(block_m=8))
    others = [0, 1, 2, 4, 5, 6]
    assert y[3].isnan().any()
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("op", OPS)
def test_empty_input(op: str) -> None:
    weight, bias = parameters(60, torch.float32)
    y, _ = OPS[op][0](torch.zeros(0, 60), torch.zeros(0, 60), weight, bias, EPS, None, None)
    assert y.shape == (0, 60)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("integer", INTEGERS, ids=str)
@pytest.mark.parametrize("typed", [True, False], ids=["types", "type 0"])
@pytest.mark.parametrize(("count", "width"), [(1, 384), (7, 60), (33, 64), (7, 1000), (3, 1024)])
def test_embeddings_match_float64(
    count: int, width: int, typed: bool, integer: torch.dtype, dtype: torch.dtype
) -> None:
    sizes = (53, 37, 2)
    word, position, token_type = (guarded(random(n, width, dtype=dtype, seed=n)) for n in sizes)
    weight, bias = parameters(width, dtype)
    generator = torch.Generator().manual_seed(count)
    ids, pos, types = (torch.randint(n, (count,), dtype=integer, generator=generator) for n in sizes)
    ids[-1], pos[-1], types[-1] = 52, 36, 1
    types = types if typed else torch.zeros_like(types)
    y = embed_layer_norm(
        guarded(ids), guarded(pos), guarded(types) if typed else None, word, position, token_type, weight, bias, EPS
    )
    assert y.dtype == dtype
    total = word.double()[ids] + position.double()[pos] + token_type.double()[types]
    one_by_one = word[ids] + token_type[types] + position[pos]
    expected = layer_norm(total, weight.double(), bias.double())
    assert_close(y, expected, layer_norm(one_by_one, weight, bias))


@pytest.mark.parametrize("large", [0, 1, 2])
@pytest.mark.parametrize("integer", INTEGERS, ids=str)
def test_embedding_tables_beyond_32_bits(integer: torch.dtype, large: int) -> None:
    tables = [guarded(random(3, 24, dtype=torch.float16, seed=seed)) for seed in range(3)]
    far = torch.empty(2**31 + 24, dtype=torch.float16).as_strided((3, 24), (2**30, 1))
    tables[large] = far.copy_(tables[large])
    weight, bias = parameters(24, torch.float16)
    index = guarded(torch.tensor([2, 0, 1, 2, 2], dtype=integer))
    y = embed_layer_norm(index, index, index, *tables, weight, bias, EPS)
    total = torch.stack([table.double() for table in tables]).sum(0)[index]
    assert_close(y, layer_norm(total, weight.double(), bias.double()))


def test_noncontiguous_inputs_are_rejected() -> None:
    strided, dense, strided_vector, index = (
        random(4, 48)[:, ::2],
        random(4, 24),
        random(48)[::2],
        torch.zeros(8, dtype=torch.int32),
    )
    vector, strided_index = random(24), index[::2]
    for x, residual, weight, bias, rows in (
        (strided, dense, vector, vector, None),
        (dense, strided, vector, vector, None),
        (dense, dense, strided_vector, vector, None),
        (dense, dense, vector, strided_vector, None),
        (dense, dense, vector, vector, strided_index),
    ):
        for op in OPS:
            if op != "rms" or bias is vector:
                with pytest.raises(ValueError, match="not contiguous"):
                    OPS[op][0](x, residual, weight, bias, EPS, rows, None)
    arguments = [index[:4], index[:4], index[:4], dense, dense, dense, vector, vector]
    for position, replacement in enumerate(
        [strided_index, strided_index, strided_index, strided, strided, strided, strided_vector, strided_vector]
    ):
        with pytest.raises(ValueError, match="not contiguous"):
            embed_layer_norm(*arguments[:position], replacement, *arguments[position + 1 :], EPS)
