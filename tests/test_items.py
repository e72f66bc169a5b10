"""Objects and content parts as inputs: what each form means, and what is refused with which words."""

from typing import Any

import pytest

from triton_embed.gateway.errors import ApiError
from triton_embed.gateway.items import Item, read_items, shared_instruction


def refusal(*given: Any) -> str:
    with pytest.raises(ApiError) as caught:
        read_items(given, "input")
    assert (caught.value.status, caught.value.param) == (400, "input")
    return caught.value.message


TEXT_PART = {"type": "text", "text": "a"}
IMAGE_PART = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("given", "item"),
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
        ({"text": "a", "instruction": "i"}, Item("a", (), "i")),
        ({"image": "x", "instruction": None}, Item("", ("x",))),
        ([TEXT_PART], Item("a")),
        ([IMAGE_PART], Item("", ("x",))),
        ([TEXT_PART, IMAGE_PART, {"type": "text", "text": "b"}], Item("a\nb", ("x",))),
        ([IMAGE_PART, {"type": "image", "image": "y"}], Item("", ("x", "y"))),
        ([{"type": "image_url", "image_url": "x"}, {"type": "text", "text": ""}], Item("", ("x",))),
    ],
)
def test_forms(given: Any, item: Item) -> None:
    assert read_items(["before", given], "input") == [Item("before"), item]


@pytest.mark.parametrize(
    ("given", "message"),
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
        ({"image_url": {"uri": "x"}}, ": image_url has an unknown key 'uri'; known are url, detail"),
        ({"image": ""}, ": image cannot be empty"),
        ({"text": "a", "image": " "}, ": image cannot be empty"),
        ({"text": "a", "instruction": 7}, ": instruction must be a string, got an integer"),
        ({"text": "a", "video": "x"}, " has an unknown key 'video'; known are text, image, image_url, instruction"),
        ({"text": "a", "": 1}, " has an unknown key ''; known are text, image, image_url, instruction"),
        (TEXT_PART, " is a content part: put the parts of one input in a list of their own"),
        ([TEXT_PART, "a"], ", content part 1 must be an object with a type"),
        ([TEXT_PART, {"text": "a"}], ", content part 1 must be an object with a type"),
        ([7], ", content part 0 must be an object with a type"),
        ([{"type": "input_audio"}], ", content part 0 has no type that is known here: text, image_url, image"),
        ([{"type": ["text"]}], ", content part 0 has no type that is known here: text, image_url, image"),
        ([{"type": "text"}], ", content part 0 has no text"),
        ([{"type": "text", "text": 7}], ", content part 0: text must be a string, got an integer"),
        ([{"type": "image_url", "text": "a"}], ", content part 0 has an unknown key 'text'; known are type, image_url"),
        ([{"type": "image_url", "image_url": None}], ", content part 0 has no image_url"),
        ([{"type": "image_url", "image_url": ""}], ", content part 0: image_url cannot be empty"),
    ],
)
def test_refusals(given: Any, message: str) -> None:
    assert refusal("before", given) == f"Input at index 1{message}"


def test_a_refusal_does_not_echo_a_whole_key() -> None:
    assert len(refusal({"x" * 10**6: 1})) < 300


@pytest.mark.parametrize(
    ("given", "outer", "shared"),
    [
        ([None, None], None, None),
        ([None, None], "i", "i"),
        (["i", None], "i", "i"),
        (["i", "i"], None, "i"),
        (["i"], None, "i"),
    ],
)
def test_one_instruction(given: list[str | None], outer: str | None, shared: str | None) -> None:
    assert shared_instruction([Item("a", (), one) for one in given], outer, "input") == shared


@pytest.mark.parametrize(
    ("given", "outer", "index"),
    [
        (["i", "j"], None, 1),
        (["i", None], None, 1),
        ([None, None, "i"], None, 2),
        ([None, "j"], "i", 1),
        (["j", "j"], "i", 0),
    ],
)
def test_more_than_one_instruction(given: list[str | None], outer: str | None, index: int) -> None:
    with pytest.raises(ApiError) as caught:
        shared_instruction([Item("a", (), one) for one in given], outer, "input")
    expected = f"Input at index {index}: instruction per item is not supported: send it for the whole request"
    assert (caught.value.status, caught.value.message) == (400, expected)
