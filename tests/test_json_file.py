"""A checkpoint's JSON, key by key: every kind of value, and every fault named by file, key and value."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_embed.python_backend.errors import ConfigError
from triton_embed.python_backend.json_file import JsonFile, read_json

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
def test_a_value_of_the_kind_asked_for(file: JsonFile, key: str, kind: Any) -> None:
    for found in (file.get(key, kind, "default"), file.need(key, kind)):
        assert (type(found), found) == (type(VALUES[key]), VALUES[key])


@pytest.mark.parametrize("key", ["none", "absent"])
def test_what_is_not_there_is_the_default_and_null_is_not_there(file: JsonFile, key: str) -> None:
    assert not file.has(key)
    assert file.get(key, int, 5) == 5
    assert file.get(key, str, None) is None
    assert file.size(key, 9) == 9
    assert file.positive(key, 0.25) == 0.25
    assert file.nested(key).values == {}
    with pytest.raises(ConfigError, match=f"'{key}' is missing"):
        file.need(key, int)


@pytest.mark.parametrize("key", [key for key in VALUES if key != "none"])
def test_what_is_false_or_empty_is_there(file: JsonFile, key: str) -> None:
    assert file.has(key)


def test_a_whole_number_serves_as_a_float_and_nothing_else_as_another_kind(file: JsonFile) -> None:
    found = file.get("count", float, 0.0)
    assert (type(found), found) == (float, 7.0)


@pytest.mark.parametrize(
    ("key", "kind", "kinds"),
    [
        ("on", int, "int"),  # to Python a bool is an int
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
def test_a_value_of_another_kind_is_named(file: JsonFile, key: str, kind: Any, kinds: str) -> None:
    said = re.escape(f"{file.path}: {key} is {VALUES[key]!r}, not of type {kinds}")
    with pytest.raises(ConfigError, match=said):
        file.get(key, kind, None)
    with pytest.raises(ConfigError, match=said):
        file.need(key, kind)


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (lambda file: file.need("absent", int), "'absent' is missing"),
        (lambda file: file.need("none", str), "'none' is missing"),
        (lambda file: file.size("absent"), "'absent' is missing"),
        (lambda file: file.size("none"), "'none' is missing"),
        (lambda file: file.positive("absent"), "'absent' is missing"),
        (lambda file: file.size("zero"), "zero is 0, not above 0"),
        (lambda file: file.size("zero", 5), "zero is 0, not above 0"),
        (lambda file: file.size("minus"), "minus is -3, not above 0"),
        (lambda file: file.size("share"), "share is 0.5, not of type int"),
        (lambda file: file.size("on"), "on is True, not of type int"),
        (lambda file: file.positive("zero"), "zero is 0, not above 0"),
        (lambda file: file.positive("minus", 1.0), "minus is -3, not above 0"),
        (lambda file: file.positive("name"), "name is 'Müller 你好', not of type float"),
        (lambda file: file.nested("count"), "count is 7, not of type dict"),
        (lambda file: file.nested("sizes"), "sizes is [1, 2], not of type dict"),
        (lambda file: file.nested("inner").need("name", str), "inner: name is 4, not of type str"),
        (lambda file: file.nested("inner").size("absent"), "inner: 'absent' is missing"),
        (lambda file: file.nested("inner").nested("deeper").get("off", bool, True), "inner: deeper: off is 1"),
        (lambda file: _raise(file.refuse("sizes", "which is odd")), "sizes is [1, 2], which is odd"),
        (lambda file: _raise(file.refuse("absent", "which is odd")), "absent is None, which is odd"),
    ],
)
def test_a_refusal_names_file_key_and_value(file: JsonFile, read: Callable[[JsonFile], object], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read(file)
    assert str(refused.value).startswith(f"{file.path}: {said}")


def _raise(error: Exception) -> None:
    raise error


def test_sizes_and_numbers_above_0(file: JsonFile) -> None:
    assert (file.size("count"), file.size("count", 3), file.nested("inner").size("count")) == (7, 7, 3)
    assert (file.positive("tiny"), file.positive("share", 2.0), file.positive("count")) == (1e-12, 0.5, 7.0)
    assert type(file.positive("count")) is float


def test_a_file_that_need_not_be_there(tmp_path: Path) -> None:
    found = JsonFile(tmp_path / "absent.json")
    assert found.values == {}
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'absent.json'}: 'key' is missing")):
        found.need("key", int)


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir], ids=["nothing", "a directory"])
def test_a_file_that_must_be_there(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "config.json"
    make(path)
    with pytest.raises(ConfigError, match=re.escape(f"{path} is missing")):
        JsonFile(path, required=True)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\x00", b"{'a': 1}", b"\xff\xfe{}", b'{"a": "\xe4"}', b"{}{}"], ids=str
)
@pytest.mark.parametrize("kind", [dict, list])
def test_a_file_that_is_no_json(tmp_path: Path, kind: type, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(f"{path} is not valid JSON: ")):
        read_json(path, kind)


@pytest.mark.parametrize(
    ("content", "kind", "says"),
    [
        ("[]", dict, "object"),
        ("7", dict, "object"),
        ("null", dict, "object"),
        ("{}", list, "list"),
        ('""', list, "list"),
    ],
)
def test_a_file_that_holds_something_else(tmp_path: Path, content: str, kind: type, says: str) -> None:
    path = tmp_path / "modules.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(f"{path} does not hold a JSON {says}")):
        read_json(path, kind)


@pytest.mark.parametrize("kind", [dict, list])
def test_no_file_is_an_empty_one(tmp_path: Path, kind: type) -> None:
    assert read_json(tmp_path / "absent.json", kind) == kind()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.text(), JSON, max_size=5))
def test_any_object_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("any") / "config.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    found = JsonFile(path)
    assert found.values == values
    assert {key for key in values if found.has(key)} == {key for key, value in values.items() if value is not None}
