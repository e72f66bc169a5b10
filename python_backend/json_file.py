"""A checkpoint's JSON files, read key by key: every fault names file, key and value."""

import json
from pathlib import Path
from typing import Any

from triton_embed.python_backend.errors import ConfigError


class JsonFile:
    """A JSON object of a checkpoint; empty where there is no file and none is required.

    ConfigError, naming file, key and value: no file, no JSON object, a missing key or a value of another kind.
    """

    def __init__(self, path: Path, required: bool = False) -> None:
        if required and not path.is_file():
            raise ConfigError(f"{path} is missing")
        self.path: Path | str = path
        self.values: dict[str, Any] = read_json(path, dict)

    def nested(self, key: str) -> "JsonFile":
        """The object under a key, read the same way; empty where there is none."""
        found = object.__new__(JsonFile)
        found.path, found.values = f"{self.path}: {key}", self.get(key, dict, {})
        return found

    def has(self, key: str) -> bool:
        """Whether the key is there with a value; null is none."""
        return self.values.get(key) is not None

    def get(self, key: str, kind: type | tuple[type, ...], default: Any) -> Any:
        """The value, of this kind, or the default where there is none."""
        if not self.has(key):
            return default
        value = self.values[key]
        if kind is float and type(value) is int:
            return float(value)  # JSON writes 1e6 as 1000000
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            raise self.refuse(key, f"not of type {' or '.join(k.__name__ for k in kinds)}")
        return value

    def need(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """The value, which must be there."""
        if not self.has(key):
            raise ConfigError(f"{self.path}: '{key}' is missing")
        return self.get(key, kind, None)

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number above 0, which must be there unless it has a default."""
        value: int = self.need(key, int) if default is None else self.get(key, int, default)
        if value < 1:
            raise self.refuse(key, "not above 0")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """A number above 0, which must be there unless it has a default."""
        value: float = self.need(key, float) if default is None else self.get(key, float, default)
        if value <= 0:
            raise self.refuse(key, "not above 0")
        return value

    def refuse(self, key: str, why: str) -> ConfigError:
        """The error that names this file, the key and its value."""
        return ConfigError(f"{self.path}: {key} is {self.values.get(key)!r}, {why}")


def read_json(path: Path, kind: type) -> Any:
    """A JSON file that holds a dict or a list, as `kind` says; an empty one where there is no file.

    ConfigError: it is not JSON, or holds something else.
    """
    if not path.is_file():
        return kind()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, kind):
        raise ConfigError(f"{path} does not hold a JSON {'object' if kind is dict else 'list'}")
    return found
