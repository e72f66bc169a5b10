"""Tests of the rows of one request: error reports per row, IDS equal to those of transformers, and prompts per row.

Vectors of valid rows are compared with those of the same rows sent alone, which test_chunking.py and test_vectors.py
compare with oracles.
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
from triton_embed.python_backend.wire import InputError

Tiny = Callable[[str], Family]
REPORT = {"on_error": "report"}
Sent = tuple[bytes, tuple[bytes, ...]]  # a row of TEXT and IMAGE


def make_request_rows(family: Family, *rows: Sent, **parameters: Any) -> RequestRows:
    """Return the rows of a request as EmbeddingServer reads it, with the ids of their texts set."""
    width = max([1, *(len(images) for _, images in rows)])
    text = np.array([[text] for text, _ in rows], dtype=np.object_).reshape(len(rows), 1)
    image = np.array([[*images, *[b""] * (width - len(images))] for _, images in rows], dtype=np.object_)
    request_rows = ItemRows(family.processor, parameters, text, image.reshape(len(rows), width), limit=100_000)
    request_rows.set_ids(iter(family.processor.tokenizer.encode(request_rows.texts())))
    return request_rows


def outputs_of(family: Family, inputs: RequestRows, dims: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Return EMBEDDING, TOKENS, DROPPED and ERROR. Nothing is computed if no row is valid."""
    if isinstance(inputs, ItemRows):
        with ThreadPoolExecutor(1) as pool:
            inputs.decode_images(pool)
    inputs.make_rows(100_000)
    rows = inputs.rows
    row_dims = family.model.dimensions if inputs.averaged else dims
    vectors = family.embedder.embed(rows, [row_dims] * len(rows)) if rows else np.empty((0, row_dims), dtype=np.float32)
    errors = [bytes(row).decode().rstrip() for row in inputs.errors()]
    return inputs.embeddings(vectors[:, :row_dims], dims), inputs.tokens(), inputs.dropped(), errors


VALID_TEXTS = [b"hello world", b"the cat", b"a", LONG.encode(), "\u4f60\u597d".encode()]
IMAGES = [png(60, 40), png(9, 33)]
INVALID_TEXTS = {b"": "cannot be empty", b" \n": "cannot be empty", b"\xff": "is not valid UTF-8"}
BROKEN = b"not an image"
KINDS: dict[str, tuple[list[Sent], dict[Sent, str]]] = {
    BGE: (
        [(text, ()) for text in VALID_TEXTS],
        {**{(text, ()): why for text, why in INVALID_TEXTS.items()}, (b"a", (BROKEN,)): "takes no images"},
    ),
    QWEN3: ([(text, ()) for text in VALID_TEXTS], {(text, ()): why for text, why in INVALID_TEXTS.items()}),
    CLIP_NEW: (
        [*((text, ()) for text in VALID_TEXTS), *((b"", (picture,)) for picture in IMAGES)],
        {
            **{(text, ()): why for text, why in INVALID_TEXTS.items()},
            (b"a", (IMAGES[0],)): "not both together (input at index ",
            (b"", tuple(IMAGES)): "one image at a time (input at index ",
            (b"", (BROKEN,)): "has an image that cannot be read",
        },
    ),
    GME: (
        [*((text, ()) for text in VALID_TEXTS[:3]), (b"the dog", tuple(IMAGES)), (b"", (IMAGES[1],))],
        {
            **{(text, ()): why for text, why in INVALID_TEXTS.items()},
            (b"<|image_pad|>", ()): "has <|image_pad|> in its text",
            (b"a", (IMAGES[0], BROKEN)): "has an image that cannot be read",
        },
    ),
}


