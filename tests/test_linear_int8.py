"""int8 layers against float64, and MiniLM with int8 layers against sentence-transformers."""

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from conftest import MINILM, Family
from triton_embed.kernels.ops import ACTIVATIONS, Ops
from triton_embed.python_backend.inputs.parameters import Item

ops = Ops.on("cpu", torch.float32)

SHAPES = [(1, 8, 3), (20, 384, 1152), (300, 96, 40), (513, 33, 64)]  # tokens, inputs, outputs


def random_layer(tokens: int, inputs: int, outputs: int) -> tuple[torch.Tensor, ...]:
    """Create x, weight and bias, with magnitudes that vary widely between tokens and between outputs."""
    torch.manual_seed(tokens)
    x = torch.randn(tokens, inputs) * torch.logspace(-3, 3, tokens)[:, None]
    return x, torch.randn(outputs, inputs) * torch.logspace(-2, 2, outputs)[:, None], torch.randn(outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_error_is_bounded(shape: tuple[int, int, int], biased: bool, dtype: torch.dtype) -> None:
    """Check the error: each factor is rounded independently, by at most 1/254 of the largest in its row."""
    x, weight, bias = random_layer(*shape)
    x = x.to(dtype)
    packed = ops.pack_linear(weight, in_int8=True)
    result = ops.linear(x, packed, bias if biased else None)
    exact = x.double() @ weight.double().t()
    assert result.dtype == dtype
    bound = x.double().abs().amax(1)[:, None] * weight.double().abs().amax(1) / 254
    bound = bound * shape[1] ** 0.5 * 3 + (exact + bias * biased).abs() / 128
    assert ((result - exact - bias * biased).abs() <= bound).all()
    assert packed.shape == weight.shape


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activation_is_applied_to_the_product(act: str) -> None:
    x, weight, bias = random_layer(30, 64, 32)
    packed = ops.pack_linear(weight, in_int8=True)
    plain = ops.linear(x, packed, bias)
    assert torch.equal(ops.linear(x, packed, bias, act), ops.activation(plain.clone(), act))


def test_token_is_independent_of_its_neighbors() -> None:
    x, weight, bias = random_layer(600, 96, 40)
    packed = ops.pack_linear(weight, in_int8=True)
    batched = ops.linear(x, packed, bias)
    for i in (0, 255, 256, 599):
        assert torch.equal(ops.linear(x[i : i + 1], packed, bias)[0], batched[i])


def test_zero_input_and_weight_give_the_bias() -> None:
    packed = ops.pack_linear(torch.zeros(5, 16), in_int8=True)
    assert torch.equal(ops.linear(torch.zeros(3, 16), packed, torch.arange(5.0)), torch.arange(5.0).expand(3, 5))


def test_minilm_stays_close_to_fp32() -> None:
    reference = SentenceTransformer(str(MINILM), device="cpu")
    family = Family("minilm", MINILM, dtype="int8")
    texts = [f"{word} are {other} than {word}s of {i}" for i, (word, other) in enumerate([("cats", "smaller")] * 9)]
    texts += ["One word", "The quick brown fox jumps over the lazy dog. " * 12]
    result = family.embedder.embed(family.rows(*map(Item, texts)), [384] * len(texts))
    cosines = (result * reference.encode(texts, normalize_embeddings=True)).sum(1)
    assert family.embedder.computes_in == "int8"
    assert cosines.min() > 0.985
    assert not np.allclose(cosines, 1, atol=1e-5)  # int8 was really used
