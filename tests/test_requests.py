"""Parsing of requests and writing of responses: every form, the message of every error, and no other exception."""

import base64
import json
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_embed.gateway.api import requests as schemas
from triton_embed.gateway.api.embeddings import embeddings_json, encode_json
from triton_embed.gateway.api.inputs import Prompt
from triton_embed.gateway.api.requests import EmbeddingRequest, Embeddings
from triton_embed.gateway.api.vector_formats import VectorFormat
from triton_embed.gateway.errors import ApiError, invalid
from triton_embed.gateway.settings import Settings

SIZES = "dimensions must be an integer or a list of 1 to 16 integers"
SETTINGS = Settings(max_inputs=4, max_request_tokens=10)


def as_json(value: Any) -> bytes:
    """Return JSON of the standard library, which allows integers of any size, NaN and lone surrogates."""
    return json.dumps(value).encode()


def parse(body: Any) -> EmbeddingRequest:
    return schemas.parse_embeddings(as_json(body), SETTINGS)


def outcome(parser: Any, body: bytes) -> EmbeddingRequest | ApiError:
    try:
        request: EmbeddingRequest = parser(body, SETTINGS)
    except ApiError as error:
        return error
    return request


def parse_error(body: Any, parser: Any = schemas.parse_embeddings) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parser(body if isinstance(body, bytes) else as_json(body), SETTINGS)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("inputs", "texts", "ids", "single"),
    [
        ("a", ["a"], [], True),
        ("今天天气真好", ["今天天气真好"], [], True),
        (["a"], ["a"], [], False),
        (["a", "b"], ["a", "b"], [], False),
        ([1, 2, 3], [], [[1, 2, 3]], True),
        ([[1, 2], [3]], [], [[1, 2], [3]], False),
        ({"input": "a"}, ["a"], [], True),
        ({"input": [[1], [2]]}, [], [[1], [2]], False),
        ([-1], [], [[-1]], True),  # rejected later, by `fit`
    ],
)
def test_input_forms(inputs: Any, texts: list[str], ids: list[list[int]], single: bool) -> None:
    request = parse({"input": inputs})
    assert (request.texts, request.ids, request.single) == (texts, ids, single)
    assert request.parameters(range(request.count)) == {}


TEXT_PART = {"type": "text", "text": "a"}
IMAGE_PART = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("inputs", "texts", "images", "single"),
    [
        ({"text": "a"}, ["a"], [], True),
        ([{"text": "a"}], ["a"], [], False),
        ([{"text": "a"}, {"image": "x"}], ["a", ""], [(), ("x",)], False),
        (["a", {"text": "b", "image": "x"}], ["a", "b"], [(), ("x",)], False),
        ([{"image": "x"}, "a"], ["", "a"], [("x",), ()], False),
        ({"text": "a", "image": ["x", "y"]}, ["a"], [("x", "y")], True),
        (TEXT_PART, ["a"], [], True),
        ([TEXT_PART, IMAGE_PART], ["a"], [("x",)], True),
        ([[TEXT_PART, IMAGE_PART], [TEXT_PART]], ["a", "a"], [("x",), ()], False),
        (["b", [IMAGE_PART]], ["b", ""], [(), ("x",)], False),
        ({"input": [{"image": "x"}]}, [""], [("x",)], False),
        ({"input": {"image": "x"}}, [""], [("x",)], True),
        ({"input": [TEXT_PART]}, ["a"], [], True),
    ],
)
def test_item_forms(inputs: Any, texts: list[str], images: list[tuple[str, ...]], single: bool) -> None:
    request = parse({"input": inputs})
    assert (request.texts, list(request.images), request.ids, request.single) == (texts, images, [], single)


def test_prompts_of_items() -> None:
    i, q, no_prompt = Prompt("i"), Prompt(None, "q"), Prompt()
    for items, outer, expected in [
        ([{"text": "a", "instruction": "i"}, {"image": "x"}], {}, [i, no_prompt]),
        ([{"text": "a", "instruction": "i"}, "b"], {"prompt_name": "q"}, [i, q]),
        ({"text": "a", "prompt_name": "q"}, {"instruction": "i"}, [q]),
        ({"input": [{"text": "a", "prompt_name": "q"}, "b"], "instruction": "i"}, {}, [q, i]),
        (["a", {"text": "b"}], {"instruction": "i"}, []),
    ]:
        request = parse({"input": items, **outer})
        assert request.prompts == expected
        assert [request.prompt_of(n) for n in range(request.count)] == expected or not expected