@settings(deadline=None, max_examples=30)
@given(data=st.data(), long_text=st.sampled_from(["truncate", "mean"]), dims=st.sampled_from([7, 28]))
@pytest.mark.parametrize("name", KINDS)
def test_any_mix_of_valid_and_invalid_rows(
    name: str, long_text: str, dims: int, data: st.DataObject, tiny: Tiny
) -> None:
    """Compare each valid row with the same row sent alone, and check the message of each invalid row."""
    family = family_with(tiny, name, max_tokens=60 if name == GME else 23, prefix_reuse="false")
    valid, invalid = KINDS[name]
    rows = data.draw(st.lists(st.sampled_from([*valid, *invalid]), min_size=1, max_size=7))
    parameters = {"long_text": long_text, **REPORT}
    vectors, tokens, dropped, errors = outputs_of(family, make_request_rows(family, *rows, **parameters), dims)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(rows), dims)
    assert tokens.dtype == dropped.dtype == np.int32
    valid_rows = [row for row in rows if row in valid]
    if valid_rows:
        alone = outputs_of(family, make_request_rows(family, *valid_rows, long_text=long_text), dims)
    for i, row in enumerate(rows):
        if row in valid:
            assert errors[i] == ""
            position = sum(other in valid for other in rows[:i])
            assert np.abs(vectors[i] - alone[0][position]).max() <= 1e-6
            assert (tokens[i], dropped[i]) == (alone[1][position], alone[2][position])
            assert tokens[i] > 0
        else:
            assert invalid[row] in errors[i]
            assert f"nput at index {i}" in errors[i]
            assert not vectors[i].any()
            assert (tokens[i], dropped[i]) == (0, 0)


@pytest.mark.parametrize("name", KINDS)
def test_invalid_row_fails_its_request_without_report(name: str, tiny: Tiny) -> None:
    valid, invalid = KINDS[name]
    for row, message in invalid.items():
        with pytest.raises(BadRequest) as raised:
            outputs_of(tiny(name), make_request_rows(tiny(name), valid[0], row, valid[1]), 7)
        assert message in str(raised.value)
        assert "Input at index 1 " in str(raised.value) or "(input at index 1)" in str(raised.value)


def test_invalid_ids_are_reported(tiny: Tiny) -> None:
    family = family_with(tiny, E5, max_tokens=5)
    sent = np.array([[5, 6, 7, 8, 9, 10], [-1] * 6, [5, -2, 7, 8, 9, 10], [5, 6, -1, -1, -1, -1]], dtype=np.int32)
    for long_text in ("truncate", "mean"):
        inputs = IdRows(family.processor, {**REPORT, "long_text": long_text}, sent)
        vectors, tokens, dropped, errors = outputs_of(family, inputs, 7)
        assert [bool(error) for error in errors] == [False, True, True, False]
        assert errors[1] == "Input at index 1 cannot be empty"
        assert "Input at index 2 has token id -2" in errors[2]
        assert vectors.any(axis=1).tolist() == [True, False, False, True]
        assert tokens[:, 0].tolist() == ([5, 0, 0, 2] if long_text == "truncate" else [5 + 2, 0, 0, 2])
        assert dropped[:, 0].tolist() == ([1, 0, 0, 0] if long_text == "truncate" else [0] * 4)


def test_errors_are_written_as_json_on_request(tiny: Tiny) -> None:
    rows: list[Sent] = [(b"a", ()), (b"", ()), (b"\xff", ())]
    inputs = make_request_rows(tiny(BGE), *rows, error_format="json", **REPORT)
    errors = outputs_of(tiny(BGE), inputs, 7)[3]
    assert errors[0] == ""
    assert [InputError.from_json(error) for error in errors[1:]] == [
        InputError(1, "empty", "Input cannot be empty or whitespace only"),
        InputError(2, "invalid_text", "Input is not valid UTF-8"),
    ]
    assert inputs.row_errors == {error.index: error for error in map(InputError.from_json, errors[1:]) if error}


def test_text_too_long_without_truncation_is_reported(tiny: Tiny) -> None:
    family = family_with(tiny, BGE, max_tokens=23)
    inputs = make_request_rows(family, (LONG.encode(), ()), (b"a", ()), truncate="none", **REPORT)
    _, tokens, _, errors = outputs_of(family, inputs, 7)
    assert errors[0].startswith("The input (")
    assert errors[0].endswith("(input at index 0)")
    assert tokens[:, 0].tolist() == [0, 3]


