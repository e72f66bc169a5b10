"""Tests of texts and ids longer than the model: each chunk has the ids that transformers gives for a part of the text,
and the vector is numpy's weighted mean of transformers' vectors.

The boundaries of the parts are found in the offsets of transformers' tokenizer.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import one_thread  # noqa: F401 - applies to every test here
from test_processors import BGE, CLIP_NEW, CLIP_OLD, E5, GME, GTE, LONG, QWEN3, XLM, family_with, png
from transformers import AutoTokenizer

from conftest import Family
from triton_embed.python_backend.errors import BadRequest
from triton_embed.python_backend.inputs.chunking import combine
from triton_embed.python_backend.inputs.rows import IdRows, ItemRows, RequestRows

Tiny = Callable[[str], Family]
NO_LIMIT = 1_000_000
MEAN = {"long_text": "mean"}
INSTRUCTION = "Find it."
# checkpoint -> (the model's length here, what the official code appends to a text, template of an instruction)
CASES: dict[str, tuple[int, str, str]] = {
    BGE: (23, "", "{instruction}{text}"),
    XLM: (23, "", "{instruction}{text}"),
    E5: (40, "</s>", "Instruct: {instruction}\nQuery: {text}"),
    GTE: (40, "<|endoftext|>", "Instruct: {instruction}\nQuery: {text}"),
    QWEN3: (40, "", "Instruct: {instruction}\nQuery:{text}"),
    GME: (60, "", "{text}"),
    CLIP_OLD: (23, "", "{text}"),
    CLIP_NEW: (23, "", "{text}"),
}
TEXTS = {
    "words": LONG,
    "few spaces": "catdoghill,catdoghill " * 12,
    "Chinese and emoji": "\u4f60\u597d\U0001f642\u4e16\u754c" * 25,
    "letters with accents": "nai\u0308ve cafe\u0301 fa\u00e7ade " * 15,
    "blank in the middle": "the cat " + "\n" * 90 + " the dog",
    "capitals": "THE CAT SAT ON THE MAT. " * 12,
}


def text_rows(family: Family, *texts: str, images: Sequence[Sequence[bytes]] = (), **parameters: Any) -> RequestRows:
    """Return the rows of a request of these texts, as EmbeddingServer reads it."""
    text = np.array([[part.encode()] for part in texts], dtype=np.object_)
    image = np.array([[*row] for row in images], dtype=np.object_) if images else None
    request_rows = ItemRows(family.processor, parameters, text, image, limit=NO_LIMIT)
    with ThreadPoolExecutor(1) as pool:
        request_rows.decode_images(pool)
    request_rows.set_ids(iter(family.processor.tokenizer.encode(request_rows.texts())))
    request_rows.make_rows(NO_LIMIT)
    return request_rows


def id_rows(family: Family, *rows: Sequence[int], limit: int = NO_LIMIT, **parameters: Any) -> RequestRows:
    padded = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int32)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    request_rows = IdRows(family.processor, parameters, padded)
    request_rows.make_rows(limit)
    return request_rows


def embed(family: Family, inputs: RequestRows, dims: int | None = None) -> np.ndarray:
    dims = dims or family.model.dimensions
    rows = inputs.rows
    vectors = family.embedder.embed(rows, [family.model.dimensions if inputs.averaged else dims] * len(rows))
    return inputs.embeddings(vectors, dims)


def vectors_of(name: str, family: Family, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the vectors that transformers computes for these ids."""
    if name in (BGE, XLM):
        return oracles.pooled_vectors(family.directory, rows, "cls")
    if name in (CLIP_OLD, CLIP_NEW):
        return oracles.clip_text_vectors(family.directory, rows)
    if name == GME:
        import torch

        tensors = [torch.tensor([row]) for row in rows]
        inputs = [{"input_ids": tensor, "mm_token_type_ids": torch.zeros_like(tensor)} for tensor in tensors]
        return oracles.gme_vectors(family.directory, inputs)
    return oracles.decoder_vectors(family.directory, rows)


