"""The rows of one request: with on_error "report" a bad one harms no other, and IDS are what transformers makes of it.

Vectors of good rows are compared with those of the same rows sent alone, whose own oracles are in test_chunking.py and
test_vectors.py.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chunking import tokenizer_of
from test_ops import one_thread  # noqa: F401 - applies to every test here
from test_processors import BGE, CLIP_NEW, E5, GME, LONG, QWEN3, family_with, png

from conftest import Family
from triton_embed.python_backend.errors import BadRequest
from triton_embed.python_backend.inputs import rows as inputs_file
from triton_embed.python_backend.inputs.rows import IdRows, ItemRows, RequestRows

Tiny = Callable[[str], Family]
REPORT = {"on_error": "report"}
Sent = tuple[bytes, tuple[bytes, ...]]  # a row of TEXT and IMAGE


def asked(family: Family, *rows: Sent, **parameters: Any) -> RequestRows:
    """A request as EmbeddingServer reads it, up to the ids of its texts."""
    width = max([1, *(len(images) for _, images in rows)])
    text = np.array([[text] for text, _ in rows], dtype=np.object_).reshape(len(rows), 1)
    image = np.array([[*images, *[b""] * (width - len(images))] for _, images in rows], dtype=np.object_)
    found = ItemRows(family.processor, parameters, text, image.reshape(len(rows), width))
    found.set_ids(iter(family.processor.tokenizer.encode(found.texts())))
    return found


def answered(family: Family, inputs: RequestRows, dims: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """EMBEDDING, TOKENS, DROPPED and ERROR; nothing is computed where there is nothing to compute."""
    if isinstance(inputs, ItemRows):
        with ThreadPoolExecutor(1) as pool:
            inputs.decode_images(pool)
    inputs.make_rows(100_000)
    rows = inputs.rows
    whole = family.model.dimensions if inputs.averaged else dims
    vectors = family.embedder.embed(rows, [whole] * len(rows)) if rows else np.empty((0, whole), dtype=np.float32)
    errors = [row[0].decode() for row in inputs.errors()]
    return inputs.embeddings(vectors[:, :whole], dims), inputs.tokens(), inputs.dropped(), errors


GOOD_TEXTS = [b"hello world", b"the cat", b"a", LONG.encode(), "\u4f60\u597d".encode()]
PICTURES = [png(60, 40), png(9, 33)]
BAD_TEXTS = {b"": "cannot be empty", b" \n": "cannot be empty", b"\xff": "is not valid UTF-8"}
BROKEN = b"no picture"
KINDS: dict[str, tuple[list[Sent], dict[Sent, str]]] = {
    BGE: (
        [(text, ()) for text in GOOD_TEXTS],
        {**{(text, ()): why for text, why in BAD_TEXTS.items()}, (b"a", (BROKEN,)): "takes no images"},
    ),
    QWEN3: ([(text, ()) for text in GOOD_TEXTS], {(text, ()): why for text, why in BAD_TEXTS.items()}),
    CLIP_NEW: (
        [*((text, ()) for text in GOOD_TEXTS), *((b"", (picture,)) for picture in PICTURES)],
        {
            **{(text, ()): why for text, why in BAD_TEXTS.items()},
            (b"a", (PICTURES[0],)): "not both together (input at index ",
            (b"", tuple(PICTURES)): "one image at a time (input at index ",
            (b"", (BROKEN,)): "has an image that cannot be read",
        },
    ),
    GME: (
        [*((text, ()) for text in GOOD_TEXTS[:3]), (b"the dog", tuple(PICTURES)), (b"", (PICTURES[1],))],
        {
            **{(text, ()): why for text, why in BAD_TEXTS.items()},
            (b"<|image_pad|>", ()): "has <|image_pad|> in its text",
            (b"a", (PICTURES[0], BROKEN)): "has an image that cannot be read",
        },
    ),
}


@settings(deadline=None, max_examples=30)
@given(data=st.data(), long_text=st.sampled_from(["truncate", "mean"]), dims=st.sampled_from([7, 28]))
@pytest.mark.parametrize("name", KINDS)
def test_any_mix_of_good_and_bad_rows(name: str, long_text: str, dims: int, data: st.DataObject, tiny: Tiny) -> None:
    """The good ones' vectors are those of the same rows alone; every bad one has its message; nothing is lost."""
    family = family_with(tiny, name, max_tokens=60 if name == GME else 23, prefix_reuse="false")
    good, bad = KINDS[name]
    rows = data.draw(st.lists(st.sampled_from([*good, *bad]), min_size=1, max_size=7))
    parameters = {"long_text": long_text, **REPORT}
    vectors, tokens, dropped, errors = answered(family, asked(family, *rows, **parameters), dims)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(rows), dims)
    assert tokens.dtype == dropped.dtype == np.int32
    kept = [row for row in rows if row in good]
    if kept:
        alone = answered(family, asked(family, *kept, long_text=long_text), dims)
    for i, row in enumerate(rows):
        if row in good:
            assert errors[i] == ""
            place = sum(other in good for other in rows[:i])
            assert np.abs(vectors[i] - alone[0][place]).max() <= 1e-6
            assert (tokens[i], dropped[i]) == (alone[1][place], alone[2][place])
            assert tokens[i] > 0
        else:
            assert bad[row] in errors[i]
            assert f"nput at index {i}" in errors[i]
            assert not vectors[i].any()
            assert (tokens[i], dropped[i]) == (0, 0)