def test_too_many_tokens_in_total_fail_the_request(tiny: Tiny) -> None:
    for parameters in (REPORT, {**REPORT, "long_text": "mean"}):
        inputs = make_request_rows(tiny(BGE), (b"a b c", ()), (b"", ()), **parameters)
        with pytest.raises(BadRequest, match="The request has 5 tokens, more than the 4 a request may have"):
            with_images_decoded(inputs).make_rows(4)


def with_images_decoded(inputs: RequestRows) -> RequestRows:
    assert isinstance(inputs, ItemRows)
    with ThreadPoolExecutor(1) as pool:
        inputs.decode_images(pool)
    return inputs


# Prompts per row


@pytest.mark.parametrize("name", [BGE, E5, QWEN3, GME])
def test_each_row_is_formatted_with_its_prompt(name: str, tiny: Tiny) -> None:
    family = tiny(name)
    prompts = '[{"instruction": "Find it."}, null, {"prompt_name": ""}, {}, {"instruction": "Find the dog."}]'
    rows: list[Sent] = [(b"hello world", ())] * 5
    dims = family.model.dimensions
    mixed = outputs_of(family, make_request_rows(family, *rows, prompts=prompts), dims)[0]
    for i, prompt in enumerate(({"instruction": "Find it."}, {}, {}, {}, {"instruction": "Find the dog."})):
        alone = outputs_of(family, make_request_rows(family, rows[0], **prompt), dims)[0]
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
def test_unsupported_prompt_is_an_error_of_its_row(name: str, prompts: str, message: str, tiny: Tiny) -> None:
    rows: list[Sent] = [(b"hello", ()), (b"world", ())]
    with pytest.raises(BadRequest) as raised:
        make_request_rows(tiny(name), *rows, prompts=prompts)
    assert str(raised.value).startswith(message)
    assert str(raised.value).endswith(" (input at index 1)")
    inputs = make_request_rows(tiny(name), *rows, prompts=prompts, **REPORT)
    vectors, _, _, errors = outputs_of(tiny(name), inputs, 7)
    assert errors == ["", str(raised.value)]
    assert vectors.any(axis=1).tolist() == [True, False]


@pytest.mark.parametrize("key", ["instruction", "prompt_name", "prompts"])
def test_token_ids_take_no_prompt(key: str, tiny: Tiny) -> None:
    for parameters in ({key: "[{}]"}, {key: "[{}]", **REPORT}):
        with pytest.raises(BadRequest, match="need TEXT: token ids are used as they are"):
            IdRows(tiny(BGE).processor, parameters, np.array([[5, 6]], dtype=np.int32))


def test_texts_with_their_prompts_are_bounded_together(tiny: Tiny) -> None:
    """A request of a few kilobytes can ask for gigabytes of text, with an instruction before each of its rows."""
    rows: list[Sent] = [(b"a", ())] * 600
    with pytest.raises(BadRequest, match=r"The texts have \d+ characters with their prompts, more than 33554432"):
        make_request_rows(tiny(E5), *rows, instruction="x" * 2**16)


def test_wrong_number_of_prompts_fails_the_request(tiny: Tiny) -> None:
    with pytest.raises(BadRequest, match="prompts must be a list with an entry for each of the 2 rows, got 1 entries"):
        make_request_rows(tiny(BGE), (b"a", ()), (b"b", ()), prompts="[{}]", **REPORT)


# IDS


@pytest.mark.parametrize("name", [BGE, E5, QWEN3, CLIP_NEW, GME])
def test_ids_equal_transformers_without_truncation(name: str, tiny: Tiny) -> None:
    family = family_with(tiny, name, max_tokens=20)
    texts = [text.decode() for text in VALID_TEXTS]
    prompted = [oracles.gme_text({"text": text}) if name == GME else text for text in texts]
    expected = oracles.token_ids(family.directory, prompted)
    assert max(map(len, expected)) > 20
    padded = make_request_rows(family, *((text, ()) for text in VALID_TEXTS)).padded_ids()
    assert (padded.dtype, padded.shape) == (np.int32, (len(texts), max(map(len, expected))))
    for row, ids in zip(padded, expected, strict=True):
        assert row.tolist() == [*ids, *[-1] * (len(row) - len(ids))]


