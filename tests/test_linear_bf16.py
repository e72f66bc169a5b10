"""Linear layers in panels against float64 and transformers' activations."""

import pytest
import torch
from test_loops import before_guard_page
from test_ops import assert_close, random
from transformers.activations import ACT2FN

from triton_embed.kernels.cpu import linear_bf16 as panels
from triton_embed.kernels.cpu.linear_bf16 import PanelWeight
from triton_embed.kernels.ops import Ops

ops = Ops.on("cpu", torch.float32)

ACTIVATIONS = {
    "gelu_erf": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "tanh": "tanh",
}
TOKENS = [1, 2, 3, 4, 5, 7, 8, 9, 12, 17, 64, 255, 256, 257, 515]
SHAPES = [(32, 2), (32, 30), (64, 384), (96, 386), (1_152, 64)]  # outputs, inputs


@pytest.fixture(autouse=True)
def panels_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Select panels even on CPUs where oneDNN is preferred."""
    monkeypatch.setattr(panels, "is_preferred", lambda: True)


def packed_weight(outputs: int, inputs: int) -> tuple[torch.Tensor, PanelWeight]:
    weight = random(outputs, inputs, dtype=torch.bfloat16, seed=1)
    panel_weight = PanelWeight.pack(weight)
    assert panel_weight is not None
    return weight, panel_weight


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_linear_matches_float64(tokens: int, shape: tuple[int, int]) -> None:
    weight, packed = packed_weight(*shape)
    x, bias = random(tokens, shape[1], dtype=torch.bfloat16), random(shape[0], dtype=torch.bfloat16, seed=2)
    product = x.double() @ weight.double().T
    for bias_or_none, expected in (
        (None, product),
        (bias, product + bias.double()),
        (bias.float(), product + bias.double()),
    ):
        result = ops.linear(x, packed, bias_or_none)
        assert (result.dtype, result.shape) == (torch.bfloat16, (tokens, shape[0]))
        assert_close(result, expected)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_match_transformers(act: str) -> None:
    weight, packed = packed_weight(96, 64)
    x, bias = 3 * random(37, 64, dtype=torch.bfloat16), random(96, dtype=torch.bfloat16, seed=2)
    expected = ACT2FN[ACTIVATIONS[act]](x.double() @ weight.double().T + bias.double())
    assert_close(ops.linear(x, packed, bias, act), expected)


@pytest.mark.parametrize("act", [act for act in panels.ACTIVATIONS if act])
def test_activations_over_the_full_range(act: str) -> None:
    """Test with a weight of 1, so that the product is x itself."""
    weight = torch.zeros(32, 2, dtype=torch.bfloat16)
    weight[:, 0] = 1
    x = torch.zeros(4_001, 2, dtype=torch.bfloat16)
    x[:, 0] = torch.cat([torch.linspace(-9, 9, 2_001), torch.logspace(-6, 4, 1_000), -torch.logspace(-6, 4, 1_000)])
    packed = PanelWeight.pack(weight)
    assert packed is not None
    expected = ACT2FN[ACTIVATIONS[act]](x[:, :1].double()).expand(-1, 32)
    result = ops.linear(x, packed, None, act).double()
    assert ((result - expected).abs() <= 0.004 * expected.abs() + 3e-7 * x[:, :1].double().abs() + 1e-30).all()


def test_strided_rows() -> None:
    weight, packed = packed_weight(64, 30)
    wide = random(9, 50, dtype=torch.bfloat16)
    assert_close(ops.linear(wide[:, 4:34], packed, None), wide[:, 4:34].double() @ weight.double().T)


def test_token_is_independent_of_its_batch() -> None:
    _, packed = packed_weight(64, 384)
    x = random(300, 384, dtype=torch.bfloat16)
    batched = ops.linear(x, packed, None, "gelu_erf")
    for start, end in ((0, 1), (3, 7), (250, 263), (299, 300)):
        assert torch.equal(ops.linear(x[start:end], packed, None, "gelu_erf"), batched[start:end])
    x[7] = torch.nan
    result = ops.linear(x, packed, None, "gelu_erf")
    assert result[7].isnan().all()
    assert torch.equal(result[8:], batched[8:])


def test_result_is_independent_of_the_thread_count() -> None:
    _, packed = packed_weight(96, 64)
    x, before = random(700, 64, dtype=torch.bfloat16), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.linear(x, packed, None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("outputs", "inputs", "dtype"), [(33, 8, torch.bfloat16), (32, 7, torch.bfloat16), (32, 8, torch.float32)], ids=str
)
def test_unsupported_weights_use_onednn(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    weight = random(outputs, inputs, dtype=dtype)
    assert PanelWeight.pack(weight) is None
    assert isinstance(ops.pack_linear(weight), torch.Tensor)


def test_panels_are_unused_where_onednn_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "is_preferred", lambda: False)
    assert PanelWeight.pack(random(32, 8, dtype=torch.bfloat16)) is None


def test_packing_keeps_the_weight_and_its_shape() -> None:
    weight, packed = packed_weight(96, 30)
    assert packed.shape == weight.shape
    assert torch.equal(weight, random(96, 30, dtype=torch.bfloat16, seed=1))


@pytest.mark.parametrize("tokens", [1, 5, 8, 11])
def test_no_read_past_the_last_token(tokens: int) -> None:
    """Test x before a guard page, where a violation is a segmentation fault."""
    _, packed = packed_weight(32, 64)
    x = random(tokens, 64, dtype=torch.bfloat16)
    assert torch.equal(ops.linear(before_guard_page(x), packed, None), ops.linear(x, packed, None))