def mean_of(vectors: np.ndarray, weights: Sequence[int], dims: int) -> np.ndarray:
    mean = np.average(vectors, axis=0, weights=weights)[:dims]
    return mean / np.linalg.norm(mean)


@cache
def tokenizer_of(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory)


def find_parts(
    family: Family, name: str, text: str, instruction: str | None, rows: Sequence[Sequence[int]]
) -> list[str]:
    """Find the consecutive parts of a text that transformers' tokenizer encodes as these rows.

    Each part starts at a token boundary, and only white space may be missing between parts.
    """
    tokenizer, (_, end, template) = tokenizer_of(family.directory), CASES[name]
    tail = [tokenizer.convert_tokens_to_ids(end)] if end else []
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    cuts = sorted({0, len(text), *(token_start for token_start, _ in offsets)})

    def encode(part: str) -> list[int]:
        prompted = part if instruction is None else template.format(instruction=instruction, text=part)
        prompted = oracles.gme_text({"text": part, "instruction": instruction}) if name == GME else prompted
        ids: list[int] = tokenizer(prompted)["input_ids"] + tail
        return ids

    def find_end(row: Sequence[int]) -> int | None:
        near = cuts[start + 1 : start + 1 + len(row)]
        return next((cuts.index(cut) for cut in reversed(near) if encode(text[cuts[start] : cut]) == list(row)), None)

    parts, start = [], 0
    for row in rows:
        while (end_cut := find_end(row)) is None:
            assert not text[cuts[start] : cuts[start + 1]].strip(), f"no part at {cuts[start]} is encoded as {row}"
            start += 1
        parts.append(text[cuts[start] : cuts[end_cut]])
        start = end_cut
    assert not text[cuts[start] :].strip()
    return parts


@pytest.mark.parametrize("instruction", [None, INSTRUCTION])
@pytest.mark.parametrize("text", TEXTS.values(), ids=list(TEXTS))
@pytest.mark.parametrize("name", CASES)
def test_vector_of_a_long_text_is_the_mean_of_its_parts(
    name: str, text: str, instruction: str | None, tiny: Tiny
) -> None:
    if instruction and name in (CLIP_OLD, CLIP_NEW):
        instruction = None
    limit, _, _ = CASES[name]
    family = family_with(tiny, name, max_tokens=limit)
    if name in (BGE, XLM, CLIP_OLD, CLIP_NEW):  # these models ignore white space
        text = text.replace("\n", ", ")
    parameters = {} if instruction is None else {"instruction": instruction}
    inputs = text_rows(family, text, **MEAN, **parameters)
    rows = [row.ids.tolist() for row in inputs.rows]
    assert len(rows) > 1
    assert max(map(len, rows)) <= limit
    parts = find_parts(family, name, text, instruction, rows)
    tokenizer = tokenizer_of(family.directory)
    assert all(part.strip() for part in parts)
    weights = [max(1, len(tokenizer(part, add_special_tokens=False)["input_ids"])) for part in parts]
    expected = mean_of(vectors_of(name, family, rows), weights, family.model.dimensions)
    assert np.abs(embed(family, inputs)[0] - expected).max() <= 2e-5
    assert inputs.tokens().tolist() == [[sum(map(len, rows))]]
    assert inputs.dropped().tolist() == [[0]]


@pytest.mark.parametrize("name", [BGE, QWEN3])
def test_chunks_are_as_long_as_the_model_allows(name: str, tiny: Tiny) -> None:
    """Test words whose tokens do not depend on the cut: all chunks but the last are full."""
    family = family_with(tiny, name, max_tokens=23)
    rows = text_rows(family, " ".join(["the cat sat on the mat"] * 20), **MEAN).rows
    assert {len(row.ids) for row in rows[:-1]} == {23}


