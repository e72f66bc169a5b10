"""The `tritonserver` command: safe defaults, errors instead of hangs, clean-up after dead servers only.

Stubs and servers here are bash processes under those names; regions are files in a temporary directory in /dev/shm.
Other servers may run on this machine: no signal of these tests reaches a process that the tests did not start.
"""

import contextlib
import mmap
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PosixPath
from typing import Any

import psutil
import pytest

from triton_embed.python_backend import launcher

SAFE = [
    "--http-address=127.0.0.1",
    "--grpc-address=127.0.0.1",
    "--metrics-address=127.0.0.1",
    "--disable-auto-complete-config",
]


@pytest.mark.parametrize(
    ("arguments", "added"),
    [
        ([], SAFE),
        (["--model-repository", "m"], SAFE),
        (["--http-address=0.0.0.0"], SAFE[1:]),
        (["--http-address", "0.0.0.0"], SAFE[1:]),
        (["--disable-auto-complete-config"], SAFE[:3]),
        (["--metrics-address=::1", "--grpc-address", "10.0.0.1"], [SAFE[0], SAFE[3]]),
        (["--http-address-extra=1", "--http-port=1"], SAFE),
    ],
    ids=" ".join,
)
def test_safe_defaults_are_added_unless_the_caller_sets_them(arguments: list[str], added: list[str]) -> None:
    assert launcher.with_defaults(arguments) == arguments + added


class Replaced(Exception):  # noqa: N818 - not an error: execve replaces this process
    pass


