"""Staying up: what dies is started again, while requests go on and none hangs. And ending: everybody is answered."""

import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from conftest import Stack, free_port
from triton_embed.gateway.process.supervisor import ServeError, listen
from triton_embed.gateway.process.triton_process import SHARED_MEMORY

DRAIN_SECONDS = 4.0  # the default


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    server = Stack(tmp_path_factory.mktemp("stack") / "log", "--model=minilm")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two workers."""
    flags = ("--model=minilm", "--workers=2", "--log-format=json", "--api-key=hush,k3y")
    server = Stack(tmp_path_factory.mktemp("crew") / "log", *flags)
    for _ in range(100):
        if server.output().count("Model 'minilm' is ready") == 2:  # each finds out for itself
            break
        time.sleep(0.1)
    yield server
    server.stop()


def _victim(stack: Stack, name: str) -> psutil.Process:
    return next(process for process in stack.processes() if name in process.cmdline()[0])


def _workers(stack: Stack) -> list[psutil.Process]:
    return [process for process in stack.processes() if "triton_embed.gateway.process.server" in process.cmdline()]


def _regions(stack: Stack) -> list[Path]:
    """The shared memory of its models."""
    stubs = (process.cmdline() for process in stack.processes())
    return [SHARED_MEMORY / words[2] for words in stubs if words and words[0].endswith("triton_python_backend_stub")]


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


def test_one_that_dies_on_its_way_up_is_started_again(stack: Stack) -> None:
    """Only the first start may fail for good: what once served is tried until it serves again."""
    first = _victim(stack, "tritonserver").pid
    os.kill(first, signal.SIGKILL)
    deadline = time.monotonic() + 25
    second = first
    while second == first:
        assert time.monotonic() < deadline, stack.output()[-2000:]
        # By its real name: before that it is Python, on its way to become it.
        alive = [one for one in stack.processes() if one.name() == "tritonserver" and one.status() != "zombie"]
        second = next((one.pid for one in alive if one.pid != first), first)
        time.sleep(0.02)
    os.kill(second, signal.SIGKILL)
    answer = None
    while answer is None or answer.status_code != 200:
        assert time.monotonic() < deadline, stack.output()[-2000:]
        assert stack.process.poll() is None, stack.output()[-2000:]
        time.sleep(0.2)
        answer = requests.post(f"{stack.url}/v1/embeddings", json={"input": "hello"}, timeout=60)


def test_the_ready_line_speaks_for_every_worker(tmp_path: Path) -> None:
    stack = Stack(tmp_path / "log", "--model=minilm", "--workers=4")
    try:
        # A connection each: the kernel deals them out.
        answers = [requests.post(f"{stack.url}/v1/embeddings", json={"input": "a"}, timeout=60) for _ in range(40)]
    finally:
        stack.stop()
    assert [answer.status_code for answer in answers] == [200] * 40


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


KEY = {"Authorization": "Bearer k3y"}


def test_workers_share_the_port_and_any_tells_the_sum(crew: Stack) -> None:
    def ask(i: int) -> int:  # on a connection of its own
        body = {"input": "hello world"}
        return requests.post(f"{crew.url}/v1/embeddings", json=body, headers=KEY, timeout=30).status_code

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(64))) == {200}
    assert len(_workers(crew)) == 2
    told = [requests.get(f"{crew.url}/metrics", headers=KEY, timeout=10).text for _ in range(8)]
    assert all("triton_embed_tokens_total" in page for page in told)
    for page in told:
        samples = {s.name: s.value for family in text_string_to_metric_families(page) for s in family.samples}
        assert samples["triton_embed_inputs_total"] == 64
        assert samples["triton_embed_model_info"] == 1
    assert samples["triton_embed_requests_in_flight"] == 1  # this one
    # Both of them answered: each says that it saw the model.
    lines = [json.loads(line) for line in crew.output().splitlines()]
    assert Counter(line["message"] for line in lines)["Model 'minilm' is ready"] == 2
    answered = [line for line in lines if line.get("route") == "/v1/embeddings"]
    assert len({line["request_id"] for line in answered}) == 64
    assert all(line["status"] == 200 for line in answered)


def test_no_key_is_told_by_the_process_list_or_the_log(crew: Stack) -> None:
    for process in _workers(crew):
        assert not {"hush", "k3y"} & set(" ".join([*process.cmdline(), *process.environ().values()]).split())
        assert "hush" not in " ".join([*process.cmdline(), *process.environ().values()])
    assert "hush" not in crew.output()


def test_a_worker_that_is_killed_comes_back_and_what_was_counted_stays(crew: Stack) -> None:
    def inputs() -> float:
        page = requests.get(f"{crew.url}/metrics", headers=KEY, timeout=10).text
        samples = {s.name: s.value for family in text_string_to_metric_families(page) for s in family.samples}
        return samples["triton_embed_inputs_total"]

    body = {"input": "hello world"}
    assert requests.post(f"{crew.url}/v1/embeddings", json=body, headers=KEY, timeout=30).status_code == 200
    counted = inputs()
    before = _workers(crew)
    before[0].kill()
    for _ in range(40):  # whichever they are dealt to: those of the dead one wait for the next
        answer = requests.post(f"{crew.url}/v1/embeddings", json=body, headers=KEY, timeout=30)
        assert answer.status_code == 200
    after = _workers(crew)
    assert len(after) == 2
    assert before[1] in after
    assert before[0] not in after
    assert inputs() == counted + 40
    assert "ended with code -9, restarting" in crew.output()


def _lives(process: psutil.Process) -> bool:
    """A zombie does not: whoever it was left to has yet to take note."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass(frozen=True)
