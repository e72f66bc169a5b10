"""Tests of request validation, with the exact message of each error."""

import json
import string
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_embed.python_backend.errors import BadRequest
from triton_embed.python_backend.inputs.parameters import (
    Item,
    count_rows,
    parse_parameters,
    parse_prompts,
    read_item,
    unpad_ids,
)

PARAMETER_VALUES = {
    "dimensions": st.integers(),
    "instruction": st.text(),
    "prompt_name": st.text(),
    "truncate": st.sampled_from(["end", "start", "none"]),
    "long_text": st.sampled_from(["truncate", "mean"]),
    "on_error": st.sampled_from(["fail", "report"]),
    "error_format": st.sampled_from(["text", "json"]),
    "timeout_ms": st.integers(min_value=1),
    "prompts": st.text(),
}


@settings(deadline=None)
@given(st.fixed_dictionaries({}, optional=PARAMETER_VALUES))
def test_parameters_are_parsed_from_json(parameters: dict[str, Any]) -> None:
    if "prompts" in parameters and parameters.keys() & {"instruction", "prompt_name"}:
        with pytest.raises(BadRequest, match="Send either prompts or one instruction or prompt_name for all rows"):
            parse_parameters(json.dumps(parameters))
        return
    assert parse_parameters(json.dumps(parameters)) == parameters


def test_empty_parameters_are_an_empty_dict() -> None:
    assert parse_parameters("") == parse_parameters("{}") == {}


@settings(deadline=None)
@given(
    st.text(string.ascii_letters + "_ ", min_size=1).filter(lambda key: key not in PARAMETER_VALUES),
    st.integers() | st.text(),
)
def test_unknown_parameter_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(BadRequest) as raised:
        parse_parameters(json.dumps({key: value}))
    for word in (f"'{key}'", *PARAMETER_VALUES):
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"dimensions": "20"}, "Parameter 'dimensions' must be a whole number, got '20'"),
        ({"dimensions": 20.0}, "Parameter 'dimensions' must be a whole number, got 20.0"),
        ({"dimensions": True}, "Parameter 'dimensions' must be a whole number, got True"),
        ({"dimensions": None}, "Parameter 'dimensions' must be a whole number, got None"),
        ({"instruction": 3}, "Parameter 'instruction' must be a string, got 3"),
        ({"prompt_name": ["query"]}, "Parameter 'prompt_name' must be a string, got ['query']"),
        ({"truncate": False}, "Parameter 'truncate' must be a string, got False"),
        ({"truncate": "END"}, "truncate must be end, start or none, got 'END'"),
        ({"truncate": ""}, "truncate must be end, start or none, got ''"),
        ({"long_text": "split"}, "long_text must be truncate or mean, got 'split'"),
        ({"long_text": True}, "Parameter 'long_text' must be a string, got True"),
        ({"on_error": "ignore"}, "on_error must be fail or report, got 'ignore'"),
        ({"error_format": "xml"}, "error_format must be text or json, got 'xml'"),
        ({"timeout_ms": "50"}, "Parameter 'timeout_ms' must be a whole number, got '50'"),
        ({"timeout_ms": 0}, "timeout_ms must be greater than 0, got 0"),
        ({"timeout_ms": -7}, "timeout_ms must be greater than 0, got -7"),
        ({"prompts": [{}]}, "Parameter 'prompts' must be a string, got [{}]"),
    ],
    ids=str,
)
def test_parameter_of_the_wrong_type_or_value_is_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest) as raised:
        parse_parameters(json.dumps(parameters))
    assert str(raised.value) == message


PROMPT = (
    st.none()
    | st.just({})
    | st.fixed_dictionaries({"instruction": st.text()})
    | st.fixed_dictionaries({"prompt_name": st.text()})
)


@settings(deadline=None)
@given(st.lists(PROMPT, max_size=6))
def test_each_row_may_have_a_prompt(prompts: list[dict[str, str] | None]) -> None:
    assert parse_prompts(json.dumps(prompts), len(prompts)) == [prompt or {} for prompt in prompts]


