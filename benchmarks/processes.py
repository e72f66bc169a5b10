"""Start, measure and stop the processes of a benchmark, including on Ctrl-C."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.report import ROOT

MODEL = "minilm"


def exit_on_signal() -> None:
    """Make Ctrl-C and SIGTERM raise SystemExit, so that every `with` block stops its processes without a traceback."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda signum, _: sys.exit(128 + signum))


def free_port() -> int:
    """Return a free loopback TCP port."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def running(command: Sequence[str], log: Path, **popen: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a process in a new session, so that Ctrl-C reaches only the benchmark. Stop it and its children at exit."""
    with log.open("w") as sink:
        options: dict[str, Any] = {"stdout": sink, "stderr": sink, "text": True, "cwd": ROOT}
        process = subprocess.Popen(command, start_new_session=True, **options | popen)
    try:
        yield process
    finally:
        stop(process)


def stop(process: subprocess.Popen[str], seconds: float = 15) -> float:
    """Send SIGTERM, then SIGKILL to processes still alive after `seconds`. Return how long the process itself took."""
    family = tree(process.pid)
    start = time.monotonic()
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    elapsed = time.monotonic() - start
    for member in psutil.wait_procs(family, timeout=1)[1]:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    return elapsed


def tree(pid: int) -> list[psutil.Process]:
    """Return the process and all its descendants; empty if it has ended."""
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []


def role(process: psutil.Process) -> str:
    """Return a short label of a process: `tritonserver`, `stub minilm`, `uvicorn`, `triton-embed`."""
    try:
        command = process.cmdline() or [process.name()]
    except psutil.NoSuchProcess:
        return "ended"
    name = Path(command[0]).name
    if "stub" in name:
        return f"stub {Path(command[1]).parts[-3]}"  # …/<family>/1/model.py
    if name.startswith("python") and len(command) > 1:
        return command[2] if command[1] == "-m" else Path(command[1]).name
    return name


def memory(pid: int) -> dict[str, dict[str, float]]:
    """Return peak RSS, RSS and PSS (shared pages split) in MB of each process of a tree, by role."""
    usage: dict[str, dict[str, float]] = {}
    for process in tree(pid):
        with suppress(psutil.NoSuchProcess, FileNotFoundError):
            now = process.memory_full_info()
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
            name = role(process)
            name = f"{name} #{process.pid}" if name in usage else name
            usage[name] = {"peak_rss": peak / 1024, "rss": now.rss / 2**20, "pss": now.pss / 2**20}
    return usage


def cpu_seconds_elsewhere() -> float:
    """Return the CPU seconds used so far by other processes than this one and its descendants, stolen time included."""
    times = psutil.cpu_times()
    total = times.user + times.nice + times.system + times.irq + times.softirq + times.steal
    ours = 0.0
    for process in tree(os.getpid()):
        with suppress(psutil.NoSuchProcess):
            spent = process.cpu_times()
            ours += spent.user + spent.system + spent.children_user + spent.children_system
    return float(total - ours)


def wait_until_ready(url: str, process: subprocess.Popen[str], log: Path, seconds: float = 180) -> float:
    """Wait until a GET of `url` succeeds and return how long that took.

    Raises:
        RuntimeError: The process ended or `seconds` passed; the message holds the end of its log.
    """
    start = time.monotonic()
    while process.poll() is None and time.monotonic() - start < seconds:
        with suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(url, timeout=5).close()
            return time.monotonic() - start
        time.sleep(0.1)
    raise RuntimeError(f"{log.stem} did not answer {url}. End of its log:\n{tail(log)}")


def tail(log: Path) -> str:
    """Return the last 30 lines of a log."""
    return "\n".join(log.read_text().splitlines()[-30:])


@dataclass(frozen=True)
class Stack:
    """A running `triton-embed serve`: gateway and tritonserver."""

    process: subprocess.Popen[str]
    port: int
    grpc_port: int
    triton_http_port: int
    start_seconds: float
    log: Path


@contextmanager
def serving(
    *flags: str,
    logs: Path,
    name: str = "triton-embed",
    ready: str = "/ready",
    environment: Mapping[str, str] | None = None,
    seconds: float = 180,
) -> Iterator[Stack]:
    """Run `triton-embed serve flags` on free loopback ports; it is ready when the block begins.

    Args:
        name: Name of the log.
        ready: Path that answers once the stack is ready.
        environment: Variables added to the environment.
        seconds: Timeout of the start.
    """
    http, grpc, triton_http, metrics = (free_port() for _ in range(4))
    command = [
        *(str(Path(sys.executable).with_name("triton-embed")), "serve", *flags, "--port", str(http)),
        *("--triton-grpc-port", str(grpc), "--triton-http-port", str(triton_http)),
        *("--triton-metrics-port", str(metrics)),
    ]
    log = logs / f"{name}.log"
    with running(command, log, env=os.environ | (environment or {})) as process:
        start_seconds = wait_until_ready(f"http://127.0.0.1:{http}{ready}", process, log, seconds)
        yield Stack(process, http, grpc, triton_http, start_seconds, log)


def serving_minilm(logs: Path) -> AbstractContextManager[Stack]:
    """Run `triton-embed serve` with MiniLM."""
    return serving("--model", MODEL, logs=logs)
