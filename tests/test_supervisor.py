"""Staying up: what dies is started again, while requests go on and none hangs."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import psutil
import pytest
import requests

from conftest import Stack
from triton_embed.gateway.triton_process import SHARED_MEMORY


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    server = Stack(tmp_path_factory.mktemp("stack") / "log", "--model=minilm")
    yield server
    server.stop()


def _victim(stack: Stack, name: str) -> psutil.Process:
    return next(process for process in stack.processes() if name in process.cmdline()[0])


@pytest.mark.parametrize(("name", "seconds"), [("triton_python_backend_stub", 15), ("tritonserver", 25)])
def test_what_is_killed_under_load_comes_back(stack: Stack, name: str, seconds: float) -> None:
    """kill -9 while four clients ask: answers come back, failures are 5xx with a body, no request hangs."""
    done = threading.Event()
    seen: list[tuple[float, float, int, dict[str, object]]] = []  # began, took, status, body

    def ask() -> None:
        while not done.is_set():
            began = time.monotonic()
            answer = requests.post(f"{stack.url}/v1/embeddings", json={"input": ["hello world"] * 8}, timeout=60)
            seen.append((began, time.monotonic() - began, answer.status_code, answer.json()))
            time.sleep(0.02)

    stub = _victim(stack, "triton_python_backend_stub")
    region = SHARED_MEMORY / stub.cmdline()[2]
    assert region.exists()
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    os.kill(_victim(stack, name).pid, signal.SIGKILL)
    killed = time.monotonic()
    while time.monotonic() - killed < seconds:
        time.sleep(0.2)
        if any(status == 200 for began, _, status, _ in seen if began > killed + 0.5):
            time.sleep(3)  # those that were in flight end too
            break
    done.set()
    for thread in threads:
        thread.join(70)
    statuses = [status for began, _, status, _ in seen if began > killed - 1]
    assert statuses[-8:] == [200] * 8, stack.output()[-2000:]
    assert set(statuses) <= {200, 500, 503}
    assert any(status != 200 for status in statuses)  # it did die
    assert all("error" in body for _, _, status, body in seen if status != 200)
    assert not region.exists()
    assert not stub.is_running()
    assert max(took for _, took, _, _ in seen) < 10


def test_health_says_unavailable_while_triton_is_gone(stack: Stack) -> None:
    assert requests.get(f"{stack.url}/health", timeout=10).json() == {"status": "healthy"}
    os.kill(_victim(stack, "tritonserver").pid, signal.SIGKILL)
    time.sleep(0.3)
    gone = requests.get(f"{stack.url}/health", timeout=10)
    assert gone.status_code == 503
    assert gone.json()["status"] == "unavailable"
    for _ in range(150):
        if requests.get(f"{stack.url}/health", timeout=10).status_code == 200:
            return
        time.sleep(0.2)
    raise AssertionError(stack.output()[-2000:])
