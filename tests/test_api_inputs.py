"""Objects and content parts as inputs: the meaning of each form, and the message of each error."""

from typing import Any

import pytest

from triton_embed.gateway.api import inputs
from triton_embed.gateway.api.bodies import PromptFields
from triton_embed.gateway.api.inputs import InputErrors, Item, Prompt, read_items
from triton_embed.gateway.api.validation import validate
from triton_embed.gateway.errors import ApiError


def read_prompt(fields: dict[str, Any]) -> Prompt:
    return inputs.read_prompt(validate(PromptFields, fields))


def read_error(*values: Any) -> str:
    with pytest.raises(ApiError) as caught:
        read_items(values, "input", InputErrors())
    assert (caught.value.status, caught.value.param) == (400, "input")
    return caught.value.message


ALLOWED_KEYS = "allowed keys are text, image, image_url, instruction, prompt_name, input_type"
TEXT_PART = {"type": "text", "text": "a"}
IMAGE_PART = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("value", "item"),
    [
        ("a", Item("a")),
        ({"text": "a"}, Item("a")),
        ({"text": "a", "image": None}, Item("a")),
        ({"text": "a", "image": []}, Item("a")),
        ({"image": "x"}, Item("", ("x",))),
        ({"image": "x", "text": None}, Item("", ("x",))),
        ({"image": "x", "text": ""}, Item("", ("x",))),
        ({"image": "x", "text": " \n"}, Item("", ("x",))),
        ({"image": {"url": "x"}}, Item("", ("x",))),
        ({"image": ["x", {"url": "y"}]}, Item("", ("x", "y"))),
        ({"image_url": "x"}, Item("", ("x",))),
        ({"image_url": {"url": "x", "detail": "high"}}, Item("", ("x",))),
        ({"image_url": "y", "image": "x"}, Item("", ("x", "y"))),
        ({"text": "a", "image": "x"}, Item("a", ("x",))),
        ({"text": "a", "instruction": "i"}, Item("a", (), Prompt("i"))),
        ({"text": "a", "prompt_name": "q"}, Item("a", (), Prompt(None, "q"))),
        ({"text": "a", "input_type": "Passage"}, Item("a", (), Prompt(None, None, "document"))),
        ({"text": "a", "instruction": "", "input_type": None}, Item("a")),
        ({"image": "x", "instruction": None}, Item("", ("x",))),
        ([TEXT_PART], Item("a")),
        ([IMAGE_PART], Item("", ("x",))),
        ([TEXT_PART, IMAGE_PART, {"type": "text", "text": "b"}], Item("a\nb", ("x",))),
        ([IMAGE_PART, {"type": "image", "image": "y"}], Item("", ("x", "y"))),
        ([{"type": "image_url", "image_url": "x"}, {"type": "text", "text": ""}], Item("", ("x",))),
    ],
)
def test_input_forms(value: Any, item: Item) -> None:
    assert read_items(["before", value], "input", InputErrors()) == [Item("before"), item]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, " must be a string, an object or a list of content parts, got an integer"),
        (None, " must be a string, an object or a list of content parts, got null"),
        (" ", " cannot be empty or whitespace only"),
        ({}, " cannot be empty or whitespace only"),
        ({"text": ""}, " cannot be empty or whitespace only"),
        ({"text": "\t"}, " cannot be empty or whitespace only"),
        ({"text": None, "image": None}, " cannot be empty or whitespace only"),
        ({"instruction": "i"}, " cannot be empty or whitespace only"),
        ({"image": []}, " cannot be empty or whitespace only"),
        ([], " cannot be empty or whitespace only"),
        ([{"type": "text", "text": " "}], " cannot be empty or whitespace only"),
        ({"text": 7}, ": text must be a string, got an integer"),
        ({"text": ["a"]}, ": text must be a string, got a list"),
        ({"image": 7}, ": image must be a data: URI, base64 or an http(s) URL, got an integer"),
        ({"image": ["x", None]}, ": image must be a data: URI, base64 or an http(s) URL, got null"),
        ({"image": [["x"]]}, ": image must be a data: URI, base64 or an http(s) URL, got a list"),
        ({"image_url": {}}, ": image_url must be a data: URI, base64 or an http(s) URL, got null"),
        ({"image_url": {"url": 7}}, ": image_url must be a data: URI, base64 or an http(s) URL, got an integer"),
        ({"image_url": {"uri": "x"}}, ": image_url has an unknown key 'uri'; allowed keys are url, detail"),
        ({"image": ""}, ": image cannot be empty"),
        ({"text": "a", "image": " "}, ": image cannot be empty"),
        ({"text": "a", "instruction": 7}, ": instruction must be a string, got an integer"),
        ({"text": "a", "video": "x"}, f" has an unknown key 'video'; {ALLOWED_KEYS}"),
        ({"text": "a", "": 1}, f" has an unknown key ''; {ALLOWED_KEYS}"),
        ({"text": "a", "instruction": "i", "prompt_name": "q"}, ": Send either instruction or prompt_name"),
        ({"text": "a", "input_type": "both"}, ": input_type must be 'query' or 'document', got 'both'"),
        (TEXT_PART, " is a content part: put the parts of one input in a list"),
        ([TEXT_PART, "a"], ", content part 1 must be an object with a type"),
        ([TEXT_PART, {"text": "a"}], ", content part 1 must be an object with a type"),
        ([7], ", content part 0 must be an object with a type"),
        ([{"type": "input_audio"}], ", content part 0 must have one of the types text, image_url, image"),
        ([{"type": ["text"]}], ", content part 0 must have one of the types text, image_url, image"),
        ([{"type": "text"}], ", content part 0 has no text"),
        ([{"type": "text", "text": 7}], ", content part 0: text must be a string, got an integer"),
        (
            [{"type": "image_url", "text": "a"}],
            ", content part 0 has an unknown key 'text'; allowed keys are type, image_url",
        ),
        ([{"type": "image_url", "image_url": None}], ", content part 0 has no image_url"),
        ([{"type": "image_url", "image_url": ""}], ", content part 0: image_url cannot be empty"),
    ],
)
def test_invalid_inputs(value: Any, message: str) -> None:
    assert read_error("before", value) == f"Input at index 1{message}"


