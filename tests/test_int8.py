"""int8 layers against float64, and MiniLM made of them against sentence-transformers."""

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from conftest import MINILM, Family
from triton_embed.kernels import ops
from triton_embed.python_backend.request import Item

SHAPES = [(1, 8, 3), (20, 384, 1152), (300, 96, 40), (513, 33, 64)]  # tokens, inputs, outputs


def drawn(tokens: int, inputs: int, outputs: int) -> tuple[torch.Tensor, ...]:
    """x, weight and bias; tokens and outputs of very different sizes, as they have."""
    torch.manual_seed(tokens)
    x = torch.randn(tokens, inputs) * torch.logspace(-3, 3, tokens)[:, None]
    return x, torch.randn(outputs, inputs) * torch.logspace(-2, 2, outputs)[:, None], torch.randn(outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(shape: tuple[int, int, int], biased: bool, dtype: torch.dtype) -> None:
    """Each factor is rounded to 1/254 of its row's largest at most, independently."""
    x, weight, bias = drawn(*shape)
    x = x.to(dtype)
    packed = ops.pack_linear(weight, in_int8=True)
    found = ops.linear(x, packed, bias if biased else None)
    exact = x.double() @ weight.double().t()
    assert found.dtype == dtype
    bound = x.double().abs().amax(1)[:, None] * weight.double().abs().amax(1) / 254
    bound = bound * shape[1] ** 0.5 * 3 + (exact + bias * biased).abs() / 128
    assert ((found - exact - bias * biased).abs() <= bound).all()
    assert packed.shape == weight.shape


@pytest.mark.parametrize("act", ops.ACTIVATIONS)
def test_activations(act: str) -> None:
    x, weight, bias = drawn(30, 64, 32)
    packed = ops.pack_linear(weight, in_int8=True)
    plain = ops.linear(x, packed, bias)
    assert torch.equal(ops.linear(x, packed, bias, act), ops.activation(plain.clone(), act))


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    x, weight, bias = drawn(600, 96, 40)
    packed = ops.pack_linear(weight, in_int8=True)
    together = ops.linear(x, packed, bias)
    for i in (0, 255, 256, 599):
        assert torch.equal(ops.linear(x[i : i + 1], packed, bias)[0], together[i])


def test_nothing_of_nothing() -> None:
    packed = ops.pack_linear(torch.zeros(5, 16), in_int8=True)
    assert torch.equal(ops.linear(torch.zeros(3, 16), packed, torch.arange(5.0)), torch.arange(5.0).expand(3, 5))


def test_minilm() -> None:
    theirs = SentenceTransformer(str(MINILM), device="cpu")
    ours = Family("minilm", MINILM, dtype="int8")
    texts = [f"{word} are {other} than {word}s of {i}" for i, (word, other) in enumerate([("cats", "smaller")] * 9)]
    texts += ["One word", "The quick brown fox jumps over the lazy dog. " * 12]
    found = ours.embedder.embed(ours.rows(*map(Item, texts)), [384] * len(texts))
    cosines = (found * theirs.encode(texts, normalize_embeddings=True)).sum(1)
    assert ours.embedder.computes_in == "int8"
    assert cosines.min() > 0.985
    assert not np.allclose(cosines, 1, atol=1e-5)  # it is int8 indeed
