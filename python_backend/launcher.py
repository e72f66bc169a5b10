"""The `tritonserver` command: the real server, found, pre-flighted and started with safe defaults.

The official binary is used where it exists (NVIDIA's images), else the one nvidia-pytriton carries. This process
becomes the server (`execve`), so signals and the exit code are the server's own.
"""

import contextlib
import ctypes
import os
import re
import signal
import sys
import sysconfig
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

OFFICIAL = Path("/opt/tritonserver/bin/tritonserver")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Triton's Python backend puts its regions
STUB = "triton_python_backend_stub"
REGION = "triton_python_backend_shm_region_"

# Given unless the caller says otherwise: nothing listens beyond this machine unless asked; without the last one
# every model.py is imported twice.
DEFAULTS = {
    "--http-address": "127.0.0.1",
    "--grpc-address": "127.0.0.1",
    "--metrics-address": "127.0.0.1",
    "--disable-auto-complete-config": None,
}
# How long an idle OpenMP worker of torch spins before it sleeps. GNU's default is so long that on a busy machine
# workers that spin keep those that work off the cores: one short query in a hundred took 355 ms instead of 10.
SPIN_COUNT = "20000"


def main() -> None:
    """Become tritonserver. Exits with one sentence where it cannot run."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("tritonserver: TRITON_INTERPRET=1 runs kernels in a slow interpreter; unset it to serve")
    arguments = with_defaults(sys.argv[1:])
    environment = {"GOMP_SPINCOUNT": SPIN_COUNT, **os.environ}
    if OFFICIAL.exists():
        binary = OFFICIAL
    else:
        check_libpython()
        wheel = wheel_directory()
        binary = wheel / "bin" / "tritonserver"
        if not has_flag(arguments, "--backend-directory"):
            arguments.append(f"--backend-directory={backend_directory(wheel)}")
        environment["PATH"] = os.pathsep.join([str(Path(sys.prefix) / "bin"), environment.get("PATH", "")])
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(
            filter(None, [sysconfig.get_config_var("LIBDIR"), environment.get("LD_LIBRARY_PATH")])
        )
    clean_up_after_the_dead()
    os.execve(binary, ["tritonserver", *arguments], environment)  # noqa: S606 - no shell is the point


def with_defaults(arguments: Sequence[str]) -> list[str]:
    """The caller's arguments, plus each of `DEFAULTS` that the caller left open."""
    missing = [name if value is None else f"{name}={value}" for name, value in DEFAULTS.items()]
    return [*arguments, *(flag for flag in missing if not has_flag(arguments, flag.partition("=")[0]))]


def has_flag(arguments: Sequence[str], name: str) -> bool:
    """Whether `--name`, `--name VALUE` or `--name=VALUE` is among the arguments."""
    return any(argument.partition("=")[0] == name for argument in arguments)


def check_libpython() -> None:
    """Exit unless this Python's own shared library can be loaded: without it Triton's stub hangs while loading."""
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    directory = sysconfig.get_config_var("LIBDIR") or ""
    if not Path(directory, name).is_file():
        try:
            ctypes.CDLL(name)
        except OSError:
            sys.exit(
                f"tritonserver: {name} is missing from {directory}, and Triton's Python backend cannot run without "
                "it. Use a Python built with --enable-shared (Debian and Ubuntu: apt-get install "
                f"libpython{sys.version_info.major}.{sys.version_info.minor})."
            )


def wheel_directory() -> Path:
    """The server that nvidia-pytriton carries. Found without importing it: its import is heavy."""
    package = find_spec("pytriton")
    if package is None or package.origin is None:
        sys.exit("tritonserver: neither /opt/tritonserver nor the nvidia-pytriton package is installed")
    return Path(package.origin).parent / "tritonserver"


def backend_directory(wheel: Path) -> Path:
    """A backend directory of links inside this environment: the wheel's backend with the stub of this Python."""
    python = wheel / "backends" / "python"
    stub = wheel / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}" / STUB
    directory = Path(sys.prefix) / "share" / "triton-embed" / "backends"
    (directory / "python").mkdir(parents=True, exist_ok=True)
    for source in (python / "libtriton_python.so", python / "triton_python_backend_utils.py", stub):
        link = directory / "python" / source.name
        if not link.is_symlink() or link.readlink() != source:
            # Replaced in one step: another server may be starting from the same environment.
            fresh = link.with_name(f"{link.name}.{os.getpid()}")
            fresh.symlink_to(source)
            fresh.replace(link)
    return directory


def clean_up_after_the_dead() -> None:
    """Kill stubs whose server is gone, then remove shared memory that no process has open."""
    for process in Path("/proc").glob("[0-9]*"):
        if (server := _server_of(process)) and not _is_server(server):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(process.name), signal.SIGKILL)
                _wait_for_end(process)
    regions = list(SHARED_MEMORY.glob(f"{REGION}*"))  # before asking who holds them: one may be being made
    held = _regions_in_use()
    for region in regions:
        with contextlib.suppress(FileNotFoundError):  # another server may be cleaning up too
            if region.name not in held and region.stat().st_uid == os.getuid():
                region.unlink()


def _wait_for_end(process: Path, seconds: float = 2.0) -> None:
    """A killed process holds its memory for a moment longer."""
    deadline = time.monotonic() + seconds
    while _command(process) and time.monotonic() < deadline:
        time.sleep(0.005)


def _server_of(process: Path) -> int | None:
    """The pid of the server that a stub was started by; None for any other process."""
    words = _command(process)
    if not words or Path(words[0]).name != STUB:
        return None
    # stub, model.py, region, its size, its growth, the server's pid, ...
    return int(words[5]) if len(words) > 5 and words[5].isdigit() else None


def _is_server(pid: int) -> bool:
    words = _command(Path("/proc") / str(pid))
    return bool(words) and Path(words[0]).name == "tritonserver"


def _command(process: Path) -> list[str]:
    """The words of a process's command line; none for one that has ended."""
    try:
        line = (process / "cmdline").read_bytes().decode(errors="replace").rstrip("\0")
    except OSError:
        return []
    return line.split("\0") if line else []


def _regions_in_use() -> set[str]:
    """Names of the regions that some process of ours has mapped."""
    found: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            found.update(re.findall(rf"{REGION}[\w-]+", maps.read_text(errors="replace")))
        except OSError:
            continue
    return found
