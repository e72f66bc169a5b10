"""Linear layers of panels against float64 and transformers' activations."""

import pytest
import torch
from test_loops import fenced
from test_ops import assert_close, random
from transformers.activations import ACT2FN

from triton_embed.kernels import ops, panels
from triton_embed.kernels.panels import PanelWeight

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
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on CPUs where oneDNN is taken instead."""
    monkeypatch.setattr(panels, "usable", lambda: True)


def packed(outputs: int, inputs: int) -> tuple[torch.Tensor, PanelWeight]:
    weight = random(outputs, inputs, dtype=torch.bfloat16, seed=1)
    found = PanelWeight.pack(weight)
    assert found is not None
    return weight, found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_linear(tokens: int, shape: tuple[int, int]) -> None:
    weight, ours = packed(*shape)
    x, bias = random(tokens, shape[1], dtype=torch.bfloat16), random(shape[0], dtype=torch.bfloat16, seed=2)
    product = x.double() @ weight.double().T
    for given, expected in ((None, product), (bias, product + bias.double()), (bias.float(), product + bias.double())):
        found = ops.linear(x, ours, given)
        assert (found.dtype, found.shape) == (torch.bfloat16, (tokens, shape[0]))
        assert_close(found, expected)


@pytest.mark.parametrize("act", ops.ACTIVATIONS)
def test_activations(act: str) -> None:
    weight, ours = packed(96, 64)
    x, bias = 3 * random(37, 64, dtype=torch.bfloat16), random(96, dtype=torch.bfloat16, seed=2)
    expected = ACT2FN[ACTIVATIONS[act]](x.double() @ weight.double().T + bias.double())
    assert_close(ops.linear(x, ours, bias, act), expected)


@pytest.mark.parametrize("act", [act for act in panels.ACTIVATIONS if act])
def test_an_activation_of_every_size_of_number(act: str) -> None:
    """The product is the number itself: 1 * x."""
    weight = torch.zeros(32, 2, dtype=torch.bfloat16)
    weight[:, 0] = 1
    x = torch.zeros(4_001, 2, dtype=torch.bfloat16)
    x[:, 0] = torch.cat([torch.linspace(-9, 9, 2_001), torch.logspace(-6, 4, 1_000), -torch.logspace(-6, 4, 1_000)])
    ours = PanelWeight.pack(weight)
    assert ours is not None
    expected = ACT2FN[ACTIVATIONS[act]](x[:, :1].double()).expand(-1, 32)
    found = ops.linear(x, ours, None, act).double()
    assert ((found - expected).abs() <= 0.004 * expected.abs() + 3e-7 * x[:, :1].double().abs() + 1e-30).all()


def test_rows_of_a_wider_tensor() -> None:
    weight, ours = packed(64, 30)
    wide = random(9, 50, dtype=torch.bfloat16)
    assert_close(ops.linear(wide[:, 4:34], ours, None), wide[:, 4:34].double() @ weight.double().T)


def test_a_token_is_the_same_whatever_it_is_computed_with() -> None:
    _, ours = packed(64, 384)
    x = random(300, 384, dtype=torch.bfloat16)
    whole = ops.linear(x, ours, None, "gelu_erf")
    for start, end in ((0, 1), (3, 7), (250, 263), (299, 300)):
        assert torch.equal(ops.linear(x[start:end], ours, None, "gelu_erf"), whole[start:end])
    x[7] = torch.nan
    found = ops.linear(x, ours, None, "gelu_erf")
    assert found[7].isnan().all()
    assert torch.equal(found[8:], whole[8:])


def test_threads_change_nothing() -> None:
    _, ours = packed(96, 64)
    x, before = random(700, 64, dtype=torch.bfloat16), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(ops.linear(x, ours, None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("outputs", "inputs", "dtype"), [(33, 8, torch.bfloat16), (32, 7, torch.bfloat16), (32, 8, torch.float32)], ids=str
)
def test_what_does_not_fit_is_onednns(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    weight = random(outputs, inputs, dtype=dtype)
    assert PanelWeight.pack(weight) is None
    assert isinstance(ops.pack_linear(weight), torch.Tensor)


def test_a_cpu_with_larger_products_has_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "usable", lambda: False)
    assert PanelWeight.pack(random(32, 8, dtype=torch.bfloat16)) is None


def test_packing_leaves_the_weight_alone_and_keeps_its_shape() -> None:
    weight, ours = packed(96, 30)
    assert ours.shape == weight.shape
    assert torch.equal(weight, random(96, 30, dtype=torch.bfloat16, seed=1))


@pytest.mark.parametrize("tokens", [1, 5, 8, 11])
def test_nothing_behind_the_last_token_is_read(tokens: int) -> None:
    """A violation is a segmentation fault."""
    _, ours = packed(32, 64)
    x = random(tokens, 64, dtype=torch.bfloat16)
    assert torch.equal(ops.linear(fenced(x), ours, None), ops.linear(x, ours, None))
