"""How vectors are written: cut as transformers' users cut them, packed as sentence-transformers packs them."""

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

from triton_embed.gateway.forms import Form, cut, quantise


def unit(rows: int, size: int, seed: int = 0) -> np.ndarray[Any, Any]:
    vectors = np.random.default_rng(seed).standard_normal((rows, size))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype("<f4")


@pytest.mark.parametrize("size", [1, 3, 16, 63, 64])
def test_a_cut_vector_is_the_first_values_normalised_again(size: int) -> None:
    vectors = unit(5, 64)
    expected = torch.nn.functional.normalize(torch.tensor(vectors, dtype=torch.float64)[:, :size], dim=1)
    assert np.allclose(cut(vectors, size), expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("size", [8, 384, 1024])
@pytest.mark.parametrize("precision", ["binary", "ubinary"])
def test_bits_are_those_of_sentence_transformers(rows: int, size: int, precision: str) -> None:
    vectors = unit(rows, size)
    vectors[:, ::3] = 0
    values, scales = quantise(vectors, precision)
    expected = quantize_embeddings(vectors, precision=precision)
    assert scales is None
    assert (values.dtype, values.tolist()) == (expected.dtype, expected.tolist())


def test_bits_beyond_the_last_are_zero() -> None:
    values, _ = quantise(np.array([[1, -1, 1, -1, 1, -1, 1, -1, 1, 1]], np.float32), "ubinary")
    assert values.tolist() == [[0b10101010, 0b11000000]]


@pytest.mark.parametrize(("precision", "zero"), [("int8", 0), ("uint8", 128)])
@given(vectors=arrays(np.float32, (3, 7), elements=st.floats(-1, 1, width=32)))
def test_small_integers_are_the_floats_to_half_a_step(precision: str, zero: int, vectors: np.ndarray[Any, Any]) -> None:
    values, scales = quantise(vectors, precision)
    assert scales is not None
    back = (values.astype(np.float64) - zero) * scales[:, None].astype(np.float64)
    assert (np.abs(back - vectors) <= scales[:, None] * 0.5001 + 1e-30).all()


def test_cosines_survive_small_integers() -> None:
    vectors = unit(60, 1024)
    values = quantise(vectors, "int8")[0].astype(np.float64)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    exact = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    assert np.abs(values @ values.T - exact).max() < 2e-3


@pytest.mark.parametrize("dtype", ["float", "int8", "uint8", "binary", "ubinary"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sizes", [(), (8,), (8, 16, 3)])
def test_every_form_is_json(dtype: str, packed: bool, sizes: tuple[int, ...]) -> None:
    vectors = unit(2, 16)
    values, scales = Form(packed, dtype, sizes, len(sizes) > 1).of(vectors)
    rows = json.loads(orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY))
    assert len(rows) == 2
    for i, row in enumerate(rows):
        written = row if len(sizes) > 1 else [row]
        for found, size in zip(written, sizes or (16,), strict=True):
            if dtype == "float" and packed:
                found = np.frombuffer(base64.b64decode(found), "<f4").tolist()
            expected = cut(vectors, size)[i : i + 1]
            if dtype != "float":
                expected = quantise(expected, dtype)[0]
            assert np.allclose(found, expected[0], atol=1e-7)
    assert (scales is None) == (dtype not in ("int8", "uint8"))
    assert np.shape(scales) in ((), (2,), (2, 3))