def test_requests_at_the_limits_are_valid() -> None:
    assert len(parse({"input": ["a"] * 4}).texts) == 4
    assert len(parse({"input": [{"image": "x"}] * 4}).images) == 4
    assert parse({"input": {"image": ["x"] * 4}}).images == [("x",) * 4]
    assert parse({"input": [[1] * 4, [1] * 6]}).ids == [[1] * 4, [1] * 6]


def test_wrapped_input_equals_top_level_fields() -> None:
    inner = parse({"model": "m", "input": {"input": "a", "instruction": "find"}})
    assert inner == parse({"model": "m", "input": "a", "instruction": "find"})
    assert inner.prompt == Prompt("find")


def test_wrapped_prompt_overrides_top_level_prompt() -> None:
    body = {"input": {"input": "a", "instruction": "inner"}, "instruction": "outer", "prompt_name": "query"}
    assert parse(body).parameters([0]) == {"instruction": "inner"}
    assert parse({"input": {"input": "a"}, "prompt_name": "query"}).parameters([0]) == {"prompt_name": "query"}


def test_unset_fields_are_not_sent_to_the_model() -> None:
    expected = {"dimensions": 3, "instruction": "i", "truncate": "start", "long_text": "mean", "on_error": "report"}
    assert parse({"input": "a", **expected}).parameters([0]) == expected
    names = ["dimensions", "instruction", "prompt_name", "input_type", "truncate", "long_text", "on_error", "priority"]
    other_names = ["output_dtype", "return_receipt", "token_encoding", "encoding_format", "model"]
    absent = {**dict.fromkeys([*names, *other_names]), "instruction": "", "user": 7, "new": []}
    assert parse({"input": "a", **absent}).parameters([0]) == {}
    assert parse({"input": "a", "dimensions": [3, 5, 2]}).parameters([0]) == {"dimensions": 5}


def test_vector_format_and_priority_of_a_request() -> None:
    assert parse({"input": "a"}).vector_format == VectorFormat()
    body = {"dimensions": [3, 5], "output_dtype": "int8", "return_receipt": True, "encoding_format": "base64"}
    assert parse({"input": "a", **body}).vector_format == VectorFormat(True, "int8", (3, 5), True, True)
    assert parse({"input": "a", "dimensions": 3}).vector_format == VectorFormat(sizes=(3,))
    assert [parse({"input": "a", "priority": lane}).batch for lane in ("batch", "interactive", None)] == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("value", "base64_expected"),
    [("float", False), (None, False), (["float"], False), ("base64", True), (["base64"], True)],
)
def test_encoding_format(value: Any, base64_expected: bool) -> None:
    assert parse({"input": "a", "encoding_format": value}).vector_format.base64 is base64_expected


@pytest.mark.parametrize(
    ("value", "meaning"),
    [("end", "end"), ("START", "start"), ("none", "none"), (True, "end"), (False, "none"), (None, None)],
)
def test_truncate(value: Any, meaning: str | None) -> None:
    assert parse({"input": "a", "truncate": value}).truncate == meaning