WRONG_ENTRY = "An entry of prompts must hold an instruction or a prompt_name (input at index 1)"
WRONG_COUNT = "prompts must be a list with an entry for each of the 2 rows, got "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "prompts is not valid JSON"),
        ("[{},", "prompts is not valid JSON"),
        ("[" * 100_000, "prompts is not valid JSON"),
        ("{}", f"{WRONG_COUNT}a value that is not a list"),
        ("null", f"{WRONG_COUNT}a value that is not a list"),
        ("[]", f"{WRONG_COUNT}0 entries"),
        ("[{}]", f"{WRONG_COUNT}1 entries"),
        ("[{}, {}, {}]", f"{WRONG_COUNT}3 entries"),
        ('[{}, "query"]', WRONG_ENTRY),
        ("[{}, []]", WRONG_ENTRY),
        ("[null, false]", WRONG_ENTRY),
        ('[{}, {"instruct": "x"}]', WRONG_ENTRY),
        ('[{}, {"instruction": "x", "prompt_name": "y"}]', WRONG_ENTRY),
        ('[{}, {"instruction": 3}]', "Parameter 'instruction' must be a string, got 3 (input at index 1)"),
        ('[{}, {"prompt_name": null}]', "Parameter 'prompt_name' must be a string, got None (input at index 1)"),
        (r'[{}, {"instruction": "\ud800"}]', "Parameter 'instruction' is not valid Unicode (input at index 1)"),
    ],
    ids=lambda text: text[:40],
)
def test_invalid_prompts_are_refused(text: str, message: str) -> None:
    with pytest.raises(BadRequest) as raised:
        parse_prompts(text, 2)
    assert str(raised.value) == message


def tensor(*rows: list[bytes]) -> np.ndarray:
    return np.array(rows, dtype=np.object_)


@settings(deadline=None)
@given(st.text().filter(lambda text: text.strip()))
def test_text_is_decoded_as_utf_8(text: str) -> None:
    assert read_item(tensor([text.encode()]), None, 0) == Item(text)


@settings(deadline=None)
@given(st.text(st.sampled_from(" \t\r\n\v\f\u00a0\u2003\u3000")))
def test_text_of_white_space_counts_as_empty(text: str) -> None:
    """Leave it out next to an image. The processor refuses it alone."""
    assert read_item(tensor([text.encode()]), tensor([b"x"]), 0) == Item("", (b"x",))


@pytest.mark.parametrize(
    "data", [b"\xff", b"caf\xe9", b"\xc3", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"ok\x80"], ids=str
)
def test_bytes_that_are_not_utf_8_are_refused(data: bytes) -> None:
    with pytest.raises(BadRequest) as raised:
        read_item(tensor([b"a"], [b"b"], [data]), None, 2)
    assert str(raised.value) == "Input at index 2 is not valid UTF-8"


def test_row_is_a_text_or_images_or_both() -> None:
    text = tensor(["caf\u00e9".encode()], [b""], [b" \n"], [b"both"])
    image = tensor([b"", b""], [b"one", b"two"], [b"", b"late"], [b"first", b""])
    assert count_rows(text, image) == 4
    assert [read_item(text, image, i) for i in range(4)] == [
        Item("caf\u00e9"),
        Item("", (b"one", b"two")),
        Item("", (b"late",)),
        Item("both", (b"first",)),
    ]
    assert [read_item(text, None, i) for i in range(4)] == [Item("caf\u00e9"), Item(), Item(), Item("both")]
    assert [read_item(None, tensor([b"\0"], [b""]), i) for i in range(2)] == [Item("", (b"\0",)), Item()]


@pytest.mark.parametrize(
    ("text", "image", "message"),
    [
        (None, None, "Send either TEXT or INPUT_IDS"),
        (tensor([b"a"], [b"b"]), tensor([b"x"]), "TEXT has 2 rows, IMAGE has 1"),
        (tensor([b"a"]), tensor([b"x"], [b"y"], [b"z"]), "TEXT has 1 rows, IMAGE has 3"),
        (tensor([b"a", b"b"]), None, "TEXT must be [rows, 1], got [1, 2]"),
        (np.empty((3, 0), dtype=np.object_), None, "TEXT must be [rows, 1], got [3, 0]"),
    ],
    ids=["neither", "too few images", "too many images", "too wide", "too narrow"],
)
def test_mismatched_tensors_are_refused(text: np.ndarray | None, image: np.ndarray | None, message: str) -> None:
    with pytest.raises(BadRequest) as raised:
        count_rows(text, image)
    assert str(raised.value) == message


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


@settings(deadline=None)
@given(st.lists(st.integers(-5, 30000), max_size=20).filter(lambda v: v and v[-1] != -1), st.integers(0, 20))
def test_only_padding_at_the_end_is_removed(values: list[int], padding: int) -> None:
    assert unpad_ids(ids(*values, *[-1] * padding), 0).tolist() == values


@pytest.mark.parametrize("padding", [0, 1, 9])
def test_row_of_padding_is_refused(padding: int) -> None:
    with pytest.raises(BadRequest) as raised:
        unpad_ids(ids(*[-1] * padding), 11)
    assert str(raised.value) == "Input at index 11 cannot be empty"
