"""The gateway's server over real sockets: limits that uvicorn lacks, and a shutdown that answers every request."""

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import requests
import uvloop
from starlette.requests import Request
from starlette.responses import Response

from conftest import free_port
from triton_embed.gateway.http import protocol
from triton_embed.gateway.http.middleware import read_body
from triton_embed.gateway.process import server as worker
from triton_embed.gateway.process.supervisor import listen
from triton_embed.gateway.settings import dump_settings, read_settings

LIMIT = 1000
LARGE = 30 * 2**20  # bytes of a response: more than the kernel's buffers take
HEAD = b"POST /size HTTP/1.1\r\nHost: test\r\n"


class WorkerThread:
    """A worker in a thread, with two test routes and without Triton."""

    def __init__(self, **settings: Any) -> None:
        self.settings = read_settings(triton_grpc=f"127.0.0.1:{free_port()}", **settings)
        sockets = listen("127.0.0.1", 0, 1)[0]
        self.address = sockets[0].getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self.gateway = worker.GatewayServer(self.settings)
        self.gateway.app.add_api_route("/size", self._size, methods=["POST"])
        self.gateway.app.add_api_route("/slow/{seconds}", self._slow)
        self.gateway.app.add_api_route("/large", lambda: Response(b"x" * LARGE))
        self._loop = uvloop.new_event_loop()
        self.thread = threading.Thread(target=self._run, args=(sockets,))
        self.thread.start()
        while not self.gateway.started:
            assert self.thread.is_alive()
            time.sleep(0.01)

    async def _size(self, request: Request) -> dict[str, int]:
        return {"size": len(await read_body(request, LIMIT))}

    async def _slow(self, seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "done"

    def _run(self, sockets: list[socket.socket]) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self.gateway.serve(sockets))

    def stop(self, blocked_seconds: float = 0) -> None:
        """Stop the gateway after blocking its event loop for `blocked_seconds`."""
        self._loop.call_soon_threadsafe(lambda: (time.sleep(blocked_seconds), self.gateway.stop()))

    @contextmanager
    def connection(self, *sent: bytes) -> Iterator[socket.socket]:
        with socket.create_connection(self.address, timeout=10) as connection:
            for part in sent:
                connection.sendall(part)
            yield connection


@pytest.fixture
def start_worker() -> Iterator[Callable[..., WorkerThread]]:
    """Return a factory of workers, which are stopped after the test."""
    workers: list[WorkerThread] = []

    def make(**settings: Any) -> WorkerThread:
        workers.append(WorkerThread(**settings))
        return workers[-1]

    yield make
    for running_worker in workers:
        if running_worker.thread.is_alive():
            running_worker.stop()
            running_worker.thread.join(20)
        assert not running_worker.thread.is_alive()