WRAPPER_KEYS = "allowed keys are input, instruction, prompt_name, input_type"
INVALID_INPUTS = [
    (None, "input is required"),
    ("", "Input cannot be empty"),
    ([], "Input cannot be empty"),
    (" \n", "Input at index 0 cannot be empty or whitespace only"),
    (["a", ""], "Input at index 1 cannot be empty or whitespace only"),
    (["a", "\t"], "Input at index 1 cannot be empty or whitespace only"),
    ([[1], []], "Input at index 1 cannot be empty"),
    ([[]], "Input at index 0 cannot be empty"),
    (7, "Input at index 0 must be a string, an object or a list, got an integer"),
    (True, "Input at index 0 must be a string, an object or a list, got a boolean"),
    (["a", 1], "Input at index 1 must be a string, an object or a list of content parts, got an integer"),
    (["a", ["b"]], "Input at index 1, content part 0 must be an object with a type"),
    (["a", [1]], "Input at index 1, content part 0 must be an object with a type"),
    (["a", None], "Input at index 1 must be a string, an object or a list of content parts, got null"),
    ([1, "a"], "Input at index 0 must be made of token ids, got a string"),
    ([1, True], "Input at index 0 must be made of token ids, got a boolean"),
    ([1, 2.0], "Input at index 0 must be made of token ids, got a number"),
    ([1, 10**30], "Input at index 0 must be made of token ids, got a number"),
    ([[1], ["a"]], "Input at index 1 must be made of token ids, got a string"),
    ([[1], 2], "Input at index 1 must be a list of token ids, as the first input is, got an integer"),
    ([[1], {"text": "a"}], "Input at index 1 must be a list of token ids, as the first input is, got an object"),
    ([[1], [TEXT_PART]], "Input at index 1 must be made of token ids, got an object"),
    ([1, TEXT_PART], "Input at index 0 must be made of token ids, got an object"),
    ([True], "Input at index 0 must be a string, an object or a list of content parts, got a boolean"),
    ([None], "Input at index 0 must be a string, an object or a list of content parts, got null"),
    ({}, "Input at index 0 cannot be empty or whitespace only"),
    ([{"text": "a"}, {}], "Input at index 1 cannot be empty or whitespace only"),
    ([{"text": "a"}, " "], "Input at index 1 cannot be empty or whitespace only"),
    (["a", {"image": 7}], "Input at index 1: image must be a data: URI, base64 or an http(s) URL, got an integer"),
    ([{"text": "a"}, [1]], "Input at index 1, content part 0 must be an object with a type"),
    ([TEXT_PART, {"text": "a"}], "Input at index 0, content part 1 must be an object with a type"),
    (["a", TEXT_PART], "Input at index 1 is a content part: put the parts of one input in a list"),
    (
        {"input": {"input": "a"}},
        "Input at index 0 has an unknown key 'input'; allowed keys are text, image, image_url, instruction, "
        "prompt_name, input_type",
    ),
    ({"input": "a", "image": "x"}, f"input has an unknown key 'image'; {WRAPPER_KEYS}"),
    ({"input": "a", "": "x"}, f"input has an unknown key ''; {WRAPPER_KEYS}"),
    (["a"] * 5, "At most 4 inputs fit in one request, got 5"),
    ([{"text": "a"}] * 5, "At most 4 inputs fit in one request, got 5"),
    ([{"image": ["x", "y", "z"]}] * 2, "At most 4 images fit in one request, got 6"),
    ([[1]] * 5, "At most 4 inputs fit in one request, got 5"),
    ([[1] * 5, [1] * 6], "The request has 11 tokens, more than the 10 a request may have"),
]


@pytest.mark.parametrize(("value", "message"), INVALID_INPUTS)
def test_invalid_inputs(value: Any, message: str) -> None:
    error = parse_error(as_json({"input": value}))
    assert (error.message, error.param) == (message, "input")


