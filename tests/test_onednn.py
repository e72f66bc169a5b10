"""Linear layers, plain and packed for oneDNN, against torch in float64 with transformers' activations."""

from collections.abc import Callable

import pytest
import torch
from test_ops import ACTIVATIONS, assert_close, one_thread, random  # noqa: F401
from torch import Tensor
from transformers.activations import ACT2FN

from triton_embed.kernels import onednn, ops

SHAPES = [(1, 1, 1), (1, 384, 1536), (7, 60, 92), (13, 31, 53), (257, 384, 384)]  # T, K, N
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {"plain": lambda weight: weight, "packed": ops.pack_linear}


def layer(tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias, scaled so that activations see values around 1."""
    x, weight = random(tokens, inputs, dtype=dtype), random(outputs, inputs, dtype=dtype, seed=1) * inputs**-0.5
    return x, weight.to(dtype), random(outputs, dtype=dtype, seed=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", [None, *ACTIVATIONS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(shape: tuple[int, int, int], act: str | None, layout: str, dtype: torch.dtype) -> None:
    x, weight, bias = layer(*shape, dtype)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    if act is not None:
        expected = ACT2FN[ACTIVATIONS[act]](expected)
    found = ops.linear(x, LAYOUTS[layout](weight), bias, act)
    assert found.dtype == dtype
    difference, size = (found.double() - expected).norm(), expected.norm()
    if min(shape[0], shape[2]) == 1:  # too few values for a norm of each row
        assert difference <= 4 * {torch.float32: 2e-6, torch.bfloat16: 4e-3}[dtype] * size + 1e-30
    else:
        assert_close(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_without_a_bias(layout: str) -> None:
    x, weight, _ = layer(5, 31, 53, torch.float32)
    assert_close(ops.linear(x, LAYOUTS[layout](weight), None), x.double() @ weight.double().T)


def test_packing_is_opaque_and_leaves_the_weight_alone() -> None:
    weight = random(53, 31)
    packed = ops.pack_linear(weight)
    assert packed.is_mkldnn
    assert packed.shape == weight.shape
    assert torch.equal(weight, random(53, 31))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_dtype_that_an_operator_may_choose_can_be_packed(dtype: torch.dtype) -> None:
    """Where oneDNN has no kernels for it on this CPU, the plain weight serves."""
    x, weight, bias = layer(7, 60, 92, dtype)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert_close(ops.linear(x, ops.pack_linear(weight), bias), expected)


def test_no_activation_is_fused_that_onednn_lacks() -> None:
    """torch's oneDNN binding knows gelu and relu of ours, and ignores a name that it does not know."""
    assert {act for act in ops.ACTIVATIONS if onednn.fuses(act)} == {"gelu_erf", "gelu_tanh", "relu"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("x", "bias", "act"), [((5, 30), 53, None), ((5, 31), 52, None), ((5, 31), 53, "gelu")], ids=str
)
def test_arguments_that_do_not_fit_are_refused(x: tuple[int, int], bias: int, act: str | None, layout: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        ops.linear(torch.zeros(x), LAYOUTS[layout](random(53, 31)), torch.zeros(bias), act)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_packed_weight_decides_the_dtype(shape: tuple[int, int, int]) -> None:
    """Of what comes from a norm in fp32: rounded, multiplied and given on as if it had come in bf16."""
    if not onednn.packs(torch.bfloat16):
        pytest.skip("this CPU does not multiply bf16")
    x, weight, bias = layer(*shape, torch.bfloat16)
    packed = ops.pack_linear(weight)
    assert torch.equal(ops.linear(x.float(), packed, bias), ops.linear(x, packed, bias))
