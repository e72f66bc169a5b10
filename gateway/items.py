"""What one input may be beside a string or token ids: an object of text and images, or a list of content parts.

Images stay what the caller sent - a data: URI, base64 or an http(s) URL - until media.py makes bytes of them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar

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
PROMPT_KEYS = ("instruction", "prompt_name", "input_type")
KEYS = ("text", "image", "image_url", *PROMPT_KEYS)
# Cohere's and Voyage's words for the two sides of a search.
INPUT_TYPES: Final[dict[str, str]] = {
    "query": "query",
    "document": "document",
    "passage": "document",
    "search_query": "query",
    "search_document": "document",
}
PART_TYPES = ("text", "image_url", "image")  # of OpenAI's messages, and of Qwen's
IMAGE_URL_KEYS = ("url", "detail")  # `detail` asks OpenAI for a resolution: the model's own rules say that here

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prompt:
    """How the caller wants an input to be prompted: at most one of the first two, as far as anybody has checked."""

    instruction: str | None = None
    prompt_name: str | None = None
    input_type: str | None = None  # query or document

    def __bool__(self) -> bool:
        return self != NO_PROMPT

    def parameters(self) -> dict[str, str]:
        """What travels to the model: only what was given."""
        given = {"instruction": self.instruction, "prompt_name": self.prompt_name}
        return {name: value for name, value in given.items() if value is not None}


NO_PROMPT = Prompt()


@dataclass(frozen=True, slots=True)
class Item:
    """One input; `text` or `images` may be empty, not both."""

    text: str
    images: tuple[str, ...] = ()
    prompt: Prompt = NO_PROMPT


NO_ITEM = Item("")  # in the place of one that is at fault


@dataclass(frozen=True, slots=True)
class Faults:
    """The inputs of a request that cannot be embedded, by index.

    The first of them ends the request, unless the caller asked for a `report` of them all.
    """

    report: bool = False
    found: dict[int, ApiError] = field(default_factory=dict)

    def add(self, index: int, error: ApiError) -> None:
        """ApiError: `error` itself, where nobody asked for a report. The first one of an input counts."""
        if not self.report:
            raise error
        self.found.setdefault(index, error)

    def attempt(self, index: int, step: Callable[[], T], instead: T) -> T:
        """What `step` gives, or `instead` when it finds fault with the input."""
        try:
            return step()
        except ApiError as error:
            self.add(index, error)
            return instead


def is_part(item: Any) -> bool:
    """Whether an object is a content part rather than an input of its own."""
    return type(item) is dict and "type" in item


def read_items(given: Sequence[Any], param: str, faults: Faults) -> list[Item]:
    """Every input of a list of strings, objects and lists of content parts. ApiError 400 names index and key."""
    return [faults.attempt(i, partial(_item, i, item, param), NO_ITEM) for i, item in enumerate(given)]


def read_prompt(fields: dict[str, Any], param: str | None = None, where: str = "") -> Prompt:
    """The three keys that say how to prompt. An empty prompt_name is no prompt at all, not even the model's default.

    `param` and `where` name an input rather than the request. ApiError 400: of the wrong kind, or contradictory.
    """
    instruction, name, side = (_text(fields, key, param, where) for key in PROMPT_KEYS)
    instruction, side = instruction or None, side or None
    if instruction and name:
        raise invalid(f"{where}Send either instruction or prompt_name", param or "prompt_name")
    if instruction and "\0" in instruction:  # Triton's parameters end there
        raise invalid(f"{where}instruction must not hold a NUL character", param or "instruction")
    if side and side.lower() not in INPUT_TYPES:
        message = f"{where}input_type must be 'query' or 'document', got '{side[:100]}'"
        raise invalid(message, param or "input_type")
    side = INPUT_TYPES[side.lower()] if side else None
    if side == "document" and instruction:
        message = f"{where}instruction is for queries, and input_type says 'document'"
        raise invalid(message, param or "instruction")
    return Prompt(instruction, None if instruction else name, side)


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
    return Item("", item.images, item.prompt)


def _object(where: str, given: dict[str, Any], param: str) -> Item:
    check_keys(where, given, KEYS, param)
    return Item(
        _string(where, "text", given.get("text"), param),
        (
            *_images(where, "image", given.get("image"), param),
            *_images(where, "image_url", given.get("image_url"), param),
        ),
        read_prompt(given, param, f"{where}: ") if any(key in given for key in PROMPT_KEYS) else NO_PROMPT,
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


def _text(fields: dict[str, Any], key: str, param: str | None, where: str) -> str | None:
    value = fields.get(key)
    if value is not None and type(value) is not str:
        raise invalid(f"{where}{key} must be a string, got {WORDS[type(value)]}", param or key)
    return value


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