def test_error_truncates_a_long_key() -> None:
    assert len(read_error({"x" * 10**6: 1})) < 300


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, Prompt()),
        ({"instruction": "", "prompt_name": None, "input_type": ""}, Prompt()),
        ({"prompt_name": ""}, Prompt(None, "")),
        ({"instruction": "i", "prompt_name": ""}, Prompt("i")),
        ({"instruction": "i", "input_type": "query"}, Prompt("i", None, "query")),
        ({"prompt_name": "q", "input_type": "document"}, Prompt(None, "q", "document")),
        *(({"input_type": value}, Prompt(None, None, "query")) for value in ("query", "QUERY", "search_query")),
        *(({"input_type": value}, Prompt(None, None, "document")) for value in ("document", "passage")),
        ({"input_type": "search_document"}, Prompt(None, None, "document")),
    ],
)
def test_read_prompt(fields: dict[str, Any], prompt: Prompt) -> None:
    assert read_prompt(fields) == prompt


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"instruction": "i", "prompt_name": "q"}, "Send either instruction or prompt_name", "prompt_name"),
        ({"instruction": 1}, "instruction must be a string, got an integer", "instruction"),
        ({"input_type": "x" * 500}, f"input_type must be 'query' or 'document', got '{'x' * 100}'", "input_type"),
        ({"instruction": "Find\0 it"}, "instruction must not hold a NUL character", "instruction"),
        (
            {"instruction": "i", "input_type": "passage"},
            "instruction is for queries, and input_type says 'document'",
            "instruction",
        ),
    ],
)
def test_invalid_prompts(fields: dict[str, Any], message: str, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_prompt(fields)
    assert (caught.value.status, caught.value.message, caught.value.param) == (400, message, param)


def test_report_records_every_error_and_keeps_the_other_inputs() -> None:
    errors = InputErrors(report=True)
    assert read_items(["a", 7, {"text": "b"}, " "], "input", errors) == [Item("a"), Item(""), Item("b"), Item("")]
    assert {i: error.message.split(" ", 4)[-1] for i, error in errors.by_index.items()} == {
        1: "must be a string, an object or a list of content parts, got an integer",
        3: "cannot be empty or whitespace only",
    }


def test_first_error_of_an_input_is_kept() -> None:
    errors = InputErrors(report=True)
    for message in ("first", "second"):
        errors.add(0, ApiError(400, message))
    assert errors.by_index[0].message == "first"
