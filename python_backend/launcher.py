"""The `tritonserver` command: finds the real server, checks that it can run, and starts it with safe defaults.

The official binary is used if it exists (NVIDIA's images), else the one in the nvidia-pytriton package. This process
becomes the server (`execve`), so signals and the exit code are the server's own.
"""

import contextlib
import ctypes
import hashlib
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

OFFICIAL = Path("/opt/tritonserver/bin/tritonserver")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Triton's Python backend puts its regions
STUB = "triton_python_backend_stub"
REGION = "triton_python_backend_shm_region_"

# Added unless the caller sets them: nothing listens beyond this machine, and without the last flag Triton imports every
# model.py twice.
DEFAULTS = {
    "--http-address": "127.0.0.1",
    "--grpc-address": "127.0.0.1",
    "--metrics-address": "127.0.0.1",
    "--disable-auto-complete-config": None,
}
# How long an idle OpenMP worker of torch spins before it sleeps. GNU's default is so long that, on a busy machine,
# spinning workers keep the cores from working ones (measured: one short query in a hundred took 355 ms instead of 10).
SPIN_COUNT = "20000"


def main() -> None:
    """Become tritonserver, or exit with one sentence if it cannot run."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("tritonserver: TRITON_INTERPRET=1 runs kernels in a slow interpreter; unset it to serve")
    if not sys.prefix.isascii():  # the Python inside Triton's stub encodes paths as ASCII
        sys.exit(f"tritonserver: Triton's Python backend cannot import from {sys.prefix}: install into a path of ASCII")
    if not os.access("/tmp", os.W_OK | os.X_OK):  # noqa: S108 - fixed in Triton's Python backend, which aborts without
        sys.exit(
            "tritonserver: Triton's Python backend needs to write to /tmp: make it writable, or mount a tmpfs there"
        )
    arguments = with_defaults(sys.argv[1:])
    environment = {"GOMP_SPINCOUNT": SPIN_COUNT, **os.environ, "PATH": search_path()}
    if OFFICIAL.exists():
        binary = OFFICIAL
        backends = OFFICIAL.parents[1] / "backends"
    else:
        check_libpython()
        wheel = wheel_directory()
        binary = wheel / "bin" / "tritonserver"
        backends = backend_directory(wheel)
        if not has_flag(arguments, "--backend-directory"):
            arguments.append(f"--backend-directory={backends}")
        environment["PATH"] = os.pathsep.join([str(Path(sys.prefix) / "bin"), environment["PATH"]])
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(
            filter(None, [sysconfig.get_config_var("LIBDIR"), environment.get("LD_LIBRARY_PATH")])
        )
        check_stub(backends / "python" / STUB, environment)
    clean_up(backends / "python" / STUB)
    os.execve(binary, ["tritonserver", *arguments], environment)  # noqa: S606 - deliberately without a shell


def with_defaults(arguments: Sequence[str]) -> list[str]:
    """Return the caller's arguments with the missing `DEFAULTS` added."""
    missing = [name if value is None else f"{name}={value}" for name, value in DEFAULTS.items()]
    return [*arguments, *(flag for flag in missing if not has_flag(arguments, flag.partition("=")[0]))]


def has_flag(arguments: Sequence[str], name: str) -> bool:
    """Return whether `--name`, `--name VALUE` or `--name=VALUE` is among the arguments."""
    return any(argument.partition("=")[0] == name for argument in arguments)


def search_path() -> str:
    """Return PATH, with the system's directories if bash is in none of its own. Exit if bash is missing there too.

    bash starts each stub, and Triton 2.51 waits for ever for one that it cannot start.
    """
    path = os.environ.get("PATH", "")
    for candidate in (path, os.pathsep.join(filter(None, [path, os.defpath]))):
        if shutil.which("bash", path=candidate):
            return candidate
    sys.exit(f"tritonserver: bash, which Triton's Python backend needs, is not in PATH={path}: install it")


def check_libpython() -> None:
    """Exit unless the shared library of this Python can be loaded: without it Triton's stub hangs while loading."""
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


