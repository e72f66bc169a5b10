"""Tests of JsonFile: values of every type are read, and every error names file, key and value."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_embed.python_backend.checkpoint.json_file import JsonFile, read_json
from triton_embed.python_backend.errors import ConfigError

VALUES = {
    "count": 7,
    "zero": 0,
    "minus": -3,
    "share": 0.5,
    "tiny": 1e-12,
    "name": "Müller 你好",
    "on": True,
    "off": False,
    "none": None,
    "sizes": [1, 2],
    "inner": {"count": 3, "name": 4, "deeper": {"off": 1}},
}


@pytest.fixture
def file(tmp_path: Path) -> JsonFile:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(VALUES, ensure_ascii=False), encoding="utf-8")
    return JsonFile(path, required=True)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("count", int),
        ("zero", int),
        ("minus", int),
        ("share", float),
        ("name", str),
        ("on", bool),
        ("off", bool),
        ("sizes", list),
        ("inner", dict),
        ("count", (int, dict)),
        ("inner", (int, dict)),
    ],
    ids=str,
)
def test_value_of_the_expected_type_is_returned(file: JsonFile, key: str, kind: Any) -> None:
    for value in (file.get(key, kind, "default"), file.require(key, kind)):
        assert (type(value), value) == (type(VALUES[key]), VALUES[key])


@pytest.mark.parametrize("key", ["none", "absent"])
def test_missing_or_null_key_yields_the_default(file: JsonFile, key: str) -> None:
    assert not file.has(key)
    assert file.get(key, int, 5) == 5
    assert file.get(key, str, None) is None
    assert file.positive_float(key, 0.25) == 0.25
    assert file.nested(key).values == {}
    with pytest.raises(ConfigError, match=f"'{key}' is missing"):
        file.require(key, int)


@pytest.mark.parametrize("key", [key for key in VALUES if key != "none"])
def test_false_zero_and_empty_values_count_as_present(file: JsonFile, key: str) -> None:
    assert file.has(key)


def test_integer_is_accepted_as_float(file: JsonFile) -> None:
    value = file.get("count", float, 0.0)
    assert (type(value), value) == (float, 7.0)


@pytest.mark.parametrize(
    ("key", "kind", "expected_types"),
    [
        ("on", int, "int"),  # in Python, bool is a subclass of int
        ("off", float, "float"),
        ("count", bool, "bool"),
        ("zero", bool, "bool"),
        ("share", int, "int"),
        ("name", int, "int"),
        ("count", str, "str"),
        ("sizes", dict, "dict"),
        ("inner", list, "list"),
        ("name", (int, dict), "int or dict"),
        ("on", (int, dict), "int or dict"),
    ],
    ids=str,
)
def test_wrong_type_error_names_file_key_and_value(file: JsonFile, key: str, kind: Any, expected_types: str) -> None:
    message = re.escape(f"{file.path}: {key} is {VALUES[key]!r}; expected type {expected_types}")
    with pytest.raises(ConfigError, match=message):
        file.get(key, kind, None)
    with pytest.raises(ConfigError, match=message):
        file.require(key, kind)


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda file: file.require("absent", int), "'absent' is missing"),
        (lambda file: file.require("none", str), "'none' is missing"),
        (lambda file: file.positive_int("absent"), "'absent' is missing"),
        (lambda file: file.positive_int("none"), "'none' is missing"),
        (lambda file: file.positive_float("absent"), "'absent' is missing"),
        (lambda file: file.positive_int("zero"), "zero is 0; must be above 0"),
        (lambda file: file.positive_int("minus"), "minus is -3; must be above 0"),
        (lambda file: file.positive_int("share"), "share is 0.5; expected type int"),
        (lambda file: file.positive_int("on"), "on is True; expected type int"),
        (lambda file: file.positive_float("zero"), "zero is 0; must be above 0"),
        (lambda file: file.positive_float("minus", 1.0), "minus is -3; must be above 0"),
        (lambda file: file.positive_float("name"), "name is 'Müller 你好'; expected type float"),
        (lambda file: file.nested("count"), "count is 7; expected type dict"),
        (lambda file: file.nested("sizes"), "sizes is [1, 2]; expected type dict"),
        (lambda file: file.nested("inner").require("name", str), "inner: name is 4; expected type str"),
        (lambda file: file.nested("inner").positive_int("absent"), "inner: 'absent' is missing"),
        (lambda file: file.nested("inner").nested("deeper").get("off", bool, True), "inner: deeper: off is 1"),
        (lambda file: _raise(file.error("sizes", "must be even")), "sizes is [1, 2]; must be even"),
        (lambda file: _raise(file.error("absent", "must be even")), "absent is None; must be even"),
    ],
)
def test_error_names_file_key_and_value(file: JsonFile, read: Callable[[JsonFile], object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(file)
    assert str(error.value).startswith(f"{file.path}: {message}")


def _raise(error: Exception) -> None:
    raise error


def test_positive_numbers_are_returned(file: JsonFile) -> None:
    assert (file.positive_int("count"), file.nested("inner").positive_int("count")) == (7, 3)
    assert (file.positive_float("tiny"), file.positive_float("share", 2.0), file.positive_float("count")) == (
        1e-12,
        0.5,
        7.0,
    )
    assert type(file.positive_float("count")) is float


def test_missing_optional_file_is_empty(tmp_path: Path) -> None:
    file = JsonFile(tmp_path / "absent.json")
    assert file.values == {}
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'absent.json'}: 'key' is missing")):
        file.require("key", int)


@pytest.mark.parametrize("prepare", [lambda path: None, Path.mkdir], ids=["nothing", "a directory"])
def test_missing_required_file_is_an_error(tmp_path: Path, prepare: Callable[[Path], None]) -> None:
    path = tmp_path / "config.json"
    prepare(path)
    with pytest.raises(ConfigError, match=re.escape(f"{path} is missing")):
        JsonFile(path, required=True)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\x00", b"{'a': 1}", b"\xff\xfe{}", b'{"a": "\xe4"}', b"{}{}"], ids=str
)
@pytest.mark.parametrize("kind", [dict, list])
def test_invalid_json_is_an_error(tmp_path: Path, kind: type, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(f"{path} is not valid JSON: ")):
        read_json(path, kind)


@pytest.mark.parametrize(
    ("content", "kind", "expected"),
    [
        ("[]", dict, "object"),
        ("7", dict, "object"),
        ("null", dict, "object"),
        ("{}", list, "list"),
        ('""', list, "list"),
    ],
)
def test_wrong_top_level_type_is_an_error(tmp_path: Path, content: str, kind: type, expected: str) -> None:
    path = tmp_path / "modules.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(f"{path} does not contain a JSON {expected}")):
        read_json(path, kind)


@pytest.mark.parametrize("kind", [dict, list])
def test_missing_file_reads_as_an_empty_value(tmp_path: Path, kind: type) -> None:
    assert read_json(tmp_path / "absent.json", kind) == kind()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.text(), JSON, max_size=5))
def test_any_json_object_is_read_as_written(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("any") / "config.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    file = JsonFile(path)
    assert file.values == values
    assert {key for key in values if file.has(key)} == {key for key, value in values.items() if value is not None}
