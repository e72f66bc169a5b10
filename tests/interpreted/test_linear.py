"""The linear kernel against torch in float64: sizes around block edges, activations, strides, NaN."""

import pytest
import torch
from torch import Tensor

from conftest import DTYPES, assert_close, guarded, random
from triton_embed.kernels import reference
from triton_embed.kernels.gpu import blocks
from triton_embed.kernels.gpu.blocks import Config
from triton_embed.kernels.gpu.linear import linear

SMALL, OBLONG, DEEP = Config(16, 16, 16), Config(16, 32, 64), Config(32, 16, 32)
SHAPES = [
    # T, K, N
    (1, 1, 1, SMALL),
    (1, 16, 16, SMALL),
    (15, 17, 33, SMALL),
    (16, 31, 16, OBLONG),
    (17, 64, 31, OBLONG),
    (31, 65, 65, OBLONG),
    (33, 60, 92, DEEP),
    (150, 20, 40, SMALL),  # 10 row blocks: a group of 8 and one of 2
    (129, 32, 17, SMALL),  # the second group is one block with one row
    (5, 130, 70, None),  # config from the table; fewer rows than a block
]


def random_layer(tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Create x, weight and bias, scaled so that activations see values around 1."""
    x, weight = random(tokens, inputs, dtype=dtype), (random(outputs, inputs, seed=1) * inputs**-0.5).to(dtype)
    return guarded(x), guarded(weight), guarded(random(outputs, dtype=dtype, seed=2))


def float64_linear(x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None) -> Tensor:
    return reference.linear(x.double(), weight.double(), None if bias is None else bias.double(), act)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", [None, "gelu_erf"])
@pytest.mark.parametrize(("tokens", "inputs", "outputs", "config"), SHAPES)
def test_every_edge_of_a_block(
    tokens: int, inputs: int, outputs: int, config: Config | None, act: str | None, dtype: torch.dtype
) -> None:
    x, weight, bias = random_layer(tokens, inputs, outputs, dtype)
    result = linear(x, weight, bias, act, config)
    assert result.dtype == dtype
    assert_close(result, float64_linear(x, weight, bias, act), reference.linear(x, weight, bias, act))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", reference.ACTIVATIONS)
def test_every_activation(act: str, dtype: torch.dtype) -> None:
    x, weight, bias = random_layer(19, 48, 35, dtype)
    result = linear(x, weight, bias, act, OBLONG)
    assert_close(result, float64_linear(x, weight, bias, act), reference.linear(x, weight, bias, act))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_bias(dtype: torch.dtype) -> None:
    x, weight, _ = random_layer(19, 48, 35, dtype)
    assert_close(linear(x, weight, None, "silu", DEEP), float64_linear(x, weight, None, "silu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows(dtype: torch.dtype) -> None:
    """Test columns of wider matrices as x and weight, with NaN between their rows."""
    x, weight, bias = random(21, 100, dtype=dtype), random(37, 90, dtype=dtype, seed=1), random(37, dtype=dtype, seed=2)
    x, weight = guarded(x[:, 8:58]), guarded(weight[:, 16:66])
    assert x.stride(0) == 100
    assert weight.stride(0) == 90
    assert_close(linear(x, weight, bias, "relu", OBLONG), float64_linear(x, weight, bias, "relu"))


@pytest.mark.parametrize("which", ["x", "weight"])
def test_row_strides_beyond_32_bits(which: str) -> None:
    """Start row 2 at 2^31 elements after row 0, in memory that is reserved but touched only where rows are."""
    x, weight, bias = random_layer(3, 16, 3, torch.float16)
    stride = 1 << 30
    far = torch.empty(2 * stride + 16, dtype=torch.float16).as_strided((3, 16), (stride, 1))
    far.copy_({"x": x, "weight": weight}[which])
    result = linear(far if which == "x" else x, far if which == "weight" else weight, bias, None, SMALL)
    assert_close(result, float64_linear(x, weight, bias, None))


@pytest.mark.parametrize("row", [0, 15, 16, 36])
def test_nan_row_does_not_affect_other_rows(row: int) -> None:
    """Test the last row too, which replaces rows past the end."""
    x, weight, bias = random_layer(37, 40, 24, torch.bfloat16)
    clean = linear(x, weight, bias, "gelu_tanh", OBLONG)
    x[row] = float("nan")
    result = linear(x, weight, bias, "gelu_tanh", OBLONG)
    others = torch.arange(37) != row
    assert result[row].isnan().all()
    assert torch.equal(result[others], clean[others])


def test_empty_input() -> None:
    x, weight, bias = random_layer(0, 16, 24, torch.float32)
    assert linear(x, weight, bias, "tanh", SMALL).shape == (0, 24)


@pytest.mark.parametrize("broken", ["x", "weight", "bias"])
def test_noncontiguous_values_are_rejected(broken: str) -> None:
    strided = {"x": random(8, 64)[:, ::2], "weight": random(4, 64)[:, ::2], "bias": random(8)[::2]}
    parts = {name: value if name == broken else value.contiguous() for name, value in strided.items()}
    with pytest.raises(ValueError, match="not contiguous"):
        linear(parts["x"], parts["weight"], parts["bias"], None, SMALL)


def test_size_left_to_torch_raises_lookup_error(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {"linear": [{"up_to": {"tokens": 4}, "config": {"block_m": 16}}, {}]}
    monkeypatch.setattr(blocks, "table_for", lambda _: blocks.Table("sm00", kernels))
    x, weight, bias = random_layer(5, 16, 16, torch.float32)
    with pytest.raises(LookupError, match=r"table of sm00 has no entry for 'linear' at \{'tokens': 5"):
        linear(x, weight, bias)
