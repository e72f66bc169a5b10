"""The dtype that a CPU computes in: vectors are compared with transformers and sentence-transformers."""

import logging
import random
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from checkpoints import CASES, FAMILIES
from oracles import expected_answer
from sentence_transformers import SentenceTransformer
from test_vectors import items_of, png

from conftest import MINILM, Family
from triton_embed.kernels.cpu import backend as looped
from triton_embed.kernels.ops import Ops
from triton_embed.python_backend.errors import ConfigError
from triton_embed.python_backend.execution import embedder, precision
from triton_embed.python_backend.inputs.parameters import Item

Tiny = Callable[[str], Family]
FIRST_CASES = [next(case.name for case in CASES if case.family == family) for family in FAMILIES]
FAST = pytest.mark.skipif(
    not Path("/proc/cpuinfo").read_text().count("avx512_bf16"), reason="this CPU does not multiply bf16"
)


def in_dtype(ours: Family, dtype: str) -> Family:
    """Return the same family and checkpoint with another dtype."""
    parameters = {"min_image_tokens": str(ours.serving.min_image_tokens), "pooling": ours.serving.pooling}
    parameters |= {"max_image_tokens": str(ours.serving.max_image_tokens)}
    return Family(ours.serving.name, ours.directory, dtype=dtype, **parameters)


def cosines(vectors: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Return the cosine of each row of `vectors` [n, d] with the same row of `references` [n, d]."""
    vectors, references = vectors.astype(np.float64), references.astype(np.float64)
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(references, axis=1)
    return np.asarray((vectors * references).sum(axis=1) / norms)


def test_dtype_depends_on_the_cpu_flags() -> None:
    flags = Path("/proc/cpuinfo").read_text()
    expected = torch.bfloat16 if re.search("avx512_bf16|amx_bf16", flags) else torch.float32
    assert precision.fast_dtype() == expected


@pytest.mark.parametrize("name", FIRST_CASES)
def test_auto_serves_correct_vectors(name: str, tiny: Tiny) -> None:
    """Check both outcomes: random networks lose more in bf16 than trained ones, and some fall back to fp32."""
    case = next(case for case in CASES if case.name == name)
    ours = in_dtype(tiny(name), "auto")
    items = items_of(case.family)[:16]
    rows = ours.rows(*(Item(i.get("text", ""), tuple(map(png, i.get("images", ())))) for i in items))
    vectors = ours.embedder.embed(rows, [ours.model.dimensions] * len(rows))
    lowest = cosines(vectors, expected_answer(case, ours.directory, items).vectors).min()
    assert lowest > (0.995 if ours.embedder.dtype == torch.bfloat16 else 0.99999)


@FAST
def test_bf16_is_compared_with_fp32_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare both vectors of the load-time check with transformers; only those in bf16 may differ."""
    compared: list[np.ndarray] = []
    compare = embedder._min_cosine

    def record(in_bf16: np.ndarray, in_fp32: np.ndarray) -> float:
        compared.extend((in_bf16, in_fp32))
        return compare(in_bf16, in_fp32)

    monkeypatch.setattr(embedder, "_min_cosine", record)
    ours = Family("minilm", MINILM, dtype="auto").embedder
    samples, sizes = ours._samples()[0]
    theirs = oracles.pooled_vectors(MINILM, [row.ids.tolist() for row in samples], "mean")
    full = [i for i, size in enumerate(sizes) if size == 384]
    in_bf16, in_fp32 = (1 - cosines(vectors[full], theirs[full]) for vectors in compared)
    assert in_fp32.max() < 3e-5
    assert in_bf16.mean() > 1.3 * in_fp32.mean()


@FAST
def test_fp32_residual_is_more_accurate(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = sentences(100)
    ours = Family("minilm", MINILM, dtype="bfloat16")
    rows = ours.rows(*map(Item, texts))
    references = SentenceTransformer(str(MINILM), device="cpu").encode(texts)

    def mean_error() -> float:
        vectors = ours.embedder.embed(rows, [384] * len(rows))
        return float(1 - cosines(vectors, references).mean())

    error = mean_error()
    assert error < 2.5e-5
    monkeypatch.setattr(Ops, "first_residual", lambda _, x: x)
    assert error < 0.8 * mean_error()


@FAST
def test_inaccurate_bf16_falls_back_to_fp32(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compare, first_cosine = embedder._min_cosine, iter([0.5])
    monkeypatch.setattr(embedder, "_min_cosine", lambda *vectors: min(compare(*vectors), next(first_cosine, 1.0)))
    with caplog.at_level(logging.WARNING):
        ours = in_dtype(tiny("bge-bert-cls"), "auto")
        assert ours.embedder.dtype == torch.float32
    assert "falling back to fp32" in caplog.text
    case = next(case for case in CASES if case.name == "bge-bert-cls")
    items = items_of("bge")[:8]
    rows = ours.rows(*(Item(item["text"]) for item in items))
    vectors = ours.embedder.embed(rows, [ours.model.dimensions] * len(rows))
    assert np.abs(vectors - expected_answer(case, ours.directory, items).vectors).max() < 2e-5


@FAST
def test_wrong_cpu_loops_are_refused_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looped.dense_attention, "attention", lambda q, k, v, *_: v.clone())
    with pytest.raises(ConfigError, match="differ from those of plain torch; set the parameter kernels to reference"):
        _ = Family("minilm", MINILM, dtype="auto").embedder


def sentences(count: int) -> list[str]:
    """Return English sentences from the documentation of the standard library."""
    source = Path(sysconfig.get_path("stdlib"), "argparse.py").read_text() + Path(random.__file__).read_text()
    source += Path(sysconfig.get_path("stdlib"), "subprocess.py").read_text()
    matches = re.findall(r"[A-Z][a-z]+(?: [\w',-]+){4,40}[.]", re.sub(r"\s*\n\s*#?\s*", " ", source))
    assert len(matches) >= count
    return matches[:count]


@FAST
def test_minilm_in_bf16_finds_the_same_neighbors() -> None:
    """Check the tolerance of bf16: mean cosine 0.9998, lowest cosine 0.999, 98 of 100 nearest neighbors equal."""
    texts = sentences(200)
    ours = Family("minilm", MINILM, dtype="auto")
    assert ours.embedder.dtype == torch.bfloat16
    rows = ours.rows(*map(Item, texts))
    vectors = np.concatenate([ours.embedder.embed(rows[i : i + 50], [384] * 50) for i in range(0, 200, 50)])
    references = SentenceTransformer(str(MINILM), device="cpu").encode(texts, normalize_embeddings=True)
    assert cosines(vectors, references).mean() >= 0.9998
    assert cosines(vectors, references).min() >= 0.999
    pairs = zip(nearest(vectors), nearest(references), strict=True)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in pairs]) >= 0.98


def nearest(vectors: np.ndarray) -> np.ndarray:
    """Return the indices [n, 10] of the nearest other vectors."""
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, -2)
    return np.argsort(-similar, axis=1)[:, :10]
