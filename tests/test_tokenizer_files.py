"""Loading of tokenizers: from the cache, without transformers, they give the ids of transformers' tokenizers."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import CASES, FAMILIES
from test_tokenizer import TEXTS
from transformers import AutoTokenizer

from conftest import MINILM, Family
from triton_embed.python_backend.inputs import tokenizer_files

FIRST_CASES = [next(case.name for case in CASES if case.family == family) for family in FAMILIES]
IDS_WITHOUT_TRANSFORMERS = """
import json, sys
from pathlib import Path
from triton_embed.python_backend.inputs import tokenizer_files
tokenizer, _ = tokenizer_files.load(Path(sys.argv[1]), False)
ids = [encoding.ids for encoding in tokenizer.encode_batch(json.loads(sys.argv[2]))]
print(json.dumps({"ids": ids, "imported": "transformers" in sys.modules}))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".cache" / "triton-embed" / "tokenizers"


@pytest.fixture
def minilm(tmp_path: Path) -> Path:
    """Return a copy of MiniLM's tokenizer that may be changed."""
    directory = tmp_path / "minilm"
    directory.mkdir()
    for path in MINILM.glob("*.json"):
        shutil.copy(path, directory)
    return directory


def ids(directory: Path, texts: list[str]) -> list[list[int]]:
    tokenizer, _ = tokenizer_files.load(directory, False)
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def ids_of_transformers(directory: Path, texts: list[str]) -> list[list[int]]:
    theirs: list[list[int]] = AutoTokenizer.from_pretrained(directory)(texts)["input_ids"]
    return theirs


@pytest.mark.parametrize("name", FIRST_CASES)
def test_cached_tokenizer_gives_the_ids_of_transformers(name: str, tiny: Callable[[str], Family], cache: Path) -> None:
    directory = tiny(name).directory
    expected = ids_of_transformers(directory, TEXTS)
    assert ids(directory, TEXTS) == expected
    assert len(list(cache.iterdir())) == 1
    assert ids(directory, TEXTS) == expected


def test_second_start_does_not_import_transformers(cache: Path) -> None:
    command = [sys.executable, "-c", IDS_WITHOUT_TRANSFORMERS, str(MINILM), json.dumps(TEXTS)]
    first, second = (json.loads(subprocess.check_output(command)) for _ in range(2))
    assert (first["imported"], second["imported"]) == (True, False)
    assert first["ids"] == second["ids"] == ids_of_transformers(MINILM, TEXTS)
    assert cache.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("tokenizer.json", '"with":', '"wiht":'),
        ("tokenizer_config.json", '"do_lower_case": true', '"do_lower_case":false'),
    ],
)
def test_changed_file_is_not_read_from_the_cache(minilm: Path, file: str, old: str, new: str) -> None:
    """Change a file but not its size."""
    text = "Ärger with CASES"
    before = ids(minilm, [text])
    content = (minilm / file).read_text()
    assert content.count(old) == 1
    (minilm / file).write_text(content.replace(old, new))
    assert ids(minilm, [text]) == ids_of_transformers(minilm, [text]) != before


def test_unreadable_cache_is_replaced(minilm: Path, cache: Path) -> None:
    expected = ids(minilm, TEXTS)
    (file,) = cache.iterdir()
    content = file.read_text()
    file.write_text(content[:1000])
    assert ids(minilm, TEXTS) == expected
    assert file.read_text() == content


def test_cache_that_cannot_be_written_is_no_error(minilm: Path, cache: Path) -> None:
    cache.parent.parent.write_text("a file, not a directory")
    assert ids(minilm, TEXTS) == ids_of_transformers(MINILM, TEXTS)


def test_user_without_a_home_directory_has_no_cache(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert ids(minilm, TEXTS) == ids_of_transformers(MINILM, TEXTS)


def test_special_tokens_that_are_split_are_split_at_every_start(minilm: Path) -> None:
    config = json.loads((minilm / "tokenizer_config.json").read_text())
    (minilm / "tokenizer_config.json").write_text(json.dumps({**config, "split_special_tokens": True}))
    text = "[SEP] typed by hand"
    for _ in range(2):
        assert ids(minilm, [text]) == ids_of_transformers(minilm, [text]) != ids_of_transformers(MINILM, [text])