@pytest.mark.parametrize("name", KINDS)
def test_each_bad_row_ends_its_request_where_nobody_asked_for_a_report(name: str, tiny: Tiny) -> None:
    good, bad = KINDS[name]
    for row, why in bad.items():
        with pytest.raises(BadRequest) as refused:
            answered(tiny(name), asked(tiny(name), good[0], row, good[1]), 7)
        assert why in str(refused.value)
        assert "Input at index 1 " in str(refused.value) or "(input at index 1)" in str(refused.value)


def test_bad_ids_are_reported_too(tiny: Tiny) -> None:
    family = family_with(tiny, E5, max_tokens=5)
    sent = np.array([[5, 6, 7, 8, 9, 10], [-1] * 6, [5, -2, 7, 8, 9, 10], [5, 6, -1, -1, -1, -1]], dtype=np.int32)
    for long_text in ("truncate", "mean"):
        inputs = IdRows(family.processor, {**REPORT, "long_text": long_text}, sent)
        vectors, tokens, dropped, errors = answered(family, inputs, 7)
        assert [bool(error) for error in errors] == [False, True, True, False]
        assert errors[1] == "Input at index 1 cannot be empty"
        assert "Input at index 2 has token id -2" in errors[2]
        assert vectors.any(axis=1).tolist() == [True, False, False, True]
        assert tokens[:, 0].tolist() == ([5, 0, 0, 2] if long_text == "truncate" else [5 + 2, 0, 0, 2])
        assert dropped[:, 0].tolist() == ([1, 0, 0, 0] if long_text == "truncate" else [0] * 4)


def test_a_text_that_may_not_be_cut_is_reported(tiny: Tiny) -> None:
    family = family_with(tiny, BGE, max_tokens=23)
    inputs = asked(family, (LONG.encode(), ()), (b"a", ()), truncate="none", **REPORT)
    _, tokens, _, errors = answered(family, inputs, 7)
    assert errors[0].startswith("The input (")
    assert errors[0].endswith("(input at index 0)")
    assert tokens[:, 0].tolist() == [0, 3]


def test_too_many_tokens_in_all_are_no_rows_fault(tiny: Tiny) -> None:
    for parameters in (REPORT, {**REPORT, "long_text": "mean"}):
        inputs = asked(tiny(BGE), (b"a b c", ()), (b"", ()), **parameters)
        with pytest.raises(BadRequest, match="The request has 5 tokens, more than the 4 a request may have"):
            inputs_ready(inputs).make_rows(4)


