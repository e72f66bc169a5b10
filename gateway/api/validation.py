"""JSON objects validated by pydantic models, with error messages that name the field and what it must be."""

import codecs
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from triton_embed.gateway.errors import ApiError, invalid

JSON_TYPES: Final[dict[type, str]] = {
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
}

# What is wrong with a string that `is_text` refuses.
HALF_CHARACTER: Final = "holds half of a character: a lone surrogate, as when an emoji is cut in two"

M = TypeVar("M", bound=BaseModel)


def json_type(value: Any) -> str:
    """Return the type of a JSON value, with its article."""
    return JSON_TYPES[type(value)]


def quoted(value: Any) -> str:
    """Return the beginning of a value in quotes."""
    return f"'{str(value)[:100]}'"


@dataclass(frozen=True, slots=True)
class Expected:
    """The error message of a field, as metadata of its type: "FIELD must be `words`, got `got(value)`"."""

    words: str
    got: Callable[[Any], str] | None = json_type

    def message(self, name: str, value: Any) -> str:
        return f"{name} must be {self.words}" + (f", got {self.got(value)}" if self.got else "")


# For fields without an `Expected`, by pydantic's type of error.
DEFAULT_EXPECTED: Final = {"string_type": Expected("a string"), "bool_type": Expected("a boolean")}


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse a request body into its fields. A string may hold lone surrogates, see `is_text`.

    Raises:
        ApiError: 400 if it is not a JSON object.
    """
    body = body.removeprefix(codecs.BOM_UTF8)
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        refused = invalid(f"The request body is not valid JSON: {error}", None)
        if "surrogate" not in str(error):
            raise refused from None
        fields = _parse_with_surrogates(body, refused)
    if type(fields) is not dict:
        raise invalid(f"The request body must be a JSON object, got {json_type(fields)}", None)
    return fields


def _parse_with_surrogates(body: bytes, refused: ApiError) -> Any:
    """Parse JSON with lone surrogates, which orjson refuses: one input's fault must not be that of all others.

    Raises:
        ApiError: `refused`, if something else is wrong too.
    """

    def refuse(_: str) -> None:
        raise ValueError  # NaN and Infinity

    try:
        return json.loads(body.decode(), parse_constant=refuse)
    except (ValueError, RecursionError):
        raise refused from None


def is_text(value: str) -> bool:
    """Return whether a string can be encoded: it has no lone surrogates."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def validate(model: type[M], fields: dict[str, Any], param: str | None = None, where: str = "") -> M:
    """Return the fields of an object as a `model`.

    Args:
        param: Name of the field to report, if it is not the invalid field itself.
        where: Prefix of messages that names an input, such as "Input at index 3: ".

    Raises:
        ApiError: 400 for the first invalid field, in the order in which the model declares them.
    """
    for name, value in fields.items():
        # The readers of fields of any type, which are the inputs, check their strings themselves.
        if type(value) is str and not is_text(value) and _is_typed(model, name):
            raise invalid(f"{where}{name} {HALF_CHARACTER}", param or name)
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name, kind = str(first["loc"][0]), first["type"]
    expected = next((item for item in model.model_fields[name].metadata if isinstance(item, Expected)), None)
    if expected is None and kind == "literal_error":
        choices = first["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
        expected = Expected(f"one of {choices}", quoted)
    message = (expected or DEFAULT_EXPECTED[kind]).message(name, fields.get(name))
    raise invalid(where + message, param or name)


def _is_typed(model: type[BaseModel], name: str) -> bool:
    return name in model.model_fields and model.model_fields[name].annotation is not Any
