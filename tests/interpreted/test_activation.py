"""Activation kernels against torch in float64: every kind, block edges, strides, extreme values, NaN."""

import pytest
import torch
from torch import Tensor

from conftest import DTYPES, assert_close, guarded, random
from triton_embed.kernels import reference
from triton_embed.kernels.gpu.activation import activation, gated_activation
from triton_embed.kernels.gpu.blocks import Config

SHAPES = [
    # rows, width, config
    (7, 1, None),
    (1, 24, None),
    (7, 60, None),
    (33, 384, None),
    (4, 512, None),
    (5, 513, None),
    (7, 1000, None),
    (3, 65, Config(block_m=2, block_n=16)),
    (9, 128, Config(block_m=8, block_n=128)),
]
# Scales of the rows with the smallest and the largest values. Results for the smallest are still normal numbers.
SCALES = {torch.float32: (1e-6, 1e2), torch.bfloat16: (1e-6, 1e2), torch.float16: (1e-2, 1e2)}


def random_values(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Create values around 1 and, in larger matrices, one row of much smaller and one of larger values."""
    x = random(rows, width)
    if rows > 2 and width > 24:
        x[0] *= SCALES[dtype][0]
        x[-1] *= SCALES[dtype][1]
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width", "config"), SHAPES)
@pytest.mark.parametrize("kind", reference.ACTIVATIONS)
def test_every_activation(kind: str, rows: int, width: int, config: Config | None, dtype: torch.dtype) -> None:
    x = guarded(random_values(rows, width, dtype))
    result = activation(x, kind, config)
    assert result.dtype == dtype
    torch_result = (
        reference.activation(x, kind) if x.numel() > 1000 else None
    )  # with few values, torch's error is a matter of chance
    assert_close(result, reference.activation(x.double(), kind), torch_result)


@pytest.mark.parametrize("kind", reference.ACTIVATIONS)
def test_full_range_of_values(kind: str) -> None:
    """Test values from the smallest normal number to the largest, where x³ and exp(x) overflow, with both signs.

    The bound is 2e-6 of each value, plus 1e-6 where the result is a difference of larger values, as in torch.
    """
    positive = torch.logspace(-37, 38.5, 1021, dtype=torch.float64).float()
    x = torch.stack([positive, -positive])
    result, expected = activation(guarded(x), kind).double(), reference.activation(x.double(), kind)
    assert result.isfinite().all()
    assert ((result - expected).abs() <= 2e-6 * expected.abs() + 1e-6 * (x.abs() > 0.5)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width", "config"), SHAPES)
def test_gate_matches_float64(rows: int, width: int, config: Config | None, dtype: torch.dtype) -> None:
    gate, up = random(rows, width, dtype=dtype), random(rows, width, dtype=dtype, seed=1)
    result = gated_activation(guarded(torch.cat([gate, up], dim=1)), config)
    assert result.dtype == dtype
    expected = torch.nn.functional.silu(gate.double()) * up.double()
    assert_close(result, expected, reference.gated_activation(torch.cat([gate, up], dim=1)))


def test_strided_rows() -> None:
    x = guarded(random(7, 100)[:, :60])
    result = activation(x, "silu")
    assert result.is_contiguous()
    assert_close(result, reference.activation(x.double(), "silu"))
    assert_close(gated_activation(x), reference.gated_activation(x.double()))


def test_row_strides_beyond_32_bits() -> None:
    near = random(3, 24, dtype=torch.float16)
    far = torch.empty(2**31 + 24, dtype=torch.float16).as_strided((3, 24), (2**30, 1)).copy_(near)
    assert_close(activation(far, "silu"), reference.activation(near.double(), "silu"))
    assert_close(gated_activation(far), reference.gated_activation(near.double()))


@pytest.mark.parametrize("kind", reference.ACTIVATIONS)
def test_nan_stays_in_its_element(kind: str) -> None:
    x = random(5, 24)
    clean = activation(guarded(x), kind)
    x[2, 5] = float("nan")
    result = activation(guarded(x), kind)
    assert result[2, 5].isnan()
    assert torch.equal(result.nan_to_num(0.25), clean.index_put((torch.tensor(2), torch.tensor(5)), torch.tensor(0.25)))


def test_empty_input() -> None:
    assert activation(torch.zeros(0, 24), "silu").shape == (0, 24)
    assert gated_activation(torch.zeros(0, 24)).shape == (0, 12)


def test_input_that_is_no_contiguous_matrix_is_rejected() -> None:
    for x in (random(4, 48)[:, ::2], random(4, 24).T, random(24), random(2, 3, 4)):
        with pytest.raises(ValueError, match=r"not contiguous|must be a matrix \[rows, values\]"):
            activation(x, "silu")
        with pytest.raises(ValueError, match=r"not contiguous|must be a matrix \[rows, values\]"):
            gated_activation(x)