def test_input_is_required() -> None:
    assert parse_error({"model": "m"}).message == "input is required"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model", 3, "model must be a string, got an integer"),
        ("model", ["a"], "model must be a string, got a list"),
        ("dimensions", "3.0", f"{SIZES}, got a string"),
        ("dimensions", 3.0, f"{SIZES}, got a number"),
        ("dimensions", True, f"{SIZES}, got a boolean"),
        ("dimensions", [], f"{SIZES}, got an invalid list"),
        ("dimensions", [1] * 17, f"{SIZES}, got an invalid list"),
        ("dimensions", [1, 2.0], f"{SIZES}, got an invalid list"),
        ("output_dtype", "int4", "output_dtype must be one of float, int8, uint8, binary, ubinary, got 'int4'"),
        ("on_error", "ignore", "on_error must be one of fail, report, got 'ignore'"),
        ("on_error", ["fail"], "on_error must be one of fail, report, got '['fail']'"),
        ("long_text", True, "long_text must be one of truncate, mean, got 'True'"),
        ("priority", "high", "priority must be one of interactive, batch, got 'high'"),
        ("return_receipt", 1, "return_receipt must be a boolean, got an integer"),
        ("token_encoding", "p50k_base", "token_encoding must be one of cl100k_base, o200k_base, got 'p50k_base'"),
        ("instruction", 1, "instruction must be a string, got an integer"),
        ("instruction", "x" * 65_537, "instruction has 65537 characters, more than 65536"),
        ("prompt_name", {}, "prompt_name must be a string, got an object"),
        ("truncate", "middle", "truncate must be 'end', 'start', 'none' or a boolean, got 'middle'"),
        ("truncate", 1, "truncate must be 'end', 'start', 'none' or a boolean, got '1'"),
        ("truncate", [], "truncate must be 'end', 'start', 'none' or a boolean, got '[]'"),
        ("encoding_format", "int8", "encoding_format must be either 'float' or 'base64', got 'int8'"),
        ("encoding_format", False, "encoding_format must be either 'float' or 'base64', got 'False'"),
        (
            "encoding_format",
            ["float", "base64"],
            "encoding_format must be either 'float' or 'base64', got '['float', 'base64']'",
        ),
    ],
)
def test_invalid_fields(field: str, value: Any, message: str) -> None:
    error = parse_error({"input": "a", field: value})
    assert (error.message, error.param) == (message, field)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"input=a", b"\xff", b'{"input": NaN}', b"[" * 5000],
)
def test_body_that_is_not_json(body: bytes) -> None:
    assert parse_error(body).message.startswith("The request body is not valid JSON: ")


@pytest.mark.parametrize(
    ("body", "kind"), [(b"[]", "a list"), (b'"a"', "a string"), (b"null", "null"), (b"1", "an integer")]
)
def test_body_that_is_not_an_object(body: bytes, kind: str) -> None:
    assert parse_error(body).message == f"The request body must be a JSON object, got {kind}"


def test_error_truncates_a_long_value() -> None:
    assert len(parse_error({"input": "a", "encoding_format": "x" * 10**6}).message) < 300


KEYS = st.sampled_from(["type", "text", "image", "image_url", "url", "input", "instruction"])
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["text", "image_url", "image"]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(KEYS | st.text(), inner, max_size=5),
    max_leaves=20,
)
FIELDS = [
    "input", "text", "input_ids", "image_data", "model", "dimensions", "truncate", "encoding_format", "instruction",
    "prompt_name", "input_type", "long_text", "on_error", "output_dtype", "return_receipt", "priority",
    "token_encoding",
]  # fmt: skip


@given(body=JSON | st.dictionaries(st.sampled_from(FIELDS), JSON))
@pytest.mark.parametrize("parser", [schemas.parse_embeddings, schemas.parse_encode])
def test_any_json_is_a_request_or_a_400(parser: Any, body: Any) -> None:
    request = outcome(parser, as_json(body))
    if isinstance(request, ApiError):
        assert request.status == 400
        assert request.message
        return
    assert bool(request.texts) != bool(request.ids)
    assert len(request.images) in (0, len(request.texts))
    images = request.images or [()] * len(request.texts)
    for i, (text, references) in enumerate(zip(request.texts, images, strict=True)):
        assert type(text) is str
        assert text.strip() or (references and not text) or i in request.errors.by_index
        assert all(type(reference) is str and reference.strip() for reference in references)
    for i, row in enumerate(request.ids):
        assert all(type(id_) is int for id_ in row)
        assert row or i in request.errors.by_index
    assert len(request.texts) + len(request.ids) <= SETTINGS.max_inputs
    assert {type(value) for value in request.parameters(range(request.count)).values()} <= {int, str}


@given(body=st.binary(max_size=60))
def test_any_bytes_are_a_request_or_a_400(body: bytes) -> None:
    result = outcome(schemas.parse_embeddings, body)
    assert isinstance(result, EmbeddingRequest) or result.status == 400


