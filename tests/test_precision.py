"""What a CPU computes in: transformers' and sentence-transformers' vectors say whether it was right."""

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
from checkpoints import CASES
from sentence_transformers import SentenceTransformer
from test_vectors import expected, items_of, png

from conftest import MINILM, Family
from triton_embed.kernels import ops
from triton_embed.kernels.cpu import backend as looped
from triton_embed.python_backend.errors import ConfigError
from triton_embed.python_backend.execution import embedder, precision
from triton_embed.python_backend.inputs.parameters import Item

Tiny = Callable[[str], Family]
FAMILIES = (
    "bge-bert-cls",
    "e5_mistral-mistral-window",
    "gte_qwen2-bidirectional",
    "qwen3_embedding-bare",
    "clip-openai",
    "gme_qwen2_vl-hub",
)
FAST = pytest.mark.skipif(
    not Path("/proc/cpuinfo").read_text().count("avx512_bf16"), reason="this CPU does not multiply bf16"
)


def in_dtype(ours: Family, dtype: str) -> Family:
    stated = {"min_image_tokens": str(ours.serving.min_image_tokens), "pooling": ours.serving.pooling}
    stated |= {"max_image_tokens": str(ours.serving.max_image_tokens)}
    return Family(ours.serving.name, ours.directory, dtype=dtype, **stated)


def cosines(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
    return np.asarray((found * wanted).sum(axis=1) / norms)


def test_the_flags_of_the_cpu_decide() -> None:
    flags = Path("/proc/cpuinfo").read_text()
    wanted = torch.bfloat16 if re.search("avx512_bf16|amx_bf16", flags) else torch.float32
    assert precision.fast_dtype() == wanted


@pytest.mark.parametrize("name", FAMILIES)
def test_auto_serves_right_vectors(name: str, tiny: Tiny) -> None:
    """Random networks lose more to bf16 than trained ones; those that lose too much are served in fp32."""
    case = next(case for case in CASES if case.name == name)
    ours = in_dtype(tiny(name), "auto")
    items = items_of(case.family)[:16]
    rows = ours.rows(*(Item(i.get("text", ""), tuple(map(png, i.get("images", ())))) for i in items))
    found = ours.embedder.embed(rows, [ours.model.dimensions] * len(rows))
    least = cosines(found, expected(case, ours.directory, items).vectors).min()
    assert least > (0.995 if ours.embedder.dtype == torch.bfloat16 else 0.99999)


@FAST
def test_what_bf16_is_compared_with_is_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' vectors of the same random rows, but for the rounding of the weights."""
    seen: list[np.ndarray] = []
    compare = embedder._min_cosine

    def spy(found: np.ndarray, wanted: np.ndarray) -> float:
        seen.extend((found, wanted))
        return compare(found, wanted)

    monkeypatch.setattr(embedder, "_min_cosine", spy)
    ours = Family("minilm", MINILM, dtype="auto").embedder
    samples, sizes = ours._samples()[0]
    theirs = oracles.encoder_vectors(MINILM, [row.ids.tolist() for row in samples], "mean")
    whole = [i for i, size in enumerate(sizes) if size == 384]
    in_bf16, in_fp32 = (1 - cosines(vectors[whole], theirs[whole]) for vectors in seen)
    assert in_fp32.max() < 3e-5
    assert in_bf16.mean() > 1.3 * in_fp32.mean()


@FAST
def test_a_residual_in_fp32_is_nearer_to_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = sentences(100)
    ours = Family("minilm", MINILM, dtype="bfloat16")
    rows = ours.rows(*map(Item, texts))
    truth = SentenceTransformer(str(MINILM), device="cpu").encode(texts)

    def lost() -> float:
        found = ours.embedder.embed(rows, [384] * len(rows))
        return float(1 - cosines(found, truth).mean())

    kept = lost()
    assert kept < 2.5e-5
    monkeypatch.setattr(ops, "residual", lambda x: x)
    assert kept < 0.8 * lost()


@FAST
def test_bf16_that_loses_too_much_is_not_served(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compare, lost = embedder._min_cosine, iter([0.5])
    monkeypatch.setattr(embedder, "_min_cosine", lambda *vectors: min(compare(*vectors), next(lost, 1.0)))
    with caplog.at_level(logging.WARNING):
        ours = in_dtype(tiny("bge-bert-cls"), "auto")
        assert ours.embedder.dtype == torch.float32
    assert "falling back to fp32" in caplog.text
    case = next(case for case in CASES if case.name == "bge-bert-cls")
    items = items_of("bge")[:8]
    rows = ours.rows(*(Item(item["text"]) for item in items))
    found = ours.embedder.embed(rows, [ours.model.dimensions] * len(rows))
    assert np.abs(found - expected(case, ours.directory, items).vectors).max() < 2e-5


@FAST
def test_loops_that_this_cpu_gets_wrong_are_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looped.dense_attention, "attention", lambda q, k, v, *_: v.clone())
    with pytest.raises(ConfigError, match="differ from those of plain torch; set the parameter kernels to reference"):
        _ = Family("minilm", MINILM, dtype="auto").embedder


def sentences(count: int) -> list[str]:
    """English, of the standard library's documentation."""
    source = Path(sysconfig.get_path("stdlib"), "argparse.py").read_text() + Path(random.__file__).read_text()
    source += Path(sysconfig.get_path("stdlib"), "subprocess.py").read_text()
    found = re.findall(r"[A-Z][a-z]+(?: [\w',-]+){4,40}[.]", re.sub(r"\s*\n\s*#?\s*", " ", source))
    assert len(found) >= count
    return found[:count]


@FAST
def test_minilm_in_bf16_finds_the_same_neighbours() -> None:
    """The tolerance bf16 has: cosines of 0.9998 on average and 0.999 at least, 99 of 100 neighbours the same."""
    texts = sentences(200)
    ours = Family("minilm", MINILM, dtype="auto")
    assert ours.embedder.dtype == torch.bfloat16
    rows = ours.rows(*map(Item, texts))
    found = np.concatenate([ours.embedder.embed(rows[i : i + 50], [384] * 50) for i in range(0, 200, 50)])
    wanted = SentenceTransformer(str(MINILM), device="cpu").encode(texts, normalize_embeddings=True)
    assert cosines(found, wanted).mean() >= 0.9998
    assert cosines(found, wanted).min() >= 0.999
    theirs, same = nearest(wanted), nearest(found)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(same, theirs, strict=True)]) >= 0.98


def nearest(vectors: np.ndarray) -> np.ndarray:
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, -2)
    return np.argsort(-similar, axis=1)[:, :10]
