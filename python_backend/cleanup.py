"""Clean-up after killed servers: stubs without a server, shared memory and directories that nobody uses."""

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Triton's Python backend puts its regions
REGION = "triton_python_backend_shm_region_"
TEMPORARY = Path("/tmp")  # noqa: S108 - where it creates an empty directory, whatever TMPDIR says
ENVIRONMENT = "python_env_"
BACKEND = "libtriton_python.so"
STUB = "triton_python_backend_stub"


def clean_up(stub: Path) -> None:
    """Kill the stubs of this installation whose server is gone, then remove what no process of this user uses.

    Args:
        stub: The file that this installation runs as a stub. Stubs of other installations and of containers are theirs
            to end.
    """
    for process in Path("/proc").glob("[0-9]*"):
        if _is_orphan(process, stub):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(process.name), signal.SIGKILL)
                _wait_for_end(process)
    # Listed before checking their use: new ones may appear meanwhile.
    regions, environments = list(SHARED_MEMORY.glob(f"{REGION}*")), list(TEMPORARY.glob(f"{ENVIRONMENT}*"))
    maps = dict(_maps())
    in_use = {name for text in maps.values() for name in re.findall(rf"{REGION}[\w-]+", text)}
    for region in regions:
        with contextlib.suppress(FileNotFoundError):  # another server may be cleaning up too
            if region.name not in in_use and region.stat().st_uid == os.getuid():
                region.unlink()
    starts = [start for pid, text in maps.items() if BACKEND in text and (start := _start_time(pid)) is not None]
    for environment in environments:
        with contextlib.suppress(OSError):  # not empty, of another user, or removed meanwhile
            status = environment.lstat()
            # A server creates its directory after its own start; nothing tells which of the later ones is whose.
            if status.st_uid == os.getuid() and not any(start <= _ticks(status.st_mtime) for start in starts):
                environment.rmdir()


def _wait_for_end(process: Path, seconds: float = 2.0) -> None:
    """Wait for a killed process to release its memory."""
    deadline = time.monotonic() + seconds
    while _command(process) and time.monotonic() < deadline:
        time.sleep(0.005)


def _is_orphan(process: Path, stub: Path) -> bool:
    """Return whether a process runs `stub` and the server that started it is gone.

    A server, which may be any program with Triton inside, is older than its stubs; a younger process has its pid now.
    In another pid namespace, a container's, the pid on the command line means another process.
    """
    words = _command(process)
    if len(words) < 6 or Path(words[0]).name != STUB or not words[5].isdigit():
        return False  # stub, model.py, region, its size, its growth, the server's pid, ...
    try:
        if not (process / "exe").samefile(stub) or not (process / "ns" / "pid").samefile("/proc/self/ns/pid"):
            return False
    except OSError:
        return False
    server, own = _start_time(int(words[5])), _start_time(int(process.name))
    return own is not None and (server is None or server > own)


def _start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks since the boot, or None if it has ended."""
    try:
        state, *fields = Path("/proc", str(pid), "stat").read_text(errors="replace").rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else int(fields[18])


def _command(process: Path) -> list[str]:
    """Return the words of a process's command line, or none if it has ended."""
    try:
        line = (process / "cmdline").read_bytes().decode(errors="replace").rstrip("\0")
    except OSError:
        return []
    return line.split("\0") if line else []


def _maps() -> Iterator[tuple[int, str]]:
    """Yield the pid and the memory map of each process of this user."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            yield int(maps.parent.name), maps.read_text(errors="replace")


def _ticks(seconds: float) -> float:
    """Convert a time of the clock to clock ticks since the boot, a minute late, because the clock may have been set."""
    boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return (seconds + 60 - boot) * os.sysconf("SC_CLK_TCK")