@pytest.mark.parametrize(
    ("body", "texts", "ids", "single"),
    [
        ({"text": "a"}, ["a"], [], True),
        ({"text": ["a", "b"], "input_ids": None}, ["a", "b"], [], False),
        ({"input_ids": [1, 2]}, [], [[1, 2]], True),
        ({"input_ids": [[1, 2]]}, [], [[1, 2]], False),
    ],
)
def test_encode_forms(body: Any, texts: list[str], ids: list[list[int]], single: bool) -> None:
    request = schemas.parse_encode(orjson.dumps(body), SETTINGS)
    assert (request.texts, request.ids, request.single) == (texts, ids, single)


@pytest.mark.parametrize(
    ("body", "texts", "images", "single"),
    [
        ({"image_data": "x"}, [""], [("x",)], True),
        ({"text": "a", "image_data": "x"}, ["a"], [("x",)], True),
        ({"text": "a", "image_data": {"url": "x"}}, ["a"], [("x",)], True),
        ({"text": "a", "image_data": ["x", "y"]}, ["a"], [("x", "y")], True),
        ({"text": None, "image_data": ["x", "y"]}, [""], [("x", "y")], True),
        ({"image_data": [["x"], ["y", "z"]]}, ["", ""], [("x",), ("y", "z")], False),
        ({"text": ["a", "b"], "image_data": ["x", None]}, ["a", "b"], [("x",), ()], False),
        ({"text": ["a", ""], "image_data": [["x", "y"], "z"]}, ["a", ""], [("x", "y"), ("z",)], False),
        ({"text": ["a", None], "image_data": [None, "x"]}, ["a", ""], [(), ("x",)], False),
        ({"text": "a", "image_data": []}, ["a"], [], True),
    ],
)
def test_encode_forms_with_images(body: Any, texts: list[str], images: list[tuple[str, ...]], single: bool) -> None:
    """Check SGLang's rule: a list of texts is a batch, and each input of a batch has separate images."""
    request = schemas.parse_encode(orjson.dumps(body), SETTINGS)
    assert (request.texts, list(request.images), request.single) == (texts, images, single)
    assert request.param == "image_data"


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({}, "Send either text or input_ids", "text"),
        ({"text": "a", "input_ids": [1]}, "Send either text or input_ids", "text"),
        ({"text": [""]}, "Input at index 0 cannot be empty or whitespace only", "text"),
        ({"input_ids": []}, "Input cannot be empty", "input_ids"),
        ({"input_ids": [1], "image_data": "x"}, "image_data goes with text, not with input_ids", "image_data"),
        (
            {"text": ["a", "b"], "image_data": ["x"]},
            "image_data must be a list of 2, as text is: an image, a list of them or null for each",
            "image_data",
        ),
        (
            {"text": ["a"], "image_data": "x"},
            "image_data must be a list of 1, as text is: an image, a list of them or null for each",
            "image_data",
        ),
        ({"text": [], "image_data": []}, "Input cannot be empty", "image_data"),
        ({"image_data": []}, "Input at index 0 cannot be empty or whitespace only", "image_data"),
        ({"image_data": [["x"], None]}, "Input at index 1 cannot be empty or whitespace only", "image_data"),
        (
            {"text": "a", "image_data": [["x"]]},
            "Input at index 0: image must be a data: URI, base64 or an http(s) URL, got a list",
            "image_data",
        ),
        ({"text": [7], "image_data": ["x"]}, "Input at index 0: text must be a string, got an integer", "image_data"),
        ({"image_data": [["x"] * 3, ["x"] * 2]}, "At most 4 images fit in one request, got 5", "image_data"),
    ],
)
def test_invalid_encode_requests(body: Any, message: str, param: str) -> None:
    error = parse_error(body, schemas.parse_encode)
    assert (error.message, error.param) == (message, param)


def embeddings(rows: int = 2, size: int = 5) -> Embeddings:
    vectors = np.random.default_rng(0).standard_normal((rows, size)).astype("<f4")
    return Embeddings(vectors, np.arange(3, 3 + rows, dtype="<i4"), np.arange(rows, dtype="<i4"))


TWO = parse({"input": ["a", "b"]})


