"""Vector formats: truncation and quantization, compared with torch and sentence-transformers."""

import base64
import json
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sentence_transformers.util.quantization import quantize_embeddings

from triton_embed.gateway.api.vector_formats import VectorFormat, quantize, truncate


def unit_vectors(rows: int, size: int, seed: int = 0) -> np.ndarray[Any, Any]:
    vectors = np.random.default_rng(seed).standard_normal((rows, size))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype("<f4")


@pytest.mark.parametrize("size", [1, 3, 16, 63, 64])
def test_truncated_vector_is_normalized_again(size: int) -> None:
    vectors = unit_vectors(5, 64)
    expected = torch.nn.functional.normalize(torch.tensor(vectors, dtype=torch.float64)[:, :size], dim=1)
    assert np.allclose(truncate(vectors, size), expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("size", [8, 384, 1024])
@pytest.mark.parametrize("precision", ["binary", "ubinary"])
def test_bits_equal_those_of_sentence_transformers(rows: int, size: int, precision: str) -> None:
    vectors = unit_vectors(rows, size)
    vectors[:, ::3] = 0
    values, scales = quantize(vectors, precision)
    expected = quantize_embeddings(vectors, precision=precision)
    assert scales is None
    assert (values.dtype, values.tolist()) == (expected.dtype, expected.tolist())


def test_padding_bits_are_zero() -> None:
    values, _ = quantize(np.array([[1, -1, 1, -1, 1, -1, 1, -1, 1, 1]], np.float32), "ubinary")
    assert values.tolist() == [[0b10101010, 0b11000000]]


@pytest.mark.parametrize(("precision", "zero"), [("int8", 0), ("uint8", 128)])
@given(vectors=arrays(np.float32, (3, 7), elements=st.floats(-1, 1, width=32)))
def test_quantized_values_are_within_half_a_step(precision: str, zero: int, vectors: np.ndarray[Any, Any]) -> None:
    values, scales = quantize(vectors, precision)
    assert scales is not None
    restored = (values.astype(np.float64) - zero) * scales[:, None].astype(np.float64)
    assert (np.abs(restored - vectors) <= scales[:, None] * 0.5001 + 1e-30).all()


def test_int8_preserves_cosines() -> None:
    vectors = unit_vectors(60, 1024)
    values = quantize(vectors, "int8")[0].astype(np.float64)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    exact = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    assert np.abs(values @ values.T - exact).max() < 2e-3


@pytest.mark.parametrize("dtype", ["float", "int8", "uint8", "binary", "ubinary"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sizes", [(), (8,), (8, 16, 3)])
def test_every_format_is_json(dtype: str, packed: bool, sizes: tuple[int, ...]) -> None:
    vectors = unit_vectors(2, 16)
    values, scales = VectorFormat(packed, dtype, sizes, len(sizes) > 1).encode(vectors)
    rows = json.loads(orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY))
    assert len(rows) == 2
    for i, row in enumerate(rows):
        encoded = row if len(sizes) > 1 else [row]
        for vector, size in zip(encoded, sizes or (16,), strict=True):
            if dtype == "float" and packed:
                vector = np.frombuffer(base64.b64decode(vector), "<f4").tolist()
            expected = truncate(vectors, size)[i : i + 1]
            if dtype != "float":
                expected = quantize(expected, dtype)[0]
            assert np.allclose(vector, expected[0], atol=1e-7)
    assert (scales is None) == (dtype not in ("int8", "uint8"))
    assert np.shape(scales) in ((), (2,), (2, 3))