class Asked:
    """One request, and how it went: a status, or the connection's fault."""

    began: float
    ended: float
    outcome: int | str
    message: str


def _ask(url: str, body: bytes, session: requests.Session) -> Asked:
    began = time.monotonic()
    try:
        answer = session.post(f"{url}/v1/embeddings", data=body, timeout=60)
    except requests.RequestException as error:
        return Asked(began, time.monotonic(), type(error).__name__, str(error))
    message = answer.json().get("error", {}).get("message", "")
    return Asked(began, time.monotonic(), answer.status_code, message)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_end_leaves_nobody_without_an_answer(workers: int, tmp_path: Path) -> None:
    """SIGTERM under load: what was sent before is answered in full, or told that time was up; then nothing is left."""
    stack = Stack(tmp_path / "log", "--model=minilm", f"--workers={workers}")
    regions, processes = _regions(stack), stack.processes()
    seen: list[Asked] = []
    done = threading.Event()
    quick = json.dumps({"input": ["hello world"] * 4}).encode()
    fair, *long = (  # the last two go on far longer than they may; no two texts are the same
        json.dumps({"input": [f"{start + i} {'a long text ' * 40}" for i in range(count)]}).encode()
        for start, count in ((0, 100), (1_000, 2_000), (5_000, 2_000))
    )

    def ask(body: bytes, keep: bool) -> None:
        with requests.Session() as session:
            while not done.is_set():
                if keep:
                    seen.append(_ask(stack.url, body, session))
                else:
                    with requests.Session() as once:
                        seen.append(_ask(stack.url, body, once))
                if isinstance(seen[-1].outcome, str):
                    return  # it has stopped listening

    threads = [threading.Thread(target=ask, args=(quick, i % 2 == 0)) for i in range(8)]
    threads += [threading.Thread(target=ask, args=(body, False)) for body in (fair, *long)]
    for thread in threads[:8]:
        thread.start()
    time.sleep(2)
    for thread in threads[8:]:  # last, as everybody waits behind them
        thread.start()
        time.sleep(0.05)
    signalled = time.monotonic()
    took = stack.stop()
    done.set()
    for thread in threads:
        thread.join(70)
    before = [one for one in seen if one.began < signalled - 0.02]
    in_flight = [one for one in before if one.ended > signalled]
    assert len(in_flight) >= 3
    assert {one.outcome for one in before} == {200, 503}, in_flight
    assert {one.message for one in before if one.outcome == 503} == {"The server is stopping"}, stack.output()
    assert any(one.outcome == 200 for one in in_flight)
    assert all(one.ended - signalled < DRAIN_SECONDS + 1.5 for one in in_flight)
    assert "reset" not in " ".join(one.message for one in before).lower()
    assert took < DRAIN_SECONDS + 6
    assert stack.process.returncode == 0
    assert [process for process in processes if _lives(process)] == []
    assert regions
    assert [region for region in regions if region.exists()] == []
    assert "Traceback" not in stack.output(), stack.output()


@pytest.mark.parametrize("workers", [1, 2])
def test_without_load_the_end_is_quick(workers: int, tmp_path: Path) -> None:
    stack = Stack(tmp_path / "log", "--model=minilm", f"--workers={workers}")
    metrics = set(Path(tmp_path.root, "tmp").glob("triton-embed-metrics-*"))
    # Waiting for the drain (4 s) would take more than 6 s in all; a stop without it takes 2.8 to 4.0 s on 2 cores.
    assert stack.stop(signal.SIGINT) < 5
    assert stack.process.returncode == 0
    assert len(metrics - set(Path(tmp_path.root, "tmp").glob("triton-embed-metrics-*"))) >= workers - 1


def test_a_supervisor_that_is_killed_takes_everything_with_it(tmp_path: Path) -> None:
    stack = Stack(tmp_path / "log", "--model=minilm", "--workers=2")
    processes = stack.processes()
    assert len(processes) >= 4  # two workers, tritonserver, a stub
    stack.process.kill()
    stack.process.wait()
    for _ in range(150):
        if not any(map(_lives, processes)):
            return
        time.sleep(0.1)
    raise AssertionError([process for process in processes if _lives(process)])


def test_sockets_of_workers_share_a_port_and_a_lone_one_does_not() -> None:
    shared = listen("127.0.0.1", 0, 3)
    assert len({one.getsockname() for (one,) in shared}) == 1
    alone = listen("127.0.0.1", 0, 1)[0][0]
    alone.listen()
    with pytest.raises(ServeError, match=r"cannot listen on 127\.0\.0\.1:\d+ .*in use"):
        listen("127.0.0.1", alone.getsockname()[1], 1)
    with pytest.raises(ServeError, match=r"cannot listen on no\.such\.host\.invalid:0"):
        listen("no.such.host.invalid", 0, 1)
    for one in (*(one for (one,) in shared), alone):
        one.close()


def test_a_name_is_listened_to_at_all_its_addresses() -> None:
    port = free_port()
    found = listen("localhost", port, 1)[0]
    wanted = {info[4][0] for info in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM)}
    assert "127.0.0.1" in {one.getsockname()[0] for one in found} <= wanted
    for one in found:
        one.close()
