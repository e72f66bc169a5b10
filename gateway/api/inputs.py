"""The inputs of a request: texts, token ids, objects of text and images, or lists of content parts.

Images stay references (data: URI, base64 or http(s) URL) until the media loader turns them into bytes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from triton_embed.gateway.api.bodies import INPUT_TYPES, PART_TYPES, ImageLink, ItemFields, PromptFields
from triton_embed.gateway.api.validation import HALF_CHARACTER, is_text, json_type, validate
from triton_embed.gateway.errors import ApiError, invalid
from triton_embed.python_backend.wire import instruction_error

PROMPT_FIELDS = tuple(PromptFields.model_fields)
ITEM_KEYS = ("text", "image", "image_url", *PROMPT_FIELDS)
IMAGE_LINK_KEYS = tuple(ImageLink.__annotations__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt of an input. `instruction` and `prompt_name` exclude each other."""

    instruction: str | None = None
    prompt_name: str | None = None
    input_type: str | None = None  # query or document

    def __bool__(self) -> bool:
        return self != NO_PROMPT

    def parameters(self) -> dict[str, str]:
        """Return the request parameters for the model, without those that are unset."""
        parameters = {"instruction": self.instruction, "prompt_name": self.prompt_name}
        return {name: value for name, value in parameters.items() if value is not None}


NO_PROMPT = Prompt()


@dataclass(frozen=True, slots=True)
class Item:
    """One input. `text` or `images` may be empty, but not both."""

    text: str
    images: tuple[str, ...] = ()
    prompt: Prompt = NO_PROMPT


NO_ITEM = Item("")  # placeholder of an invalid input


@dataclass(frozen=True, slots=True)
class InputErrors:
    """The errors of a request's inputs, by index.

    The first error ends the request, unless the caller wants a `report` of all of them.
    """

    report: bool = False
    by_index: dict[int, ApiError] = field(default_factory=dict)

    def add(self, index: int, error: ApiError) -> None:
        """Record the first error of an input.

        Raises:
            ApiError: `error` itself, unless errors are reported.
        """
        if not self.report:
            raise error
        self.by_index.setdefault(index, error)

    def attempt(self, index: int, parse: Callable[[], T], default: T) -> T:
        """Return what `parse` returns, or `default` if it raises an ApiError, which is recorded."""
        try:
            return parse()
        except ApiError as error:
            self.add(index, error)
            return default


def is_part(item: Any) -> bool:
    """Return whether an object is a content part rather than an input."""
    return type(item) is dict and "type" in item


def read_inputs(
    value: Any, param: str, max_inputs: int, errors: InputErrors
) -> tuple[list[str], list[list[int]], Sequence[Item], bool]:
    """Parse the inputs of a request.

    Returns:
        (texts, ids, items, whether it was a single input). Two of the three lists are empty.

    Raises:
        ApiError: 400 naming the index of an invalid input, unless errors are reported, or if there are too many.
    """
    if value is None:
        raise invalid(f"{param} is required", param)
    if value == "" or value == []:
        raise invalid("Input cannot be empty", param)
    if type(value) is str:
        return _texts([value], param, errors), [], (), True
    if type(value) is dict:
        return [], [], read_items([[value] if is_part(value) else value], param, errors), True
    if type(value) is not list:
        raise _wrong_type(0, value, "a string, an object or a list", param)
    first = value[0]
    # The caller checks the count too, but by then an error per input may have been recorded.
    if len(value) > max_inputs and type(first) is not int and not is_part(first):
        raise invalid(f"At most {max_inputs} inputs fit in one request, got {len(value)}", param)
    if type(first) is int:
        return [], _ids([value], param, errors), (), True
    if set(map(type, value)) == {str}:
        return _texts(value, param, errors), [], (), False
    if is_part(first):
        return [], [], read_items([value], param, errors), True
    if type(first) is list and not (first and type(first[0]) is dict):
        return [], _ids(value, param, errors), (), False
    return [], [], read_items(value, param, errors), False


def read_items(values: Sequence[Any], param: str, errors: InputErrors) -> list[Item]:
    """Parse inputs, each a string, an object or a list of content parts.

    Raises:
        ApiError: 400 naming index and key, unless errors are reported.
    """
    return [errors.attempt(i, partial(_item, i, value, param), NO_ITEM) for i, value in enumerate(values)]


def read_prompt(fields: PromptFields, param: str | None = None, where: str = "") -> Prompt:
    """Return the prompt of a request or an input.

    An empty prompt_name means no prompt, not even the model's default.

    Args:
        param: Name of the field to report, if it is not the key itself.
        where: Prefix of messages that names an input, such as "Input at index 3: ".

    Raises:
        ApiError: 400 if a value is invalid or contradicts another.
    """
    instruction, name, side = fields.instruction or None, fields.prompt_name, fields.input_type or None
    if instruction and name:
        raise invalid(f"{where}Send either instruction or prompt_name", param or "prompt_name")
    if instruction and "\0" in instruction:  # Triton would cut the parameter off there
        raise invalid(f"{where}instruction must not hold a NUL character", param or "instruction")
    if instruction and (message := instruction_error(instruction)):
        raise invalid(f"{where}{message}", param or "instruction")
    if side and side.lower() not in INPUT_TYPES:
        message = f"{where}input_type must be 'query' or 'document', got '{side[:100]}'"
        raise invalid(message, param or "input_type")
    side = INPUT_TYPES[side.lower()] if side else None
    if side == "document" and instruction:
        message = f"{where}instruction is for queries, and input_type says 'document'"
        raise invalid(message, param or "instruction")
    return Prompt(instruction, None if instruction else name, side)