def read(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    """Read the next response.

    Returns:
        Its status, headers and JSON body.

    Raises:
        ConnectionError: if the connection is reset or closed before a response.
    """
    data = b""
    while b"\r\n\r\n" not in data:
        data += (received := connection.recv(4096))
        if not received:
            raise ConnectionError(data)
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    while len(body) < int(headers["content-length"]):
        body += connection.recv(4096)
    return int(first.split()[1]), headers, json.loads(body)


def closed(connection: socket.socket) -> bool:
    """Return whether the peer closes the connection, without more data; a reset raises."""
    return connection.recv(1) == b""


def test_chunked_body_is_limited_while_it_arrives(start_worker: Callable[..., WorkerThread]) -> None:
    chunk = b"64\r\n" + b"x" * 100 + b"\r\n"
    with start_worker().connection(HEAD + b"Transfer-Encoding: chunked\r\n\r\n") as connection:
        connection.sendall(chunk * (LIMIT // 100) + b"0\r\n\r\n")
        assert read(connection)[2] == {"size": LIMIT}
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * (LIMIT // 100 + 1))
        status, headers, body = read(connection)  # before the body ends
        assert (status, body["error"]["code"], headers["connection"]) == (413, "body_too_large", "close")
        connection.sendall(chunk * 3 + b"0\r\n\r\n")  # the rest of the body is accepted
        assert closed(connection)


def test_endless_body_is_discarded_for_a_limited_time(
    start_worker: Callable[..., WorkerThread], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triton_embed.gateway.http.middleware.LINGER_SECONDS", 0.5)
    with start_worker().connection(HEAD + b"Content-Length: 99999999999\r\n\r\n") as connection:
        assert read(connection)[0] == 413
        start_time = time.monotonic()
        with suppress(ConnectionError):
            while time.monotonic() - start_time < 5:
                connection.sendall(b"x" * 100)
                time.sleep(0.05)
        assert time.monotonic() - start_time < 2


@pytest.mark.parametrize("more", [b"", b"Connection: close\r\n"])
def test_client_can_read_the_rejection_of_a_large_body(start_worker: Callable[..., WorkerThread], more: bytes) -> None:
    """Check the response arrives: closing at once would reset the connection and lose it."""
    size = 4_000_000
    with start_worker().connection(HEAD + more + f"Content-Length: {size}\r\n\r\n".encode(), b"x" * size) as connection:
        status, headers, _ = read(connection)
        assert (status, headers["connection"]) == (413, "close")
        assert closed(connection)


def test_body_shorter_than_declared_gets_408(start_worker: Callable[..., WorkerThread]) -> None:
    with start_worker(body_timeout=0.3).connection(HEAD + b"Content-Length: 10\r\n\r\n12345") as connection:
        status, headers, body = read(connection)
        assert (status, body["error"]["code"], headers["connection"]) == (408, "timeout", "close")
        assert len(headers["x-request-id"]) == 32


def test_bytes_after_the_declared_body_are_ignored(start_worker: Callable[..., WorkerThread]) -> None:
    with start_worker().connection(HEAD + b"Content-Length: 3\r\n\r\nabcGARBAGE\r\n\r\n") as connection:
        _, headers, body = read(connection)
        assert (body, headers["connection"]) == ({"size": 3}, "close")
        assert closed(connection)


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: -1\r\n\r\n",
        b"Content-Length: 1e3\r\n\r\n",
        b"Content-Length: 99999999999999999999999\r\n\r\n",
        b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
        b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc",
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"No colon\r\n\r\n",
    ],
)
def test_invalid_http_gets_400_with_json_error(start_worker: Callable[..., WorkerThread], framing: bytes) -> None:
    server = start_worker()
    with server.connection(HEAD + framing) as connection:
        status, _, body = read(connection)
        assert status == 400
        assert list(body["error"]) == ["message", "type", "param", "code"]
    assert requests.get(f"{server.url}/slow/0", timeout=10).json() == "done"  # the server still works


def test_expect_100_continue(start_worker: Callable[..., WorkerThread]) -> None:
    server = start_worker(api_key="k")
    expect = b"Expect: 100-continue\r\nContent-Length: %d\r\n%b\r\n"
    key = b"Authorization: Bearer k\r\n"
    with server.connection(HEAD + expect % (5, key)) as connection:
        assert connection.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"12345")
        assert read(connection)[2] == {"size": 5}
    for length, header, status in ((LIMIT + 1, key, 413), (5, b"", 401)):
        with server.connection(HEAD + expect % (length, header)) as connection:
            start_time = time.monotonic()
            assert (read(connection)[0], closed(connection)) == (status, True)  # no 100, and no wait for the body
            assert time.monotonic() - start_time < 1


def test_connection_is_kept_alive_after_the_body_is_read(start_worker: Callable[..., WorkerThread]) -> None:
    with start_worker().connection() as connection:
        for _ in range(3):
            connection.sendall(HEAD + b"Content-Length: 3\r\n\r\nabc")
            status, headers, _ = read(connection)
            assert (status, "connection" in headers) == (200, False)


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: te"])
def test_incomplete_head_closes_the_connection(
    start_worker: Callable[..., WorkerThread], monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(worker, "KEEP_ALIVE_SECONDS", 0.4)
    server = start_worker()
    with server.connection(HEAD + b"Content-Length: 0\r\n\r\n" if not sent else b"") as used:
        with server.connection(sent) as connection:
            start_time = time.monotonic()
            for byte in b"x" * 5 if sent else b"":  # a slow head does not extend the limit
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
            assert closed(connection)
            assert 0.3 < time.monotonic() - start_time < 2
        if not sent:
            assert read(used)[0] == 200
            assert closed(used)
    with server.connection(b"GET /slow/1 HTTP/1.1\r\nHost: test\r\n\r\n") as connection:
        assert read(connection)[2] == "done"  # the head is complete, so the response may take longer


@pytest.mark.parametrize(
    ("opening", "endless"),
    [
        (HEAD + b"X-Endless: ", b"x" * 1000),
        (HEAD, b"X-Many: x\r\n" * 100),
        (b"GET /", b"x" * 1000),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;", b"x" * 1000),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X-Trailer: x\r\n" * 100),
    ],
    ids=["a header", "headers", "a target", "a chunk's extension", "trailers"],
)
def test_endless_head_is_rejected(start_worker: Callable[..., WorkerThread], opening: bytes, endless: bytes) -> None:
    server = start_worker()
    sent = 0
    with server.connection(opening) as connection:
        try:
            for _ in range(2000):
                sent += connection.send(endless)
                time.sleep(0.0001)
        except OSError:
            pass
    assert sent < 1_500_000  # part of it fills the kernel's buffers
    assert requests.get(f"{server.url}/slow/0", timeout=10).json() == "done"


def test_response_that_nobody_reads_is_dropped(
    start_worker: Callable[..., WorkerThread], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "UNREAD_SECONDS", 0.3)
    server = start_worker()
    request = b"GET /large HTTP/1.1\r\nHost: test\r\n\r\n"
    with server.connection(request) as stalled, server.connection(request) as slow:
        received = 0
        while received < LARGE and (data := slow.recv(2**20)):  # for two seconds
            received += len(data)
            time.sleep(0.05)
        assert received > LARGE
        received = 0
        with suppress(ConnectionResetError):
            while data := stalled.recv(2**20):
                received += len(data)
        assert received < LARGE


def test_head_of_40_kb_is_accepted(start_worker: Callable[..., WorkerThread]) -> None:
    headers = {f"x-{i}": "x" * 1000 for i in range(40)}
    assert requests.get(f"{start_worker().url}/slow/0", headers=headers, timeout=10).json() == "done"


def test_requests_sent_before_shutdown_are_answered(start_worker: Callable[..., WorkerThread]) -> None:
    server = start_worker(drain_seconds=5)
    with server.connection() as idle, server.connection() as busy:
        idle.sendall(b"GET /slow/0 HTTP/1.1\r\nHost: test\r\n\r\n")
        assert read(idle)[0] == 200
        busy.sendall(b"GET /slow/1 HTTP/1.1\r\nHost: test\r\n\r\n")
        time.sleep(0.1)
        start_time = time.monotonic()
        server.stop(blocked_seconds=0.3)
        time.sleep(0.1)
        late = [socket.create_connection(server.address, timeout=10) for _ in range(20)]
        for connection in late:
            connection.sendall(HEAD + b"Content-Length: 3\r\n\r\nabc")
        time.sleep(0.2)
        idle.sendall(b"GET /ready HTTP/1.1\r\nHost: test\r\n\r\n")
        status, headers, body = read(idle)
        assert (status, body) == (503, {"status": "unavailable", "reason": "The server is stopping"})
        assert headers["connection"] == "close"
        assert closed(idle)
        assert time.monotonic() - start_time < 0.6
        for connection in late:
            with connection:
                assert read(connection)[2] == {"size": 3}
        time.sleep(0.3)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(server.address, timeout=10)
        assert read(busy)[2] == "done"
        server.thread.join(10)
        assert 0.8 < time.monotonic() - start_time < 2


def test_requests_get_503_when_drain_time_is_over(start_worker: Callable[..., WorkerThread]) -> None:
    server = start_worker(drain_seconds=0.7)
    slow = b"GET /slow/60 HTTP/1.1\r\nHost: test\r\nx-request-id: mine\r\n\r\n"
    uploading = HEAD + b"Content-Length: 10\r\nx-request-id: mine\r\n\r\n12345"
    with server.connection(slow) as waiting, server.connection(uploading) as sending, server.connection() as silent:
        time.sleep(0.1)
        server.stop()
        start_time = time.monotonic()
        for connection in (waiting, sending):
            status, headers, body = read(connection)
            assert (status, headers["x-request-id"]) == (503, "mine")
            assert body["error"]["message"] == "The server is stopping"
            assert 0.5 < time.monotonic() - start_time < 1.5
        assert closed(waiting)
        assert closed(silent)
    server.thread.join(10)
    assert not server.thread.is_alive()
    assert time.monotonic() - start_time < 3


def test_idle_connections_do_not_delay_shutdown(start_worker: Callable[..., WorkerThread]) -> None:
    server = start_worker(drain_seconds=10)
    with server.connection(b"GET /slow/0 HTTP/1.1\r\nHost: test\r\n\r\n") as idle, server.connection() as silent:
        assert read(idle)[0] == 200
        start_time = time.monotonic()
        server.stop()
        assert closed(idle)
        assert closed(silent)
        server.thread.join(10)
        assert time.monotonic() - start_time < 2


def start_process(tmp_path: Path, **settings: Any) -> tuple[subprocess.Popen[bytes], str]:
    """Start a worker as the supervisor does, and return its process and URL."""
    worker_settings = read_settings(triton_grpc=f"127.0.0.1:{free_port()}", workers=2, **settings)
    listener = listen("127.0.0.1", 0, 1)[0][0]
    with listener, (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "triton_embed.gateway.process.server", str(listener.fileno())],
            stdin=subprocess.PIPE,
            stderr=log,
            pass_fds=[listener.fileno()],
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "TRITON_EMBED_API_KEY": "another"},
        )
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    assert process.stdin is not None
    with process.stdin as pipe:
        pipe.write(dump_settings(worker_settings))
    for _ in range(300):
        try:
            requests.get(f"{url}/ready", timeout=5)
            return process, url
        except requests.ConnectionError:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
    raise AssertionError((tmp_path / "log").read_text())


def test_worker_reads_settings_from_stdin_and_does_not_expose_them(tmp_path: Path) -> None:
    process, url = start_process(tmp_path, api_key="hush", log_format="json")
    visible = Path(f"/proc/{process.pid}/cmdline").read_bytes() + Path(f"/proc/{process.pid}/environ").read_bytes()
    headers = {"Authorization": "Bearer hush", "x-request-id": "mine"}
    page = requests.get(f"{url}/metrics", headers=headers, timeout=10)
    garbage = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10)
    with garbage:
        garbage.sendall(b"GARBAGE\r\n\r\n")
        assert read(garbage)[0] == 400
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert b"hush" not in visible
    assert page.status_code == 200
    assert "triton_embed_requests_in_flight 1.0" in page.text
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["request_id"] for line in lines if line.get("route") == "/metrics"] == ["mine"]
    assert "Invalid HTTP request received." in [line["message"] for line in lines]


def test_worker_raises_its_file_limit(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 500), hard))
    process, _ = start_process(tmp_path)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    process.terminate()
    process.wait(20)
    line = next(line for line in limits.splitlines() if line.startswith("Max open files"))
    assert line.split()[3:5] == [str(hard)] * 2
