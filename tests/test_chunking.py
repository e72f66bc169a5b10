"""Texts and ids longer than the model: each chunk is what transformers makes of a piece of the text sent alone, and the
vector is numpy's weighted mean of transformers' vectors.

Where the pieces meet is looked up in the offsets of transformers' tokenizer.
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
MANY = 1_000_000
MEAN = {"long_text": "mean"}
FIND = "Find it."
# checkpoint -> the model's length here, what the official code puts behind a text, how an instruction is written
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


def inputs_of(family: Family, *texts: str, images: Sequence[Sequence[bytes]] = (), **parameters: Any) -> RequestRows:
    """A request of these texts, read as EmbeddingServer reads it."""
    text = np.array([[one.encode()] for one in texts], dtype=np.object_)
    image = np.array([[*row] for row in images], dtype=np.object_) if images else None
    found = ItemRows(family.processor, parameters, text, image)
    with ThreadPoolExecutor(1) as pool:
        found.decode_images(pool)
    found.set_ids(iter(family.processor.tokenizer.encode(found.texts())))
    found.make_rows(MANY)
    return found


def ids_of(family: Family, *rows: Sequence[int], limit: int = MANY, **parameters: Any) -> RequestRows:
    sent = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int32)
    for row, ids in zip(sent, rows, strict=True):
        row[: len(ids)] = ids
    found = IdRows(family.processor, parameters, sent)
    found.make_rows(limit)
    return found


def embed(family: Family, inputs: RequestRows, dims: int | None = None) -> np.ndarray:
    dims = dims or family.model.dimensions
    rows = inputs.rows
    vectors = family.embedder.embed(rows, [family.model.dimensions if inputs.averaged else dims] * len(rows))
    return inputs.embeddings(vectors, dims)


def vectors_of(name: str, family: Family, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """transformers' vectors of these ids."""
    if name in (BGE, XLM):
        return oracles.encoder_vectors(family.directory, rows, "cls")
    if name in (CLIP_OLD, CLIP_NEW):
        return oracles.clip_text_vectors(family.directory, rows)
    if name == GME:
        import torch

        tensors = [torch.tensor([row]) for row in rows]
        inputs = [{"input_ids": one, "mm_token_type_ids": torch.zeros_like(one)} for one in tensors]
        return oracles.gme_vectors(family.directory, inputs)
    return oracles.decoder_vectors(family.directory, rows)


def mean_of(vectors: np.ndarray, weights: Sequence[int], dims: int) -> np.ndarray:
    found = np.average(vectors, axis=0, weights=weights)[:dims]
    return found / np.linalg.norm(found)


@cache
def tokenizer_of(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory)


def find_pieces(
    family: Family, name: str, text: str, instruction: str | None, rows: Sequence[Sequence[int]]
) -> list[str]:
    """The pieces of the text that transformers' tokenizer turns into these rows, one after the other.

    Each begins where a token does, and nothing but white space is left out between them.
    """
    tokenizer, (_, end, template) = tokenizer_of(family.directory), CASES[name]
    tail = [tokenizer.convert_tokens_to_ids(end)] if end else []
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    cuts = sorted({0, len(text), *(start for start, _ in offsets)})

    def written(piece: str) -> list[int]:
        whole = piece if instruction is None else template.format(instruction=instruction, text=piece)
        whole = oracles.gme_text({"text": piece, "instruction": instruction}) if name == GME else whole
        found: list[int] = tokenizer(whole)["input_ids"] + tail
        return found

    def stop(row: Sequence[int]) -> int | None:
        near = cuts[begin + 1 : begin + 1 + len(row)]
        return next((cuts.index(cut) for cut in reversed(near) if written(text[cuts[begin] : cut]) == list(row)), None)

    found, begin = [], 0
    for row in rows:
        while (ended := stop(row)) is None:
            assert not text[cuts[begin] : cuts[begin + 1]].strip(), f"no piece at {cuts[begin]} becomes {row}"
            begin += 1
        found.append(text[cuts[begin] : cuts[ended]])
        begin = ended
    assert not text[cuts[begin] :].strip()
    return found


