"""What one input may be beside a string or token ids: an object of text and images, or a list of content parts.

Images stay what the caller sent - a data: URI, base64 or an http(s) URL - until media.py makes bytes of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from triton_embed.gateway.errors import ApiError, invalid

WORDS: Final[dict[type, str]] = {
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
KEYS = ("text", "image", "image_url", "instruction")
PART_TYPES = ("text", "image_url", "image")  # of OpenAI's messages, and of Qwen's
IMAGE_URL_KEYS = ("url", "detail")  # `detail` asks OpenAI for a resolution: the model's own rules say that here

# For the OpenAPI page; the rules themselves are the functions below.
_IMAGE_SCHEMA: Final[dict[str, Any]] = {
    "description": "A data: URI, base64, or an http(s) URL; a list of them is several images in one input",
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
}
_IMAGE_URL_SCHEMA: Final[dict[str, Any]] = {
    "anyOf": [{"type": "string"}, {"type": "object", "required": ["url"], "properties": {"url": {"type": "string"}}}]
}
ITEM_SCHEMA: Final[dict[str, Any]] = {
    "description": "One input of a text, an image, or both together where the model can",
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "image": _IMAGE_SCHEMA,
        "image_url": _IMAGE_URL_SCHEMA,
        "instruction": {"type": "string", "description": "The same for every input"},
    },
    "additionalProperties": False,
}
PARTS_SCHEMA: Final[dict[str, Any]] = {
    "description": "Content parts: the parts of one input",
    "type": "array",
    "items": {
        "type": "object",
        "required": ["type"],
        "properties": {
            "type": {"enum": list(PART_TYPES)},
            "text": {"type": "string"},
            "image_url": _IMAGE_URL_SCHEMA,
            "image": _IMAGE_SCHEMA,
        },
    },
}


@dataclass(frozen=True, slots=True)
class Item:
    """One input; `text` or `images` may be empty, not both."""

    text: str
    images: tuple[str, ...] = ()
    instruction: str | None = None


def is_part(item: Any) -> bool:
    """Whether an object is a content part rather than an input of its own."""
    return type(item) is dict and "type" in item


def read_items(given: Sequence[Any], param: str) -> list[Item]:
    """Every input of a list of strings, objects and lists of content parts. ApiError 400 names index and key."""
    return [_item(i, item, param) for i, item in enumerate(given)]


def shared_instruction(items: Iterable[Item], outer: str | None, param: str) -> str | None:
    """The one instruction of a request. ApiError 400: an item's differs from another's or from `outer`."""
    given = [item.instruction or outer for item in items]
    for i, instruction in enumerate(given):
        if instruction != (outer or given[0]):
            message = f"Input at index {i}: instruction per item is not supported: send it for the whole request"
            raise invalid(message, param)
    return given[0]


def refused(index: int, item: Any, wanted: str, param: str) -> ApiError:
    """An input of the wrong kind."""
    return invalid(f"Input at index {index} must be {wanted}, got {WORDS[type(item)]}", param)


def check_keys(where: str, given: dict[str, Any], known: Sequence[str], param: str) -> None:
    """ApiError 400 for the first key that is not `known`."""
    for key in given:
        if key not in known:
            raise invalid(f"{where} has an unknown key '{key[:100]}'; known are {', '.join(known)}", param)


def _item(index: int, given: Any, param: str) -> Item:
    where = f"Input at index {index}"
    if type(given) is str:
        item = Item(given)
    elif is_part(given):
        raise invalid(f"{where} is a content part: put the parts of one input in a list of their own", param)
    elif type(given) is dict:
        item = _object(where, given, param)
    elif type(given) is list:
        item = _parts(where, given, param)
    else:
        raise refused(index, given, "a string, an object or a list of content parts", param)
    if item.text and not item.text.isspace():
        return item
    if not item.images:
        raise invalid(f"{where} cannot be empty or whitespace only", param)
    return Item("", item.images, item.instruction)


def _object(where: str, given: dict[str, Any], param: str) -> Item:
    check_keys(where, given, KEYS, param)
    return Item(
        _string(where, "text", given.get("text"), param),
        (
            *_images(where, "image", given.get("image"), param),
            *_images(where, "image_url", given.get("image_url"), param),
        ),
        _string(where, "instruction", given.get("instruction"), param) or None,
    )


def _parts(where: str, given: list[Any], param: str) -> Item:
    """Texts are joined by line breaks; images come before the text, wherever they stood: so the models were trained."""
    texts: list[str] = []
    images: list[str] = []
    for i, part in enumerate(given):
        here = f"{where}, content part {i}"
        if not is_part(part):
            raise invalid(f"{here} must be an object with a type", param)
        kind = part["type"]
        if kind not in PART_TYPES:
            raise invalid(f"{here} has no type that is known here: {', '.join(PART_TYPES)}", param)
        check_keys(here, part, ("type", kind), param)
        if part.get(kind) is None:
            raise invalid(f"{here} has no {kind}", param)
        if kind == "text":
            texts.append(_string(here, kind, part[kind], param))
        else:
            images += _images(here, kind, part[kind], param)
    return Item("\n".join(texts), tuple(images))


def _string(where: str, key: str, value: Any, param: str) -> str:
    if value is None:
        return ""
    if type(value) is not str:
        raise invalid(f"{where}: {key} must be a string, got {WORDS[type(value)]}", param)
    return value


def _images(where: str, key: str, value: Any, param: str) -> Iterable[str]:
    """One or several; each as it is or as {"url": …}."""
    if value is None:
        return
    for one in value if type(value) is list else [value]:
        if type(one) is dict:
            check_keys(f"{where}: {key}", one, IMAGE_URL_KEYS, param)
            one = one.get("url")
        if type(one) is not str:
            wanted = "a data: URI, base64 or an http(s) URL"
            raise invalid(f"{where}: {key} must be {wanted}, got {WORDS[type(one)]}", param)
        if not one or one.isspace():
            raise invalid(f"{where}: {key} cannot be empty", param)
        yield one
