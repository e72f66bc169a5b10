"""Clean-up after dead servers only.

Stubs and servers here are bash processes under those names; regions are files in a temporary directory in /dev/shm.
Other servers may run on this machine: no signal of these tests reaches a process that the tests did not start.
"""

import contextlib
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PosixPath
from typing import Any

import psutil
import pytest

from triton_embed.python_backend import cleanup


def clean_up() -> None:
    """Clean up as an installation whose stub is bash or Python, which the processes of these tests run."""
    for stub in ("/bin/bash", sys.executable):
        cleanup.clean_up(Path(stub))


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
            cleanup.STUB, region, 1048576, 1048576, server, "/backends/python", 336, "minilm_0_0", "DEFAULT", code=code
        )

    def stub_of_a_younger_process(self) -> subprocess.Popen[bytes]:
        """Start a stub whose server's pid belongs to a process that started later."""
        words = f"{self._script} region 1048576 1048576 $pid /backends/python 336 minilm_0_0 DEFAULT"
        script = f"read pid; exec -a /somewhere/{cleanup.STUB} bash {words}"
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
        monkeypatch.setattr(cleanup, "SHARED_MEMORY", Path(directory))
        yield Path(directory)


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace /tmp by an empty directory."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(cleanup, "TEMPORARY", tmp_path / "tmp")
    return tmp_path / "tmp"


@pytest.mark.usefixtures("shared_memory")
def test_empty_directories_that_no_server_can_have_created_are_removed(
    processes: Processes, temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Servers of other tests may be alive, and the directories could be theirs.
    monkeypatch.setattr(cleanup, "_maps", lambda maps=cleanup._maps: (x for x in maps() if x[0] in processes.mine))
    backend = tmp_path / cleanup.BACKEND
    backend.write_bytes(bytes(4096))
    code = f"import mmap; file = open({str(backend)!r}, 'r+b'); memory = mmap.mmap(file.fileno(), 4096)"
    names = ["left", "of-a-living-server", "used", "of-another-user"]
    left, of_server, used, of_user = (temporary / f"{cleanup.ENVIRONMENT}{name}" for name in names)
    server = processes.start("tritonserver", code=code)
    for path in (left, of_server, used, of_user):
        path.mkdir()
    (used / "environment").touch()
    if os.geteuid() == 0:
        os.chown(of_user, 54321, 54321)
    an_hour_ago = time.time() - 3_600
    os.utime(left, (an_hour_ago, an_hour_ago))
    clean_up()
    assert (left.exists(), of_server.exists(), used.exists()) == (False, True, True)
    processes.kill(server.pid, signal.SIGKILL)
    server.wait()
    clean_up()
    assert (of_server.exists(), used.exists(), of_user.exists()) == (False, True, os.geteuid() == 0)


def region(directory: Path, name: str) -> Path:
    path = directory / f"{cleanup.REGION}{name}"
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
        processes.start(cleanup.STUB, "too", "few"),
        processes.start("debugger", cleanup.STUB, "r", 1, 1, dead_pid()),
        processes.start(f"{cleanup.STUB}_wrapper", "region", 1, 1, dead_pid()),
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
    cleanup.clean_up(Path(sys.executable))
    cleanup.clean_up(Path("/nonexistent") / cleanup.STUB)
    assert orphan.poll() is None


@pytest.mark.usefixtures("shared_memory")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can create a pid namespace")
def test_stub_of_a_container_is_left_alone(processes: Processes) -> None:
    """Start a stub in another pid namespace, where the pid of its server means another process than here."""
    words = f"model.py region {dead_pid()} /backends/python 336 minilm_0_0 DEFAULT"
    script = f"exec -a /somewhere/{cleanup.STUB} bash -c 'echo started; read line' {words}"
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

        monkeypatch.setattr(cleanup, "SHARED_MEMORY", Starting(shared_memory))
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
        (shared_memory / f"{cleanup.REGION}{i}").touch()
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
