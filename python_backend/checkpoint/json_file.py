"""Typed access to a checkpoint's JSON files: every error names file, key and value."""

import json
from pathlib import Path
from typing import Any

from triton_embed.python_backend.checkpoint.git_lfs import is_pointer
from triton_embed.python_backend.errors import ConfigError


class MissingKeyError(ConfigError):
    """A required key of a JSON file that is missing."""


class JsonFile:
    """A JSON object of a checkpoint; empty if the file does not exist and is not required.

    Raises:
        ConfigError: The file is missing, is not a JSON object, lacks a key, or has a value of the wrong type.
    """

    def __init__(self, path: Path, required: bool = False) -> None:
        if required and not path.is_file():
            raise ConfigError(f"{path} is missing")
        self.path: Path | str = path
        self.values: dict[str, Any] = read_json(path, dict)

    def nested(self, key: str) -> "JsonFile":
        """Return the object under a key as a JsonFile; empty if the key is missing."""
        inner = object.__new__(JsonFile)
        inner.path, inner.values = f"{self.path}: {key}", self.get(key, dict, {})
        return inner

    def has(self, key: str) -> bool:
        """Return whether the key has a value; null counts as missing."""
        return self.values.get(key) is not None

    def get(self, key: str, kind: type | tuple[type, ...], default: Any) -> Any:
        """Return the value, checked to be of type `kind`, or the default if the key is missing."""
        if not self.has(key):
            return default
        value = self.values[key]
        if kind is float and type(value) is int:
            return float(value)  # a JSON file may contain 1000000 for 1e6
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            raise self.error(key, f"expected type {' or '.join(k.__name__ for k in kinds)}")
        return value

    def require(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """Return the value of a required key, checked to be of type `kind`."""
        if not self.has(key):
            raise MissingKeyError(f"{self.path}: '{key}' is missing")
        return self.get(key, kind, None)

    def positive_int(self, key: str) -> int:
        """Return the integer above 0 of a required key."""
        value: int = self.require(key, int)
        if value < 1:
            raise self.error(key, "must be above 0")
        return value

    def positive_float(self, key: str, default: float | None = None) -> float:
        """Return a number above 0; the key is required if `default` is None."""
        value: float = self.require(key, float) if default is None else self.get(key, float, default)
        if value <= 0:
            raise self.error(key, "must be above 0")
        return value

    def error(self, key: str, reason: str) -> ConfigError:
        """Build an error that names this file, the key, its value and the reason."""
        return ConfigError(f"{self.path}: {key} is {self.values.get(key)!r}; {reason}")


def read_json(path: Path, kind: type) -> Any:
    """Read a JSON file whose top level is a dict or a list, as `kind` says; return an empty one if it does not exist.

    Raises:
        ConfigError: The file is not valid JSON, or its top level is of another type.
    """
    if not path.is_file():
        return kind()
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        if is_pointer(path):
            raise ConfigError(f"{path} is a git-lfs pointer, not the file: run git lfs pull") from None
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, kind):
        raise ConfigError(f"{path} does not contain a JSON {'object' if kind is dict else 'list'}")
    return value