def test_ids_hold_the_prompt_of_each_row(tiny: Tiny) -> None:
    prompts = '[{"instruction": "Find it."}, {}]'
    padded = make_request_rows(tiny(QWEN3), (b"hello", ()), (b"hello", ()), prompts=prompts).padded_ids()
    tokenizer = tokenizer_of(tiny(QWEN3).directory)
    first, second = (tokenizer(text)["input_ids"] for text in ("Instruct: Find it.\nQuery:hello", "hello"))
    assert padded[0].tolist() == first
    assert padded[1, : len(second)].tolist() == second
    assert set(padded[1, len(second) :]) == {-1}


def test_row_with_an_image_has_no_ids(tiny: Tiny) -> None:
    for name in (CLIP_NEW, GME):
        rows: list[Sent] = [(b"hello", ()), (b"", (BROKEN,)), (b"\xff", ())]
        with pytest.raises(BadRequest, match="Input at index 1 has an image, which has no token ids"):
            make_request_rows(tiny(name), *rows[:2]).padded_ids()
        inputs = make_request_rows(tiny(name), *rows, **REPORT)
        padded = inputs.padded_ids()
        assert (padded[1:] == -1).all()
        assert (padded[0] >= 0).all()
        errors = [bytes(row).decode().rstrip() for row in inputs.errors()]
        assert ["" if not error else error[:24] for error in errors] == [
            "",
            "Input at index 1 has an ",
            "Input at index 2 is not ",
        ]


def test_ids_of_the_caller_are_returned(tiny: Tiny) -> None:
    sent = np.array([[5, 6, 7, -1], [5, 10**6, 3, 2], [5, -1, -1, -1]], dtype=np.int32)
    inputs = IdRows(tiny(E5).processor, REPORT, sent)
    assert inputs.padded_ids().tolist() == [[5, 6, 7], [-1] * 3, [5, -1, -1]]
    assert "has token id 1000000" in bytes(inputs.errors()[1]).decode()


def test_padded_ids_are_limited(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Sent] = [(b"a", ()), (b"a", ()), (b"a b c", ())]
    monkeypatch.setattr(inputs_file, "MAX_PADDED_IDS", 15)
    assert make_request_rows(tiny(BGE), *rows).padded_ids().shape == (3, 5)
    monkeypatch.setattr(inputs_file, "MAX_PADDED_IDS", 14)
    with pytest.raises(BadRequest, match="3 rows padded to the 5 ids of the longest have more than 14 ids"):
        make_request_rows(tiny(BGE), *rows).padded_ids()


def test_source_is_reported_for_each_input(tiny: Tiny) -> None:
    """Report a chunked text as cached if all chunks were, computed if any was, and an invalid row as zero."""
    family = family_with(tiny, E5, max_tokens=5)
    sent = np.full((5, 10), -1, dtype=np.int32)
    for row, length in zip(sent, (10, 3, 0, 10, 10), strict=True):
        row[:length] = 5
    inputs = IdRows(family.processor, {**REPORT, "long_text": "mean"}, sent)
    inputs.make_rows(100)
    chunks = (len(inputs.rows) - 1) // 3
    assert chunks > 1
    sources = np.array([*[2] * (chunks - 1), 0, 1, *[2] * (chunks - 1), 1, *[2] * chunks], dtype=np.int32)
    reused = inputs.reused(sources)
    assert (reused.dtype, reused.tolist()) == (np.int32, [[0], [1], [0], [1], [2]])
    plain = IdRows(family.processor, REPORT, sent)
    plain.make_rows(100)
    assert plain.reused(np.array([2, 0, 1, 2], dtype=np.int32)).tolist() == [[2], [0], [0], [1], [2]]


def test_empty_request_returns_empty_outputs(tiny: Tiny) -> None:
    inputs = make_request_rows(tiny(BGE))
    vectors, tokens, dropped, errors = outputs_of(tiny(BGE), inputs, 7)
    assert (vectors.shape, tokens.shape, dropped.shape, errors) == ((0, 7), (0, 1), (0, 1), [])
    assert make_request_rows(tiny(BGE)).padded_ids().shape == (0, 1)