def inputs_ready(inputs: RequestRows) -> RequestRows:
    assert isinstance(inputs, ItemRows)
    with ThreadPoolExecutor(1) as pool:
        inputs.decode_images(pool)
    return inputs


# Prompts of single rows


@pytest.mark.parametrize("name", [BGE, E5, QWEN3, GME])
def test_each_row_is_written_with_its_own_prompt(name: str, tiny: Tiny) -> None:
    family = tiny(name)
    prompts = '[{"instruction": "Find it."}, null, {"prompt_name": ""}, {}, {"instruction": "Find the dog."}]'
    rows: list[Sent] = [(b"hello world", ())] * 5
    dims = family.model.dimensions
    mixed = answered(family, asked(family, *rows, prompts=prompts), dims)[0]
    for i, one in enumerate(({"instruction": "Find it."}, {}, {}, {}, {"instruction": "Find the dog."})):
        alone = answered(family, asked(family, rows[0], **one), dims)[0]
        assert np.abs(mixed[i] - alone[0]).max() <= 2e-6
    assert np.abs(mixed[[0, 0, 4]] - mixed[[1, 4, 1]]).max(axis=1).min() > 1e-3


@pytest.mark.parametrize(
    ("name", "prompts", "message"),
    [
        (CLIP_NEW, '[{}, {"instruction": "x"}]', "Model 'clip' takes no instruction: it was trained without one"),
        (BGE, '[{}, {"prompt_name": "odd"}]', "Model 'bge' has no prompt_name 'odd'; it has: query, passage"),
        (GME, '[{}, {"instruction": "<|im_start|>"}]', "instruction must not contain <|im_start|>, which starts"),
    ],
)
def test_a_prompt_that_the_model_does_not_have_is_its_rows_fault(
    name: str, prompts: str, message: str, tiny: Tiny
) -> None:
    rows: list[Sent] = [(b"hello", ()), (b"world", ())]
    with pytest.raises(BadRequest) as refused:
        asked(tiny(name), *rows, prompts=prompts)
    assert str(refused.value).startswith(message)
    assert str(refused.value).endswith(" (input at index 1)")
    inputs = asked(tiny(name), *rows, prompts=prompts, **REPORT)
    vectors, _, _, errors = answered(tiny(name), inputs, 7)
    assert errors == ["", str(refused.value)]
    assert vectors.any(axis=1).tolist() == [True, False]


@pytest.mark.parametrize("key", ["instruction", "prompt_name", "prompts"])
def test_token_ids_take_no_prompt(key: str, tiny: Tiny) -> None:
    for parameters in ({key: "[{}]"}, {key: "[{}]", **REPORT}):
        with pytest.raises(BadRequest, match="need TEXT: token ids are used as they are"):
            IdRows(tiny(BGE).processor, parameters, np.array([[5, 6]], dtype=np.int32))


def test_prompts_of_another_number_are_the_requests_fault(tiny: Tiny) -> None:
    with pytest.raises(BadRequest, match="prompts must be a list with an entry for each of the 2 rows, got 1 entries"):
        asked(tiny(BGE), (b"a", ()), (b"b", ()), prompts="[{}]", **REPORT)


# IDS


@pytest.mark.parametrize(("name", "end"), [(BGE, ""), (E5, "</s>"), (QWEN3, ""), (CLIP_NEW, ""), (GME, "")])
def test_ids_are_transformers_own_uncut(name: str, end: str, tiny: Tiny) -> None:
    family = family_with(tiny, name, max_tokens=20)
    texts = [text.decode() for text in GOOD_TEXTS]
    written = [oracles.gme_text({"text": text}) if name == GME else text for text in texts]
    wanted = oracles.ids_of(family.directory, written, end)
    assert max(map(len, wanted)) > 20
    found = asked(family, *((text, ()) for text in GOOD_TEXTS)).padded_ids()
    assert (found.dtype, found.shape) == (np.int32, (len(texts), max(map(len, wanted))))
    for row, ids in zip(found, wanted, strict=True):
        assert row.tolist() == [*ids, *[-1] * (len(row) - len(ids))]


