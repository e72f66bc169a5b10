"""The gateway's own server over real sockets: limits on what uvicorn leaves unlimited, and an end that answers all."""

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

from conftest import free_port
from triton_embed.gateway import worker
from triton_embed.gateway.front import read_body
from triton_embed.gateway.settings import dump_settings, read_settings
from triton_embed.gateway.supervisor import listen

LIMIT = 1000
HEAD = b"POST /size HTTP/1.1\r\nHost: test\r\n"


class Running:
    """A worker in a thread, with routes of ours and no Triton behind."""

    def __init__(self, **settings: Any) -> None:
        self.settings = read_settings(triton_grpc=f"127.0.0.1:{free_port()}", **settings)
        sockets = listen("127.0.0.1", 0, 1)[0]
        self.address = sockets[0].getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self.gateway = worker.Gateway(self.settings)
        self.gateway.app.add_api_route("/size", self._size, methods=["POST"])
        self.gateway.app.add_api_route("/slow/{seconds}", self._slow)
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

    def stop(self, after: float = 0) -> None:
        """`after` seconds in which its loop does nothing else."""
        self._loop.call_soon_threadsafe(lambda: (time.sleep(after), self.gateway.stop()))

    @contextmanager
    def connection(self, *sent: bytes) -> Iterator[socket.socket]:
        with socket.create_connection(self.address, timeout=10) as one:
            for part in sent:
                one.sendall(part)
            yield one


@pytest.fixture
def running() -> Iterator[Callable[..., Running]]:
    """Makes them, and stops them."""
    made: list[Running] = []

    def make(**settings: Any) -> Running:
        made.append(Running(**settings))
        return made[-1]

    yield make
    for one in made:
        if one.thread.is_alive():
            one.stop()
            one.thread.join(20)
        assert not one.thread.is_alive()