@pytest.mark.parametrize("instruction", [None, FIND])
@pytest.mark.parametrize("text", TEXTS.values(), ids=list(TEXTS))
@pytest.mark.parametrize("name", CASES)
def test_a_long_text_is_the_mean_of_its_pieces(name: str, text: str, instruction: str | None, tiny: Tiny) -> None:
    if instruction and name in (CLIP_OLD, CLIP_NEW):
        instruction = None
    limit, _, _ = CASES[name]
    family = family_with(tiny, name, max_tokens=limit)
    if name in (BGE, XLM, CLIP_OLD, CLIP_NEW):  # which see no white space
        text = text.replace("\n", ", ")
    parameters = {} if instruction is None else {"instruction": instruction}
    inputs = inputs_of(family, text, **MEAN, **parameters)
    rows = [row.ids.tolist() for row in inputs.rows]
    assert len(rows) > 1
    assert max(map(len, rows)) <= limit
    pieces = find_pieces(family, name, text, instruction, rows)
    tokenizer = tokenizer_of(family.directory)
    assert all(piece.strip() for piece in pieces)
    weights = [max(1, len(tokenizer(piece, add_special_tokens=False)["input_ids"])) for piece in pieces]
    wanted = mean_of(vectors_of(name, family, rows), weights, family.model.dimensions)
    assert np.abs(embed(family, inputs)[0] - wanted).max() <= 2e-5
    assert inputs.tokens().tolist() == [[sum(map(len, rows))]]
    assert inputs.dropped().tolist() == [[0]]


@pytest.mark.parametrize("name", [BGE, QWEN3])
def test_chunks_are_as_long_as_the_model_takes(name: str, tiny: Tiny) -> None:
    """Words that stay what they are wherever a text is cut: all but the last chunk are full."""
    family = family_with(tiny, name, max_tokens=23)
    rows = inputs_of(family, " ".join(["the cat sat on the mat"] * 20), **MEAN).rows
    assert {len(row.ids) for row in rows[:-1]} == {23}


@pytest.mark.parametrize("dims", [1, 7, 20])
def test_the_mean_is_cut_and_normalised_after_it_was_made(dims: int, tiny: Tiny) -> None:
    family = family_with(tiny, QWEN3, max_tokens=23)
    inputs = inputs_of(family, LONG, "hello world", **MEAN)
    rows = [row.ids.tolist() for row in inputs.rows]
    tokenizer = tokenizer_of(family.directory)
    pieces = find_pieces(family, QWEN3, LONG, None, rows[:-1])
    weights = [len(tokenizer(piece, add_special_tokens=False)["input_ids"]) for piece in pieces]
    wanted = oracles.decoder_vectors(family.directory, rows)
    found = embed(family, inputs, dims)
    assert found.shape == (2, dims)
    assert np.abs(found[0] - mean_of(wanted[:-1], weights, dims)).max() <= 2e-5
    assert np.abs(found[1] - mean_of(wanted[-1:], [1], dims)).max() <= 2e-5


@pytest.mark.parametrize("truncate", ["end", "start", "none"])
def test_a_text_that_fits_is_left_alone_and_nothing_is_ever_cut(truncate: str, tiny: Tiny) -> None:
    family = family_with(tiny, E5, max_tokens=23)
    plain, mean = (inputs_of(family, "hello world", **more) for more in ({}, {**MEAN, "truncate": truncate}))
    assert not mean.averaged
    assert [row.ids.tolist() for row in mean.rows] == [row.ids.tolist() for row in plain.rows]
    assert len(inputs_of(family, LONG, truncate=truncate, **MEAN).rows) > 1


@pytest.mark.parametrize("name", CASES)
def test_long_ids_keep_what_is_pooled_in_each_chunk(name: str, tiny: Tiny) -> None:
    limit = 11
    family = family_with(tiny, name, max_tokens=limit)
    ids = list(range(20, 60))
    if name in (CLIP_OLD, CLIP_NEW):
        ids.append(tokenizer_of(family.directory).convert_tokens_to_ids("<|endoftext|>"))
    first, last = (ids[:1], []) if name in (BGE, XLM) else ([], ids[-1:])
    body = ids[len(first) : len(ids) - len(last)]
    parts = [body[i : i + limit - 1] for i in range(0, len(body), limit - 1)]
    wanted = [[*first, *part, *last] for part in parts]
    inputs = ids_of(family, ids, [30, ids[-1]], **MEAN)
    assert [row.ids.tolist() for row in inputs.rows] == [*wanted, [30, ids[-1]]]
    found = embed(family, inputs)
    vectors = vectors_of(name, family, [*wanted, [30, ids[-1]]])
    assert np.abs(found[0] - mean_of(vectors[:-1], list(map(len, parts)), family.model.dimensions)).max() <= 2e-5
    assert np.abs(found[1] - vectors[-1]).max() <= 2e-5


def test_ids_of_a_model_that_pools_all_are_split_and_nothing_else(tiny: Tiny) -> None:
    from conftest import MINILM

    rows = ids_of(Family("minilm", MINILM, max_tokens="9"), list(range(2000, 2023)), **MEAN).rows
    assert [row.ids.tolist() for row in rows] == [list(range(2000 + i, min(2009 + i, 2023))) for i in (0, 9, 18)]


