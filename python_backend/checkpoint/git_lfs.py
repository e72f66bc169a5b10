"""Pointers of git-lfs, which are what a checkout contains instead of large files until git lfs pull."""

from pathlib import Path

_START = b"version https://git-lfs"


def is_pointer(path: Path) -> bool:
    """Return whether a file is a pointer; False if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(_START)) == _START
    except OSError:
        return False