def test_float_response() -> None:
    reply = embeddings()
    body = orjson.loads(embeddings_json(reply, TWO, "m"))
    assert list(body) == ["object", "data", "model", "usage"]
    assert [list(item) for item in body["data"]] == [["object", "embedding", "index"]] * 2
    assert [item["index"] for item in body["data"]] == [0, 1]
    assert (body["object"], body["model"], body["usage"]) == ("list", "m", {"prompt_tokens": 7, "total_tokens": 7})
    vectors = np.array([item["embedding"] for item in body["data"]], dtype=np.float32)
    assert np.array_equal(vectors, reply.vectors)  # decimal text preserves every float32 exactly


def test_base64_response() -> None:
    reply = embeddings()
    body = orjson.loads(embeddings_json(reply, replace(TWO, vector_format=VectorFormat(base64=True)), "m"))
    packed = b"".join(base64.b64decode(item["embedding"]) for item in body["data"])
    assert packed == reply.vectors.astype("<f4").tobytes()


def test_encode_response() -> None:
    reply = embeddings()
    batch = orjson.loads(encode_json(reply, TWO))
    assert [item["meta_info"] for item in batch] == [
        {"prompt_tokens": 3, "dropped_tokens": 0},
        {"prompt_tokens": 4, "dropped_tokens": 1},
    ]
    assert np.allclose([item["embedding"] for item in batch], reply.vectors, atol=0, rtol=1e-7)
    reply = embeddings(rows=1)
    single = orjson.loads(encode_json(reply, replace(TWO, single=True)))
    assert single == orjson.loads(encode_json(reply, TWO))[0]


def test_truncated_counts_inputs_that_lost_tokens() -> None:
    assert embeddings(rows=4).truncated == 3
    assert embeddings(rows=1).truncated == 0


def test_receipts_of_a_response() -> None:
    request = parse({"input": [{"text": "a", "instruction": "i"}, "b"], "return_receipt": True})
    body = orjson.loads(embeddings_json(embeddings(), request, "m"))
    assert [item["receipt"] for item in body["data"]] == [
        {"tokens": 3, "dropped_tokens": 0, "prompt": {"instruction": "i"}, "reused": None},
        {"tokens": 4, "dropped_tokens": 1, "prompt": None, "reused": None},
    ]


def test_receipt_says_where_a_vector_came_from() -> None:
    request = parse({"input": ["a", "b", "c"], "return_receipt": True})
    reply = replace(embeddings(rows=3), reused=np.array([2, 0, 1], dtype="<i4"))
    body = orjson.loads(embeddings_json(reply, request, "m"))
    assert [item["receipt"]["reused"] for item in body["data"]] == ["cache", None, "in_flight"]


def test_reported_error_replaces_its_vector() -> None:
    request = parse({"input": ["a", " "], "on_error": "report", "return_receipt": True})
    body = orjson.loads(embeddings_json(embeddings(), request, "m"))
    error = invalid("Input at index 1 cannot be empty or whitespace only", "input").body()
    assert body["data"][1] == {"object": "error", "index": 1, "error": error}
    assert body["data"][0]["object"] == "embedding"
    assert orjson.loads(encode_json(embeddings(), request))[1] == {"error": error}


@pytest.mark.parametrize(
    "inputs", [["a", " ", {"text": 7}], [[1], [], ["a"]], [[1], 7, [True]], [{"text": "a"}, {}, {"image": [1]}]]
)
def test_reported_errors_keep_the_number_of_inputs(inputs: Any) -> None:
    request = parse({"input": inputs, "on_error": "report"})
    assert (request.count, sorted(request.errors.by_index)) == (3, [1, 2])
    with pytest.raises(ApiError, match="Input at index 1"):
        parse({"input": inputs})


@pytest.mark.parametrize("name", ["prompt", "input", "text"])
def test_tokenize_forms(name: str) -> None:
    request = schemas.parse_tokenize(as_json({name: ["a", "b"], "instruction": "i"}), SETTINGS)
    assert (request.texts, request.prompt, request.single) == (["a", "b"], Prompt("i"), False)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "input": "a"}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": {"image": "x"}}, "prompt"),
        ({"prompt": ["a"], "on_error": "report"}, "prompt"),
        ({"text": "a", "add_special_tokens": False}, "add_special_tokens"),
    ],
)
def test_invalid_tokenize_requests(body: Any, param: str) -> None:
    assert parse_error(body, schemas.parse_tokenize).param == param