@pytest.fixture
def execve(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record what `main` does: ["cleaned", binary, arguments, environment]."""
    recorded: list[Any] = []

    def replace(*arguments: Any) -> None:
        recorded.extend(arguments)
        raise Replaced

    monkeypatch.setattr(launcher.os, "execve", replace)
    monkeypatch.setattr(launcher, "clean_up", lambda stub: recorded.append(f"cleaned {stub.name}"))
    monkeypatch.setattr(launcher, "OFFICIAL", Path("/nonexistent/tritonserver"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return recorded


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["tritonserver", *arguments])
    with pytest.raises(Replaced):
        launcher.main()


def test_main_executes_the_wheels_server_with_the_stub_of_this_python(
    execve: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/their/libraries")
    run_main(monkeypatch, "--model-repository=m")
    cleaned, binary, arguments, environment = execve
    assert cleaned == "cleaned triton_python_backend_stub"
    assert os.access(binary, os.X_OK)
    assert arguments[:2] == ["tritonserver", "--model-repository=m"]
    assert set(SAFE) < set(arguments)
    (backends,) = [Path(word.partition("=")[2]) for word in arguments if word.startswith("--backend-directory=")]
    assert (backends / "python" / "libtriton_python.so").is_file()
    stub = (backends / "python" / launcher.STUB).resolve()
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in stub.parts
    assert os.access(stub, os.X_OK)
    assert environment["PATH"].split(":")[0] == str(Path(sys.prefix) / "bin")
    assert environment["LD_LIBRARY_PATH"].split(":") == [sysconfig.get_config_var("LIBDIR"), "/their/libraries"]
    assert "pytriton" not in sys.modules


def test_environment_outside_ascii_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(launcher.sys, "prefix", "/home/José/.venv")
    with pytest.raises(SystemExit, match=r"cannot import from /home/José/\.venv: install into a path of ASCII"):
        launcher.main()


def test_openmp_spin_count_is_limited(execve: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    run_main(monkeypatch)
    assert 0 < int(execve[3]["GOMP_SPINCOUNT"]) < 1_000_000


def test_backend_directory_of_the_caller_is_kept(execve: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run_main(monkeypatch, "--backend-directory", "/theirs")
    assert [word for word in execve[2] if word.startswith("--backend-directory")] == ["--backend-directory"]


def test_official_server_keeps_its_environment(
    execve: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    official = tmp_path / "tritonserver"
    official.touch()
    monkeypatch.setattr(launcher, "OFFICIAL", official)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")  # the caller's value is kept
    run_main(monkeypatch)
    assert execve[1:] == [official, ["tritonserver", *SAFE], dict(os.environ)]


def test_interpreted_kernels_are_refused(execve: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="TRITON_INTERPRET=1"):
        launcher.main()
    assert execve == []


def test_missing_server_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="nvidia-pytriton package is installed"):
        launcher.wheel_directory()


WITHOUT_LIBPYTHON = """
import ctypes, os, sys, sysconfig
get_config_var = sysconfig.get_config_var
sysconfig.get_config_var = lambda name: "/nowhere" if name == "LIBDIR" else get_config_var(name)
def missing(*_):
    raise OSError("cannot open shared object file")
ctypes.CDLL = missing
os.execve = lambda *_: sys.exit("started anyway")
from triton_embed.python_backend import launcher
launcher.OFFICIAL = launcher.Path("/nonexistent")
launcher.clean_up = lambda stub: sys.exit("cleaned up first")
launcher.main()
"""


def test_missing_libpython_is_an_error_not_a_hang() -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBPYTHON], capture_output=True, text=True, timeout=60, check=False
    )
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert result.returncode == 1
    assert result.stderr.startswith(f"tritonserver: libpython{version}.so.1.0 is missing from /nowhere")
    assert f"apt-get install libpython{version}" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the files of nvidia-pytriton that the launcher uses, for four Pythons; `sys.prefix` is a sibling folder."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    names = ["backends/python/libtriton_python.so", "backends/python/triton_python_backend_utils.py"]
    names += [f"python_backend_stubs/3.{minor}/{launcher.STUB}" for minor in (10, 11, 12, 13)]
    for name in names:
        (tmp_path / "wheel" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "wheel" / name).write_text(name)
    return tmp_path / "wheel"


def links(directory: Path) -> dict[str, tuple[str, int]]:
    """Return the content behind each link and the inode of the link itself."""
    return {path.name: (path.read_text(), path.lstat().st_ino) for path in (directory / "python").iterdir()}


def test_backend_directory_links_the_stub_of_this_python(wheel: Path) -> None:
    directory = launcher.backend_directory(wheel)
    assert directory.is_relative_to(wheel.parent / "prefix")
    assert {name: text for name, (text, _) in links(directory).items()} == {
        "libtriton_python.so": "backends/python/libtriton_python.so",
        "triton_python_backend_utils.py": "backends/python/triton_python_backend_utils.py",
        launcher.STUB: f"python_backend_stubs/3.{sys.version_info.minor}/{launcher.STUB}",
    }
    assert all(path.is_symlink() for path in (directory / "python").iterdir())


def test_correct_links_are_kept_and_wrong_links_replaced(wheel: Path) -> None:
    before = links(directory := launcher.backend_directory(wheel))
    assert links(launcher.backend_directory(wheel)) == before
    utils, stub = directory / "python" / "triton_python_backend_utils.py", directory / "python" / launcher.STUB
    utils.unlink()
    utils.symlink_to("/of/an/older/wheel")
    stub.unlink()
    stub.write_text("a copy")
    after = links(launcher.backend_directory(wheel))
    assert {name: text for name, (text, _) in after.items()} == {name: text for name, (text, _) in before.items()}
    assert stub.is_symlink()
    assert after["libtriton_python.so"] == before["libtriton_python.so"]


def test_directory_of_the_user_is_used_if_the_environment_is_not_writable(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also if its path has a space: the Python backend starts stubs with an unquoted command."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for prefix in (tmp_path / "read-only", tmp_path / "my environment"):
        prefix.mkdir()
        monkeypatch.setattr(sys, "prefix", str(prefix))
        (tmp_path / "read-only" / "share").write_text("nobody, not even root, creates a directory here")
        directory = launcher.backend_directory(wheel)
        assert directory.parent == tmp_path / "home" / ".cache" / "triton-embed"
        assert directory.parent.stat().st_mode & 0o077 == 0
        assert set(links(directory)) == {"libtriton_python.so", "triton_python_backend_utils.py", launcher.STUB}


def test_directory_that_others_may_write_to_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shared library would run as this user."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "home").write_text("no directory")
    assert launcher.user_directory() == tmp_path / f"triton-embed-{os.getuid()}"
    launcher.user_directory().chmod(0o777)
    with pytest.raises(SystemExit, match=r"none is writable for this user alone.*: set HOME or TMPDIR"):
        launcher.user_directory()


def test_bash_is_found_without_path_or_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Triton would wait for ever for a stub that bash did not start."""
    monkeypatch.delenv("PATH")
    assert launcher.search_path() == os.defpath
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launcher.search_path() == f"{tmp_path}:{os.defpath}"
    monkeypatch.setattr(os, "defpath", str(tmp_path))
    with pytest.raises(SystemExit, match=r"bash.* is not in PATH=.*: install it"):
        launcher.search_path()


def test_tmp_that_is_not_writable_is_reported(execve: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's Python backend would abort."""
    monkeypatch.setattr(os, "access", lambda path, _: str(path) != "/tmp")  # noqa: S108
    with pytest.raises(SystemExit, match="needs to write to /tmp: make it writable"):
        launcher.main()
    assert execve == []


def test_stub_that_does_not_run_is_reported_before_triton_changes_its_mode(tmp_path: Path) -> None:
    stub = tmp_path / launcher.STUB
    for mode, code, reason in (
        (0o755, 127, "libcudart.so: No such file"),
        (0o644, 1, r"Permission denied \(.*/triton_python_backend_stub\)"),
    ):
        stub.write_text(f"#!/bin/sh\necho 'libcudart.so: No such file' >&2; exit {code}\n")
        stub.chmod(mode)
        with pytest.raises(SystemExit, match=f"cannot start its stub: {reason}"):
            launcher.check_stub(stub, os.environ)
    stub.chmod(0o755)
    launcher.check_stub(stub, os.environ)


def clean_up() -> None:
    """Clean up as an installation whose stub is bash or Python, which the processes of these tests run."""
    for stub in ("/bin/bash", sys.executable):
        launcher.clean_up(Path(stub))


class Processes:
    """Bash processes under other names; a test can kill only processes started here."""

    def __init__(self, directory: Path) -> None:
        self._script = directory / "model.py"
        self._script.write_text("echo started; read -t 60\n")
        self._directory = directory
        self.mine: dict[int, subprocess.Popen[bytes]] = {}
        self.spared: list[int] = []  # pids of other processes that the clean-up tried to kill
        self.kill = os.kill

    def start(self, name: str, *arguments: object, code: str = "") -> subprocess.Popen[bytes]:
        """Start a process whose argv[0] ends in `name`: Python running `code`, or bash waiting for input."""
        script = self._script
        if code:
            script = self._directory / f"code{len(self.mine)}.py"
            script.write_text(f"{code}\nprint('started', flush=True)\ninput()\n")
        process = subprocess.Popen(
            [f"/somewhere/{name}", str(script), *map(str, arguments)],
            executable=sys.executable if code else "/bin/bash",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.mine[process.pid] = process
        assert process.stdout is not None
        assert process.stdout.readline() == b"started\n"
        return process

    def stub(self, server: object, region: str = "region", code: str = "") -> subprocess.Popen[bytes]:
        """Start a stub with the arguments of Triton 2.51 and later: model, region, size, growth, server pid, ..."""
        return self.start(
            launcher.STUB, region, 1048576, 1048576, server, "/backends/python", 336, "minilm_0_0", "DEFAULT", code=code
        )

    def stub_of_a_younger_process(self) -> subprocess.Popen[bytes]:
        """Start a stub whose server's pid belongs to a process that started later."""
        words = f"{self._script} region 1048576 1048576 $pid /backends/python 336 minilm_0_0 DEFAULT"
        script = f"read pid; exec -a /somewhere/{launcher.STUB} bash {words}"
        stub = subprocess.Popen(["bash", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.mine[stub.pid] = stub
        time.sleep(0.05)  # start times are in hundredths of a second
        assert stub.stdin is not None
        assert stub.stdout is not None
        stub.stdin.write(b"%d\n" % self.start("another program").pid)
        stub.stdin.flush()
        assert stub.stdout.readline() == b"started\n"
        return stub

    def guarded_kill(self, pid: int, number: int) -> None:
        if pid in self.mine:
            self.kill(pid, number)
        else:
            self.spared.append(pid)

    def stop(self) -> None:
        for process in self.mine.values():
            process.kill()
            process.communicate()


@pytest.fixture(autouse=True)
def processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Processes]:
    """Replace os.kill by a guard in every test: a broken launcher must not kill servers the tests did not start."""
    started = Processes(tmp_path)
    monkeypatch.setattr(os, "kill", started.guarded_kill)
    yield started
    started.stop()


@pytest.fixture
def shared_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Replace /dev/shm by a temporary directory inside it, so that no other region can be removed."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        monkeypatch.setattr(launcher, "SHARED_MEMORY", Path(directory))
        yield Path(directory)


def region(directory: Path, name: str) -> Path:
    path = directory / f"{launcher.REGION}{name}"
    path.write_bytes(bytes(4096))
    return path


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[None]:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        yield


def dead_pid() -> int:
    """Return the pid of a process that has dead_pid."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.usefixtures("shared_memory")
def test_only_stubs_of_a_dead_server_are_killed(processes: Processes) -> None:
    server = processes.start("tritonserver", "--model-repository=m")
    unreaped = processes.start("tritonserver")
    processes.kill(unreaped.pid, signal.SIGKILL)
    os.waitid(os.P_PID, unreaped.pid, os.WEXITED | os.WNOWAIT)  # remains a zombie
    orphans = [processes.stub(dead_pid()), processes.stub(unreaped.pid), processes.stub_of_a_younger_process()]
    alive = [
        server,
        processes.stub(server.pid),
        processes.stub(os.getpid()),  # a Python program with Triton inside
        processes.stub("not-a-pid"),
        processes.start(launcher.STUB, "too", "few"),
        processes.start("debugger", launcher.STUB, "r", 1, 1, dead_pid()),
        processes.start(f"{launcher.STUB}_wrapper", "region", 1, 1, dead_pid()),
    ]
    clean_up()
    assert [orphan.wait(10) for orphan in orphans] == [-signal.SIGKILL] * 3
    assert [process.poll() for process in alive] == [None] * len(alive)


@pytest.mark.usefixtures("shared_memory")
def test_live_servers_are_left_alone(processes: Processes) -> None:
    """Check the servers that really run on this machine now, and one started here."""
    ours = processes.stub(processes.start("tritonserver").pid)
    servers = [process for process in psutil.process_iter(["name"]) if process.info["name"] == "tritonserver"]
    stubs = {child.pid for server in servers for child in server.children()}
    clean_up()
    assert not stubs & set(processes.spared)
    assert not {server.pid for server in servers} & set(processes.spared)
    assert ours.poll() is None


@pytest.mark.usefixtures("shared_memory")
def test_stub_of_another_installation_is_left_alone(processes: Processes) -> None:
    orphan = processes.stub(dead_pid())  # runs bash
    launcher.clean_up(Path(sys.executable))
    launcher.clean_up(Path("/nonexistent") / launcher.STUB)
    assert orphan.poll() is None


@pytest.mark.usefixtures("shared_memory")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can create a pid namespace")
def test_stub_of_a_container_is_left_alone(processes: Processes) -> None:
    """Start a stub in another pid namespace, where the pid of its server means another process than here."""
    words = f"model.py region {dead_pid()} /backends/python 336 minilm_0_0 DEFAULT"
    script = f"exec -a /somewhere/{launcher.STUB} bash -c 'echo started; read line' {words}"
    command = ["unshare", "--pid", "--fork", "--mount-proc", "bash", "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as container:
        assert container.stdout is not None
        assert container.stdout.readline() == b"started\n"
        clean_up()
        container.communicate(b"\n")
    assert processes.spared == []


def test_only_unmapped_regions_are_removed(processes: Processes, shared_memory: Path) -> None:
    stale, held_here, held_there = (region(shared_memory, name) for name in ("stale-1", "here-2", "there-3"))
    foreign = shared_memory / "somebody_elses_region"
    foreign.touch()
    server = processes.start("tritonserver")
    processes.stub(server.pid, held_there.name, code=MAP.format(path=held_there, size=4096))
    with mapped(held_here):
        clean_up()
    assert not stale.exists()
    assert {path.name for path in shared_memory.iterdir()} == {held_here.name, held_there.name, foreign.name}


MAP = """
import mmap
with open({path!r}, "r+b") as file:
    region = mmap.mmap(file.fileno(), {size})
region.write(b"x" * {size})
""".replace("{path!r}", "'{path}'")


def test_region_of_a_killed_orphan_is_removed(processes: Processes, shared_memory: Path) -> None:
    held = region(shared_memory, "orphan")
    processes.stub(dead_pid(), held.name, code=MAP.format(path=held, size=4096))
    clean_up()
    assert not held.exists()


def test_region_created_during_clean_up_is_kept(shared_memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Create and map the region at the worst moment: just before the regions are listed."""
    with contextlib.ExitStack() as stack:
        fresh: list[Path] = []

        class Starting(PosixPath):
            def glob(self, pattern: str) -> Any:
                fresh.append(region(shared_memory, f"fresh-{len(fresh)}"))
                stack.enter_context(mapped(fresh[-1]))
                return super().glob(pattern)

        monkeypatch.setattr(launcher, "SHARED_MEMORY", Starting(shared_memory))
        clean_up()
        assert fresh
        assert all(path.exists() for path in fresh)


def no_such_user(_: int) -> None:
    raise KeyError("getpwuid(): uid not found")


def test_clean_up_works_for_a_uid_without_a_passwd_entry(shared_memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as with `docker run --user 12345`: /etc/passwd has no line for the user."""
    stale = region(shared_memory, "stale")
    monkeypatch.setattr("pwd.getpwuid", no_such_user)
    clean_up()
    assert not stale.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("user", [65534, 54321], ids=["nobody", "uid without a name"])
def test_regions_of_another_user_are_kept(user: int, shared_memory: Path) -> None:
    theirs = region(shared_memory, "theirs")
    os.chown(theirs, user, user)
    clean_up()
    assert theirs.exists()


def test_servers_can_clean_up_concurrently(shared_memory: Path) -> None:
    for i in range(1500):
        (shared_memory / f"{launcher.REGION}{i}").touch()
    errors: list[BaseException] = []

    def run(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:  # noqa: BLE001 - shown by the assertion below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(clean_up,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert list(shared_memory.iterdir()) == []