def test_ids_hold_the_prompt_of_each_row(tiny: Tiny) -> None:
    prompts = '[{"instruction": "Find it."}, {}]'
    found = asked(tiny(QWEN3), (b"hello", ()), (b"hello", ()), prompts=prompts).padded_ids()
    tokenizer = tokenizer_of(tiny(QWEN3).directory)
    first, second = (tokenizer(text)["input_ids"] for text in ("Instruct: Find it.\nQuery:hello", "hello"))
    assert found[0].tolist() == first
    assert found[1, : len(second)].tolist() == second
    assert set(found[1, len(second) :]) == {-1}


def test_a_row_without_ids_of_its_own(tiny: Tiny) -> None:
    for name in (CLIP_NEW, GME):
        rows: list[Sent] = [(b"hello", ()), (b"", (BROKEN,)), (b"\xff", ())]
        with pytest.raises(BadRequest, match="Input at index 1 has an image, which has no token ids"):
            asked(tiny(name), *rows[:2]).padded_ids()
        inputs = asked(tiny(name), *rows, **REPORT)
        found = inputs.padded_ids()
        assert (found[1:] == -1).all()
        assert (found[0] >= 0).all()
        errors = [row[0].decode() for row in inputs.errors()]
        assert ["" if not error else error[:24] for error in errors] == [
            "",
            "Input at index 1 has an ",
            "Input at index 2 is not ",
        ]


def test_ids_of_the_caller_are_given_back(tiny: Tiny) -> None:
    sent = np.array([[5, 6, 7, -1], [5, 10**6, 3, 2], [5, -1, -1, -1]], dtype=np.int32)
    inputs = IdRows(tiny(E5).processor, REPORT, sent)
    assert inputs.padded_ids().tolist() == [[5, 6, 7], [-1] * 3, [5, -1, -1]]
    assert "has token id 1000000" in inputs.errors()[1, 0].decode()


def test_padding_may_not_fill_the_memory(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Sent] = [(b"a", ()), (b"a", ()), (b"a b c", ())]
    monkeypatch.setattr(inputs_file, "MAX_PADDED_IDS", 15)
    assert asked(tiny(BGE), *rows).padded_ids().shape == (3, 5)
    monkeypatch.setattr(inputs_file, "MAX_PADDED_IDS", 14)
    with pytest.raises(BadRequest, match="3 rows padded to the 5 ids of the longest have more than 14 ids"):
        asked(tiny(BGE), *rows).padded_ids()


def test_where_vectors_came_from_is_told_of_each_input(tiny: Tiny) -> None:
    """Of a text in several chunks: from the cache if all are, computed if any was; of a bad one nothing."""
    family = family_with(tiny, E5, max_tokens=5)
    sent = np.full((5, 10), -1, dtype=np.int32)
    for row, length in zip(sent, (10, 3, 0, 10, 10), strict=True):
        row[:length] = 5
    inputs = IdRows(family.processor, {**REPORT, "long_text": "mean"}, sent)
    inputs.make_rows(100)
    chunks = (len(inputs.rows) - 1) // 3
    assert chunks > 1
    sources = np.array([*[2] * (chunks - 1), 0, 1, *[2] * (chunks - 1), 1, *[2] * chunks], dtype=np.int32)
    found = inputs.reused(sources)
    assert (found.dtype, found.tolist()) == (np.int32, [[0], [1], [0], [1], [2]])
    plain = IdRows(family.processor, REPORT, sent)
    plain.make_rows(100)
    assert plain.reused(np.array([2, 0, 1, 2], dtype=np.int32)).tolist() == [[2], [0], [0], [1], [2]]


def test_no_rows_at_all(tiny: Tiny) -> None:
    inputs = asked(tiny(BGE))
    vectors, tokens, dropped, errors = answered(tiny(BGE), inputs, 7)
    assert (vectors.shape, tokens.shape, dropped.shape, errors) == ((0, 7), (0, 1), (0, 1), [])
    assert asked(tiny(BGE)).padded_ids().shape == (0, 1)
