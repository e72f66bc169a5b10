"""Linear layers, plain and packed for oneDNN, against torch in float64 with transformers' activations."""

from collections.abc import Callable

import pytest
import torch
from test_ops import ACTIVATIONS, assert_close, one_thread, random  # noqa: F401
from torch import Tensor
from transformers.activations import ACT2FN

from triton_embed.kernels.cpu import linear_onednn as onednn
from triton_embed.kernels.ops import Ops

ops = Ops.on("cpu", torch.float32)

SHAPES = [(1, 1, 1), (1, 384, 1536), (7, 60, 92), (13, 31, 53), (257, 384, 384)]  # T, K, N
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {"plain": lambda weight: weight, "packed": ops.pack_linear}


def random_layer(tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Create x, weight and bias, scaled so that activations see values around 1."""
    x, weight = random(tokens, inputs, dtype=dtype), random(outputs, inputs, dtype=dtype, seed=1) * inputs**-0.5
    return x, weight.to(dtype), random(outputs, dtype=dtype, seed=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", [None, *ACTIVATIONS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_matches_float64(shape: tuple[int, int, int], act: str | None, layout: str, dtype: torch.dtype) -> None:
    x, weight, bias = random_layer(*shape, dtype)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    if act is not None:
        expected = ACT2FN[ACTIVATIONS[act]](expected)
    result = ops.linear(x, LAYOUTS[layout](weight), bias, act)
    assert result.dtype == dtype
    difference, size = (result.double() - expected).norm(), expected.norm()
    if min(shape[0], shape[2]) == 1:  # too few values for a norm of each row
        assert difference <= 4 * {torch.float32: 2e-6, torch.bfloat16: 4e-3}[dtype] * size + 1e-30
    else:
        assert_close(result, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_without_a_bias(layout: str) -> None:
    x, weight, _ = random_layer(5, 31, 53, torch.float32)
    assert_close(ops.linear(x, LAYOUTS[layout](weight), None), x.double() @ weight.double().T)


def test_packing_is_opaque_and_keeps_the_weight() -> None:
    weight = random(53, 31)
    packed = ops.pack_linear(weight)
    assert packed.is_mkldnn
    assert packed.shape == weight.shape
    assert torch.equal(weight, random(53, 31))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_configurable_dtype_can_be_packed(dtype: torch.dtype) -> None:
    """Check that the plain weight works where oneDNN has no kernels for the dtype on this CPU."""
    x, weight, bias = random_layer(7, 60, 92, dtype)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert_close(ops.linear(x, ops.pack_linear(weight), bias), expected)


def test_only_activations_of_onednn_are_fused() -> None:
    """Check the list, because torch's oneDNN binding supports only gelu and relu and ignores unknown names."""
    assert {act for act in ACTIVATIONS if onednn.fuses(act)} == {"gelu_erf", "gelu_tanh", "relu"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("x", "bias", "act"), [((5, 30), 53, None), ((5, 31), 52, None), ((5, 31), 53, "gelu")], ids=str
)
def test_mismatched_arguments_are_rejected(x: tuple[int, int], bias: int, act: str | None, layout: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        ops.linear(torch.zeros(x), LAYOUTS[layout](random(53, 31)), torch.zeros(bias), act)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_weight_determines_the_dtype(shape: tuple[int, int, int]) -> None:
    """Check that fp32 input, as from a norm, is rounded and multiplied as if it were bf16."""
    if not onednn.supports(torch.bfloat16):
        pytest.skip("this CPU does not multiply bf16")
    x, weight, bias = random_layer(*shape, torch.bfloat16)
    packed = ops.pack_linear(weight)
    assert torch.equal(ops.linear(x.float(), packed, bias), ops.linear(x, packed, bias))