def test_a_picture_beside_a_text_that_is_too_long(tiny: Tiny) -> None:
    family = family_with(tiny, GME, max_tokens=60)
    with pytest.raises(BadRequest, match=r"is longer than the model's .* \(60 tokens\).*\(input at index 1"):
        inputs_of(family, "a", LONG, images=[[b""], [png(60, 40)]], **MEAN)
    (row,) = inputs_of(family, "", images=[[png(60, 40)]], **MEAN).rows
    assert row.pictures


@pytest.mark.parametrize("words", [7, 9, 60])
@pytest.mark.parametrize("name", [BGE, E5, GTE, QWEN3, GME])
def test_an_instruction_that_leaves_no_room(name: str, words: int, tiny: Tiny) -> None:
    family = family_with(tiny, name, max_tokens=20)
    with pytest.raises(BadRequest) as refused:
        inputs_of(family, "a", LONG, on_error="fail", instruction="the cat sat " * words, **MEAN)
    assert "at index" in str(refused.value)
    assert "instruction" in str(refused.value) or "longer than" in str(refused.value)


@pytest.mark.parametrize(("limit", "fits"), [(39, False), (45, False), (46, True)])
def test_a_request_has_so_many_tokens_in_all_its_chunks(limit: int, fits: bool, tiny: Tiny) -> None:
    """40 ids in chunks of 6: 39 in all but the last and 7 times the last."""
    family = family_with(tiny, E5, max_tokens=7)
    ids = list(range(20, 60))
    if fits:
        assert ids_of(family, ids, limit=limit, **MEAN).tokens().tolist() == [[46]]
        return
    with pytest.raises(BadRequest, match=f"tokens, more than the {limit} a request may have"):
        ids_of(family, ids, limit=limit, **MEAN)


def test_a_text_far_beyond_what_a_request_may_have_is_refused_before_it_is_split(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = family_with(tiny, BGE, max_tokens=23)
    monkeypatch.setattr(family.processor.tokenizer, "split_at_tokens", lambda text: pytest.fail("split"))
    inputs = ItemRows(family.processor, MEAN, np.array([[LONG.encode()]], dtype=np.object_), None)
    inputs.set_ids(iter(family.processor.tokenizer.encode(inputs.texts())))
    with pytest.raises(BadRequest, match="tokens, more than the 50 a request may have"):
        inputs.make_rows(50)


def test_splitting_stops_once_the_request_has_too_many_tokens(tiny: Tiny) -> None:
    """An instruction multiplies: it is in every chunk."""
    family, calls = family_with(tiny, BGE, max_tokens=23), 0
    inputs = ItemRows(
        family.processor,
        {**MEAN, "instruction": "the cat the cat the cat the cat the cat "},
        np.array([[b"the cat " * 500]], dtype=np.object_),
        None,
    )
    inputs.set_ids(iter(family.processor.tokenizer.encode(inputs.texts())))
    real = family.processor.build_row

    def row(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return real(*arguments)

    family.processor.build_row = row  # type: ignore[method-assign]
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
def test_any_text_becomes_chunks_that_fit(name: str, text: str, limit: int, tiny: Tiny) -> None:
    family = family_with(tiny, name, max_tokens=limit)
    if not text.strip():
        return
    whole = tokenizer_of(family.directory)(text)["input_ids"]
    rows = inputs_of(family, text, **MEAN).rows
    assert rows
    assert all(0 < len(row.ids) <= limit for row in rows)
    assert len(rows) == 1 or len(whole) + 1 > limit


@settings(deadline=None)
@given(
    data=st.data(),
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    dims=st.integers(1, 6),
)
def test_the_mean_is_numpys(data: st.DataObject, counts: list[int], dims: int) -> None:
    total = sum(counts)
    weights = data.draw(st.lists(st.integers(1, 9_000), min_size=total, max_size=total))
    vectors = np.random.default_rng(total).normal(size=(total, 6)).astype(np.float32)
    found = combine(vectors, weights, counts, dims)
    assert (found.dtype, found.shape) == (np.float32, (len(counts), dims))
    ends = np.cumsum(counts)
    for row, start, end in zip(found, [0, *ends[:-1]], ends, strict=True):
        wanted = mean_of(vectors[start:end].astype(np.float64), weights[start:end], dims)
        assert np.abs(row - wanted).max() <= 1e-6


def test_vectors_that_cancel_out_are_no_nan() -> None:
    opposite = np.array([[1, 0], [-1, 0]], dtype=np.float32)
    assert combine(opposite, [3, 3], [2], 2).tolist() == [[0, 0]]
