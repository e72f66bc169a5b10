"""Scratch directories, removed by the next start if their process was killed before it could."""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "triton-embed-"
# Locked as long as the process lives, in whatever container: process ids mean nothing in another one.
_LOCK = "lock"


@contextlib.contextmanager
def scratch_directory(kind: str = "") -> Iterator[Path]:
    """Yield a new directory that only this user can read. Remove those of this user whose process was killed.

    Raises:
        OSError: if no directory for temporary files is writable.
    """
    try:
        parent = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise OSError(f"{error.strerror}: make one writable, or set TMPDIR to one that is") from None
    _remove_abandoned(Path(parent))
    with tempfile.TemporaryDirectory(prefix=PREFIX + kind) as name:
        directory = Path(name)
        with (directory / f"{_LOCK}.new").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            Path(lock.name).rename(directory / _LOCK)  # locked before `_remove_abandoned` of another process finds it
            yield directory


def _remove_abandoned(parent: Path) -> None:
    for directory in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # in use, of another user, or removed meanwhile
            status = directory.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():
                with (directory / _LOCK).open() as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(directory)