def read(one: socket.socket) -> tuple[int, dict[str, str], Any]:
    """Status, headers, JSON of the next answer. ConnectionError: it was reset or closed instead."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += (got := one.recv(4096))
        if not got:
            raise ConnectionError(data)
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    while len(body) < int(headers["content-length"]):
        body += one.recv(4096)
    return int(first.split()[1]), headers, json.loads(body)


def closed(one: socket.socket) -> bool:
    """Ended in order: with neither more data nor a reset."""
    return one.recv(1) == b""


def test_chunks_are_counted_while_they_come(running: Callable[..., Running]) -> None:
    chunk = b"64\r\n" + b"x" * 100 + b"\r\n"
    with running().connection(HEAD + b"Transfer-Encoding: chunked\r\n\r\n") as one:
        one.sendall(chunk * (LIMIT // 100) + b"0\r\n\r\n")
        assert read(one)[2] == {"size": LIMIT}
        one.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * (LIMIT // 100 + 1))
        status, headers, body = read(one)  # with the body still open
        assert (status, body["error"]["code"], headers["connection"]) == (413, "body_too_large", "close")
        one.sendall(chunk * 3 + b"0\r\n\r\n")  # and what was still under way is taken
        assert closed(one)


def test_an_endless_body_is_not_read_for_ever(running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton_embed.gateway.front.LINGER_SECONDS", 0.5)
    with running().connection(HEAD + b"Content-Length: 99999999999\r\n\r\n") as one:
        assert read(one)[0] == 413
        began = time.monotonic()
        with suppress(ConnectionError):
            while time.monotonic() - began < 5:
                one.sendall(b"x" * 100)
                time.sleep(0.05)
        assert time.monotonic() - began < 2


@pytest.mark.parametrize("more", [b"", b"Connection: close\r\n"])
def test_a_large_body_is_refused_so_that_the_sender_can_read_it(running: Callable[..., Running], more: bytes) -> None:
    """Closing at once would reset the connection, and the answer would be lost on the way."""
    size = 4_000_000
    with running().connection(HEAD + more + f"Content-Length: {size}\r\n\r\n".encode(), b"x" * size) as one:
        status, headers, _ = read(one)
        assert (status, headers["connection"]) == (413, "close")
        assert closed(one)


def test_a_body_shorter_than_declared_is_given_up(running: Callable[..., Running]) -> None:
    with running(body_timeout=0.3).connection(HEAD + b"Content-Length: 10\r\n\r\n12345") as one:
        status, headers, body = read(one)
        assert (status, body["error"]["code"], headers["connection"]) == (408, "timeout", "close")
        assert len(headers["x-request-id"]) == 32


def test_a_body_longer_than_declared_is_no_part_of_the_request(running: Callable[..., Running]) -> None:
    with running().connection(HEAD + b"Content-Length: 3\r\n\r\nabcGARBAGE\r\n\r\n") as one:
        _, headers, body = read(one)
        assert (body, headers["connection"]) == ({"size": 3}, "close")
        assert closed(one)


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
def test_what_is_no_http_is_refused_in_our_form(running: Callable[..., Running], framing: bytes) -> None:
    server = running()
    with server.connection(HEAD + framing) as one:
        status, _, body = read(one)
        assert status == 400
        assert list(body["error"]) == ["message", "type", "param", "code"]
    assert requests.get(f"{server.url}/slow/0", timeout=10).json() == "done"  # it is alive


def test_a_client_that_asks_first_is_told_before_it_sends(running: Callable[..., Running]) -> None:
    server = running(api_key="k")
    asking = b"Expect: 100-continue\r\nContent-Length: %d\r\n%b\r\n"
    key = b"Authorization: Bearer k\r\n"
    with server.connection(HEAD + asking % (5, key)) as one:
        assert one.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        one.sendall(b"12345")
        assert read(one)[2] == {"size": 5}
    for length, header, status in ((LIMIT + 1, key, 413), (5, b"", 401)):
        with server.connection(HEAD + asking % (length, header)) as one:
            began = time.monotonic()
            assert (read(one)[0], closed(one)) == (status, True)  # no 100, and no waiting for what will not come
            assert time.monotonic() - began < 1


def test_a_connection_is_kept_where_the_body_was_read(running: Callable[..., Running]) -> None:
    with running().connection() as one:
        for _ in range(3):
            one.sendall(HEAD + b"Content-Length: 3\r\n\r\nabc")
            status, headers, _ = read(one)
            assert (status, "connection" in headers) == (200, False)


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: te"])
def test_a_head_that_never_comes_is_not_waited_for(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(worker, "KEEP_ALIVE_SECONDS", 0.4)
    server = running()
    with server.connection(HEAD + b"Content-Length: 0\r\n\r\n" if not sent else b"") as used:
        with server.connection(sent) as one:
            began = time.monotonic()
            for byte in b"x" * 5 if sent else b"":  # slowly is not at all
                one.sendall(bytes([byte]))
                time.sleep(0.05)
            assert closed(one)
            assert 0.3 < time.monotonic() - began < 2
        if not sent:
            assert read(used)[0] == 200
            assert closed(used)
    with server.connection(b"GET /slow/1 HTTP/1.1\r\nHost: test\r\n\r\n") as one:
        assert read(one)[2] == "done"  # its head did come: the answer may take longer


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
def test_a_head_without_end_is_refused(running: Callable[..., Running], opening: bytes, endless: bytes) -> None:
    server = running()
    sent = 0
    with server.connection(opening) as one:
        try:
            for _ in range(2000):
                sent += one.send(endless)
                time.sleep(0.0001)
        except OSError:
            pass
    assert sent < 1_500_000  # the kernel's own buffers take some
    assert requests.get(f"{server.url}/slow/0", timeout=10).json() == "done"


def test_a_head_of_a_common_size_is_fine(running: Callable[..., Running]) -> None:
    headers = {f"x-{i}": "x" * 1000 for i in range(40)}
    assert requests.get(f"{running().url}/slow/0", headers=headers, timeout=10).json() == "done"


def test_all_that_was_asked_before_the_end_is_answered(running: Callable[..., Running]) -> None:
    server = running(drain_seconds=5)
    with server.connection() as idle, server.connection() as asking:
        idle.sendall(b"GET /slow/0 HTTP/1.1\r\nHost: test\r\n\r\n")
        assert read(idle)[0] == 200
        asking.sendall(b"GET /slow/1 HTTP/1.1\r\nHost: test\r\n\r\n")
        time.sleep(0.1)
        began = time.monotonic()
        server.stop(after=0.3)
        time.sleep(0.1)
        late = [socket.create_connection(server.address, timeout=10) for _ in range(20)]
        for one in late:
            one.sendall(HEAD + b"Content-Length: 3\r\n\r\nabc")
        time.sleep(0.2)
        idle.sendall(b"GET /ready HTTP/1.1\r\nHost: test\r\n\r\n")
        status, headers, body = read(idle)
        assert (status, body) == (503, {"status": "unavailable", "reason": "The server is stopping"})
        assert headers["connection"] == "close"
        assert closed(idle)
        assert time.monotonic() - began < 0.6
        for one in late:
            with one:
                assert read(one)[2] == {"size": 3}
        time.sleep(0.3)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(server.address, timeout=10)
        assert read(asking)[2] == "done"
        server.thread.join(10)
        assert 0.8 < time.monotonic() - began < 2


def test_who_still_waits_when_time_is_up_is_told(running: Callable[..., Running]) -> None:
    server = running(drain_seconds=0.7)
    slow = b"GET /slow/60 HTTP/1.1\r\nHost: test\r\nx-request-id: mine\r\n\r\n"
    uploading = HEAD + b"Content-Length: 10\r\nx-request-id: mine\r\n\r\n12345"
    with server.connection(slow) as one, server.connection(uploading) as other, server.connection() as silent:
        time.sleep(0.1)
        server.stop()
        began = time.monotonic()
        for waiting in (one, other):
            status, headers, body = read(waiting)
            assert (status, headers["x-request-id"]) == (503, "mine")
            assert body["error"]["message"] == "The server is stopping"
            assert 0.5 < time.monotonic() - began < 1.5
        assert closed(one)
        assert closed(silent)
    server.thread.join(10)
    assert not server.thread.is_alive()
    assert time.monotonic() - began < 3


def test_a_connection_nobody_uses_does_not_delay_the_end(running: Callable[..., Running]) -> None:
    server = running(drain_seconds=10)
    with server.connection(b"GET /slow/0 HTTP/1.1\r\nHost: test\r\n\r\n") as idle, server.connection() as silent:
        assert read(idle)[0] == 200
        began = time.monotonic()
        server.stop()
        assert closed(idle)
        assert closed(silent)
        server.thread.join(10)
        assert time.monotonic() - began < 2


def start(tmp_path: Path, **settings: Any) -> tuple[subprocess.Popen[bytes], str]:
    """The worker as the supervisor starts it, and its URL."""
    stated = read_settings(triton_grpc=f"127.0.0.1:{free_port()}", workers=2, **settings)
    one = listen("127.0.0.1", 0, 1)[0][0]
    with one, (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "triton_embed.gateway.worker", str(one.fileno())],
            stdin=subprocess.PIPE,
            stderr=log,
            pass_fds=[one.fileno()],
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "TRITON_EMBED_API_KEY": "another"},
        )
        url = f"http://127.0.0.1:{one.getsockname()[1]}"
    assert process.stdin is not None
    with process.stdin as pipe:
        pipe.write(dump_settings(stated))
    for _ in range(300):
        try:
            requests.get(f"{url}/ready", timeout=5)
            return process, url
        except requests.ConnectionError:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
    raise AssertionError((tmp_path / "log").read_text())


def test_a_worker_takes_its_settings_from_its_input_and_tells_them_to_nobody(tmp_path: Path) -> None:
    process, url = start(tmp_path, api_key="hush", log_format="json")
    told = Path(f"/proc/{process.pid}/cmdline").read_bytes() + Path(f"/proc/{process.pid}/environ").read_bytes()
    headers = {"Authorization": "Bearer hush", "x-request-id": "mine"}
    page = requests.get(f"{url}/metrics", headers=headers, timeout=10)
    garbage = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10)
    with garbage:
        garbage.sendall(b"GARBAGE\r\n\r\n")
        assert read(garbage)[0] == 400
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert b"hush" not in told
    assert page.status_code == 200
    assert "triton_embed_requests_in_flight 1.0" in page.text
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["request_id"] for line in lines if line.get("route") == "/metrics"] == ["mine"]
    assert "Invalid HTTP request received." in [line["message"] for line in lines]


def test_a_worker_may_have_all_the_files_there_are(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 500), hard))
    process, _ = start(tmp_path)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    process.terminate()
    process.wait(20)
    line = next(line for line in limits.splitlines() if line.startswith("Max open files"))
    assert line.split()[3:5] == [str(hard)] * 2
