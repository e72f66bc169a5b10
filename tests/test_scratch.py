"""Scratch directories: private, gone with their process, and removed by the next one if it was killed."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from triton_embed.gateway.process.scratch import scratch_directory

HOLD = """
import sys
from triton_embed.gateway.process.scratch import scratch_directory
with scratch_directory("held-") as directory:
    (directory / "file").write_text("content")
    print(directory, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def hold() -> tuple[subprocess.Popen[str], Path]:
    """Start a process that has a scratch directory."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", HOLD], text=True, **pipes)
    assert process.stdout
    return process, Path(process.stdout.readline().strip())


def test_directory_is_private_and_ends_with_its_block(parent: Path) -> None:
    with scratch_directory("models-") as directory:
        assert directory.parent == parent
        assert directory.name.startswith("triton-embed-models-")
        assert directory.stat().st_mode & 0o077 == 0
    assert list(parent.iterdir()) == []


def test_only_directories_of_killed_processes_are_removed(parent: Path) -> None:
    (killed, left), (living, kept) = hold(), hold()
    killed.kill()
    killed.communicate()
    (parent / "triton-embed-unlocked").mkdir()  # of another program, or not locked yet
    (parent / "triton-embed-link").symlink_to(left)
    with scratch_directory():
        assert not left.exists()
        assert (kept / "file").read_text() == "content"
        assert (parent / "triton-embed-unlocked").exists()
    living.communicate("")
    assert not kept.exists()
