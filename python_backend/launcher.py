"""The `tritonserver` command: finds the real server, checks that it can run, and starts it with safe defaults.

The official binary is used if it exists (NVIDIA's images), else the one in the nvidia-pytriton package. This process
becomes the server (`execve`), so signals and the exit code are the server's own.
"""

import contextlib
import ctypes
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from triton_embed.python_backend.cleanup import STUB, clean_up

OFFICIAL = Path("/opt/tritonserver/bin/tritonserver")

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