def _wrong_type(index: int, item: Any, expected: str, param: str) -> ApiError:
    return invalid(f"Input at index {index} must be {expected}, got {json_type(item)}", param)


def check_keys(where: str, fields: dict[str, Any], allowed: Sequence[str], param: str) -> None:
    """Check that an object has allowed keys only.

    Args:
        where: The subject of the message, such as "Input at index 3".

    Raises:
        ApiError: 400 for the first other key.
    """
    for key in fields:
        if key not in allowed:
            raise invalid(f"{where} has an unknown key '{key[:100]}'; allowed keys are {', '.join(allowed)}", param)


def _texts(texts: list[str], param: str, errors: InputErrors) -> list[str]:
    for i, text in enumerate(texts):
        if not text or text.isspace():
            errors.add(i, invalid(f"Input at index {i} cannot be empty or whitespace only", param))
        elif not is_text(text):
            errors.add(i, invalid(f"Input at index {i} {HALF_CHARACTER}", param))
            texts[i] = ""  # as NO_ITEM, because it cannot be sent
    return texts


def _ids(rows: list[Any], param: str, errors: InputErrors) -> list[list[int]]:
    return [errors.attempt(i, partial(_row_of_ids, i, row, param), []) for i, row in enumerate(rows)]


def _row_of_ids(index: int, row: Any, param: str) -> list[int]:
    if type(row) is not list:
        raise _wrong_type(index, row, "a list of token ids, as the first input is", param)
    if not row:
        raise invalid(f"Input at index {index} cannot be empty", param)
    if set(map(type, row)) != {int}:
        other = next(item for item in row if type(item) is not int)
        raise _wrong_type(index, other, "made of token ids", param)
    return row


def _item(index: int, value: Any, param: str) -> Item:
    where = f"Input at index {index}"
    if type(value) is str:
        item = Item(value)
    elif is_part(value):
        raise invalid(f"{where} is a content part: put the parts of one input in a list", param)
    elif type(value) is dict:
        item = _object(where, value, param)
    elif type(value) is list:
        item = _parts(where, value, param)
    else:
        raise _wrong_type(index, value, "a string, an object or a list of content parts", param)
    if not is_text(item.text):
        raise invalid(f"{where} {HALF_CHARACTER}", param)
    if item.text and not item.text.isspace():
        return item
    if not item.images:
        raise invalid(f"{where} cannot be empty or whitespace only", param)
    return Item("", item.images, item.prompt)


def _object(where: str, fields: dict[str, Any], param: str) -> Item:
    check_keys(where, fields, ITEM_KEYS, param)
    item = validate(ItemFields, fields, param, f"{where}: ")
    images = (*_images(where, "image", item.image, param), *_images(where, "image_url", item.image_url, param))
    return Item(item.text or "", images, read_prompt(item, param, f"{where}: "))


def _parts(where: str, parts: list[Any], param: str) -> Item:
    """Parse content parts. Texts are joined by line breaks, and images come first: the models were trained this way."""
    texts: list[str] = []
    images: list[str] = []
    for i, part in enumerate(parts):
        here = f"{where}, content part {i}"
        if not is_part(part):
            raise invalid(f"{here} must be an object with a type", param)
        kind = part["type"]
        if kind not in PART_TYPES:
            raise invalid(f"{here} must have one of the types {', '.join(PART_TYPES)}", param)
        check_keys(here, part, ("type", kind), param)
        if part.get(kind) is None:
            raise invalid(f"{here} has no {kind}", param)
        if kind == "text":
            if type(part[kind]) is not str:
                raise invalid(f"{here}: text must be a string, got {json_type(part[kind])}", param)
            texts.append(part[kind])
        else:
            images += _images(here, kind, part[kind], param)
    return Item("\n".join(texts), tuple(images))


def _images(where: str, key: str, value: Any, param: str) -> Iterable[str]:
    """Yield one image reference or several, each a string or {"url": …}."""
    if value is None:
        return
    for url in value if type(value) is list else [value]:
        if type(url) is dict:
            check_keys(f"{where}: {key}", url, IMAGE_LINK_KEYS, param)
            url = url.get("url")
        if type(url) is not str:
            expected = "a data: URI, base64 or an http(s) URL"
            raise invalid(f"{where}: {key} must be {expected}, got {json_type(url)}", param)
        if not is_text(url):
            raise invalid(f"{where}: {key} {HALF_CHARACTER}", param)
        if not url or url.isspace():
            raise invalid(f"{where}: {key} cannot be empty", param)
        yield url
