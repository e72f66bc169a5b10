"""JSON objects validated by pydantic models, with error messages that name the field and what it must be."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from triton_embed.gateway.errors import invalid

JSON_TYPES: Final[dict[type, str]] = {
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
}

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
    """Parse a request body into its fields.

    Raises:
        ApiError: 400 if it is not a JSON object.
    """
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise invalid(f"The request body is not valid JSON: {error}", None) from None
    if type(fields) is not dict:
        raise invalid(f"The request body must be a JSON object, got {json_type(fields)}", None)
    return fields


def validate(model: type[M], fields: dict[str, Any], param: str | None = None, where: str = "") -> M:
    """Return the fields of an object as a `model`.

    Args:
        param: Name of the field to report, if it is not the invalid field itself.
        where: Prefix of messages that names an input, such as "Input at index 3: ".

    Raises:
        ApiError: 400 for the first invalid field, in the order in which the model declares them.
    """
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