@pytest.mark.parametrize("dims", [1, 7, 20])
def test_mean_is_truncated_then_normalized(dims: int, tiny: Tiny) -> None:
    family = family_with(tiny, QWEN3, max_tokens=23)
    inputs = text_rows(family, LONG, "hello world", **MEAN)
    rows = [row.ids.tolist() for row in inputs.rows]
    tokenizer = tokenizer_of(family.directory)
    parts = find_parts(family, QWEN3, LONG, None, rows[:-1])
    weights = [len(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in parts]
    expected = oracles.decoder_vectors(family.directory, rows)
    vectors = embed(family, inputs, dims)
    assert vectors.shape == (2, dims)
    assert np.abs(vectors[0] - mean_of(expected[:-1], weights, dims)).max() <= 2e-5
    assert np.abs(vectors[1] - mean_of(expected[-1:], [1], dims)).max() <= 2e-5


@pytest.mark.parametrize("truncate", ["end", "start", "none"])
def test_text_that_fits_is_not_split_and_none_is_truncated(truncate: str, tiny: Tiny) -> None:
    family = family_with(tiny, E5, max_tokens=23)
    plain, mean = (
        text_rows(family, "hello world", **parameters) for parameters in ({}, {**MEAN, "truncate": truncate})
    )
    assert not mean.averaged
    assert [row.ids.tolist() for row in mean.rows] == [row.ids.tolist() for row in plain.rows]
    assert len(text_rows(family, LONG, truncate=truncate, **MEAN).rows) > 1


@pytest.mark.parametrize("name", CASES)
def test_each_chunk_of_long_ids_keeps_the_pooled_ids(name: str, tiny: Tiny) -> None:
    limit = 11
    family = family_with(tiny, name, max_tokens=limit)
    ids = list(range(20, 60))
    if name in (CLIP_OLD, CLIP_NEW):
        ids.append(tokenizer_of(family.directory).convert_tokens_to_ids("<|endoftext|>"))
    first, last = (ids[:1], []) if name in (BGE, XLM) else ([], ids[-1:])
    body = ids[len(first) : len(ids) - len(last)]
    parts = [body[i : i + limit - 1] for i in range(0, len(body), limit - 1)]
    chunks = [[*first, *part, *last] for part in parts]
    inputs = id_rows(family, ids, [30, ids[-1]], **MEAN)
    assert [row.ids.tolist() for row in inputs.rows] == [*chunks, [30, ids[-1]]]
    embedded = embed(family, inputs)
    vectors = vectors_of(name, family, [*chunks, [30, ids[-1]]])
    assert np.abs(embedded[0] - mean_of(vectors[:-1], list(map(len, parts)), family.model.dimensions)).max() <= 2e-5
    assert np.abs(embedded[1] - vectors[-1]).max() <= 2e-5


def test_ids_of_a_mean_pooling_model_are_only_split(tiny: Tiny) -> None:
    from conftest import MINILM

    rows = id_rows(Family("minilm", MINILM, max_tokens="9"), list(range(2000, 2023)), **MEAN).rows
    assert [row.ids.tolist() for row in rows] == [list(range(2000 + i, min(2009 + i, 2023))) for i in (0, 9, 18)]


def test_image_with_a_text_that_is_too_long_is_refused(tiny: Tiny) -> None:
    family = family_with(tiny, GME, max_tokens=60)
    with pytest.raises(BadRequest, match=r"is longer than the model's .* \(60 tokens\).*\(input at index 1"):
        text_rows(family, "a", LONG, images=[[b""], [png(60, 40)]], **MEAN)
    (row,) = text_rows(family, "", images=[[png(60, 40)]], **MEAN).rows
    assert row.images


@pytest.mark.parametrize("words", [7, 9, 60])
@pytest.mark.parametrize("name", [BGE, E5, GTE, QWEN3, GME])
def test_instruction_that_leaves_no_room_is_refused(name: str, words: int, tiny: Tiny) -> None:
    family = family_with(tiny, name, max_tokens=20)
    with pytest.raises(BadRequest) as raised:
        text_rows(family, "a", LONG, on_error="fail", instruction="the cat sat " * words, **MEAN)
    assert "at index" in str(raised.value)
    assert "instruction" in str(raised.value) or "longer than" in str(raised.value)


@pytest.mark.parametrize(("limit", "fits"), [(39, False), (45, False), (46, True)])
def test_token_limit_of_a_request_counts_all_chunks(limit: int, fits: bool, tiny: Tiny) -> None:
    """Split 40 ids into chunks of 6 and repeat the last id in each: 39 ids and 7 times the last one."""
    family = family_with(tiny, E5, max_tokens=7)
    ids = list(range(20, 60))
    if fits:
        assert id_rows(family, ids, limit=limit, **MEAN).tokens().tolist() == [[46]]
        return
    with pytest.raises(BadRequest, match=f"tokens, more than the {limit} a request may have"):
        id_rows(family, ids, limit=limit, **MEAN)


def test_text_beyond_the_token_limit_is_refused_before_splitting(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    family = family_with(tiny, BGE, max_tokens=23)
    monkeypatch.setattr(family.processor.tokenizer, "split_at_tokens", lambda text: pytest.fail("split"))
    inputs = ItemRows(family.processor, MEAN, np.array([[LONG.encode()]], dtype=np.object_), None, limit=NO_LIMIT)
    inputs.set_ids(iter(family.processor.tokenizer.encode(inputs.texts())))
    with pytest.raises(BadRequest, match="tokens, more than the 50 a request may have"):
        inputs.make_rows(50)


def test_splitting_stops_at_the_token_limit(tiny: Tiny) -> None:
    """Count the instruction in every chunk."""
    family, calls = family_with(tiny, BGE, max_tokens=23), 0
    inputs = ItemRows(
        family.processor,
        {**MEAN, "instruction": "the cat the cat the cat the cat the cat "},
        np.array([[b"the cat " * 500]], dtype=np.object_),
        None,
        limit=NO_LIMIT,
    )
    inputs.set_ids(iter(family.processor.tokenizer.encode(inputs.texts())))
    build_row = family.processor.build_row

    def counting_build_row(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return build_row(*arguments)

    family.processor.build_row = counting_build_row  # type: ignore[method-assign]
    with pytest.raises(BadRequest, match="tokens, more than the 1100 a request may have"):
        inputs.make_rows(1100)
    assert calls == 1100 // 23 + 1


ANYTHING = st.text(max_size=200) | st.lists(
    st.sampled_from(
        ["the cat", " hello", "\n", "\u4f60\u597d", "{text}", "\U0001f642", "</s>", "[SEP]", "  ", "x" * 30]
    )
).map("".join)


@settings(deadline=None, max_examples=40)
@given(text=ANYTHING, limit=st.integers(12, 40))
@pytest.mark.parametrize("name", [BGE, XLM, E5, GTE, QWEN3, CLIP_OLD])
def test_any_text_is_split_into_chunks_that_fit(name: str, text: str, limit: int, tiny: Tiny) -> None:
    family = family_with(tiny, name, max_tokens=limit)
    if not text.strip():
        return
    ids = tokenizer_of(family.directory)(text)["input_ids"]
    rows = text_rows(family, text, **MEAN).rows
    assert rows
    assert all(0 < len(row.ids) <= limit for row in rows)
    assert len(rows) == 1 or len(ids) + 1 > limit


@settings(deadline=None)
@given(
    data=st.data(),
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    dims=st.integers(1, 6),
)
def test_mean_equals_numpy(data: st.DataObject, counts: list[int], dims: int) -> None:
    total = sum(counts)
    weights = data.draw(st.lists(st.integers(1, 9_000), min_size=total, max_size=total))
    vectors = np.random.default_rng(total).normal(size=(total, 6)).astype(np.float32)
    means = combine(vectors, weights, counts, dims)
    assert (means.dtype, means.shape) == (np.float32, (len(counts), dims))
    ends = np.cumsum(counts)
    for row, start, end in zip(means, [0, *ends[:-1]], ends, strict=True):
        expected = mean_of(vectors[start:end].astype(np.float64), weights[start:end], dims)
        assert np.abs(row - expected).max() <= 1e-6


def test_vectors_that_cancel_out_give_no_nan() -> None:
    opposite = np.array([[1, 0], [-1, 0]], dtype=np.float32)
    assert combine(opposite, [3, 3], [2], 2).tolist() == [[0, 0]]