def check_stub(stub: Path, environment: Mapping[str, str]) -> None:
    """Exit unless the stub runs. Triton 2.51 would take execution away from all users but the owner of its file.

    Without arguments it ends with exit code 1.
    """
    try:
        ended = subprocess.run([stub], env=environment, capture_output=True, text=True, check=False)  # noqa: S603
        reason = "" if ended.returncode == 1 else ended.stderr.strip() or f"exit code {ended.returncode}"
    except OSError as error:
        reason = f"{error.strerror} ({stub.resolve()})"
    if reason:
        sys.exit(f"tritonserver: Triton's Python backend cannot start its stub: {reason}")


def wheel_directory() -> Path:
    """Return the directory of the server in nvidia-pytriton, without importing the package, which is slow."""
    package = find_spec("pytriton")
    if package is None or package.origin is None:
        sys.exit(
            "tritonserver: neither /opt/tritonserver nor the nvidia-pytriton package is installed. "
            "Install the server with: pip install 'triton-embed[server]'"
        )
    return Path(package.origin).parent / "tritonserver"


def backend_directory(wheel: Path) -> Path:
    """Return a directory of links to the wheel's backend and to its stub for this Python.

    It is in this environment, or in a directory of this user if the environment cannot be written to or its path is
    not one word for the shell that starts stubs.
    """
    python = wheel / "backends" / "python"
    stub = wheel / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}" / STUB
    files = (python / "libtriton_python.so", python / "triton_python_backend_utils.py", stub)
    directory = Path(sys.prefix) / "share" / "triton-embed" / "backends"
    try:
        if not is_shell_word(directory):
            raise OSError
        link_files(files, directory / "python")
    except OSError:
        directory = user_directory() / f"backends-{hashlib.sha256(os.fsencode(stub)).hexdigest()[:16]}"
        link_files(files, directory / "python")
    return directory


def link_files(files: Sequence[Path], directory: Path) -> None:
    """Create missing links to files in a directory, and replace wrong ones.

    Raises:
        OSError: The directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for source in files:
        link = directory / source.name
        if not link.is_symlink() or link.readlink() != source:
            # Replaced in one step, because another server may be starting from the same environment.
            temporary = link.with_name(f"{link.name}.{os.getpid()}")
            temporary.symlink_to(source)
            temporary.replace(link)


def user_directory() -> Path:
    """Return a directory that only this user can write to: in the home directory, else in that of temporary files.

    Exit if there is none.
    """
    candidates = [Path(tempfile.gettempdir(), f"triton-embed-{os.getuid()}")]
    with contextlib.suppress(RuntimeError):  # this user has no home directory
        candidates.insert(0, Path.home() / ".cache" / "triton-embed")
    for directory in candidates:
        with contextlib.suppress(OSError):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = directory.lstat()
            private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
            if private and os.access(directory, os.W_OK | os.X_OK) and is_shell_word(directory):
                return directory
    tried = " and ".join(map(str, candidates))
    sys.exit(
        f"tritonserver: of {tried} none is writable for this user alone, without spaces in its path: set HOME or TMPDIR"
    )


def is_shell_word(path: Path) -> bool:
    """Return whether a shell reads a path as one word: the Python backend starts stubs with an unquoted command."""
    return shlex.quote(str(path)) == str(path)


def clean_up(stub: Path) -> None:
    """Kill the stubs of this installation whose server is gone, then remove shared memory that no process uses.

    Args:
        stub: The file that this installation runs as a stub. Stubs of other installations and of containers are theirs
            to end.
    """
    for process in Path("/proc").glob("[0-9]*"):
        if _is_orphan(process, stub):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(process.name), signal.SIGKILL)
                _wait_for_end(process)
    regions = list(SHARED_MEMORY.glob(f"{REGION}*"))  # listed before checking their use: a new one may appear meanwhile
    in_use = _regions_in_use()
    for region in regions:
        with contextlib.suppress(FileNotFoundError):  # another server may be cleaning up too
            if region.name not in in_use and region.stat().st_uid == os.getuid():
                region.unlink()


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


def _regions_in_use() -> set[str]:
    """Return the names of the regions that any readable process has mapped."""
    names: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            names.update(re.findall(rf"{REGION}[\w-]+", maps.read_text(errors="replace")))
        except OSError:
            continue
    return names
