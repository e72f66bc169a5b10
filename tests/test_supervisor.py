"""Supervision: killed processes are restarted under load, and shutdown answers every request."""

import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest
import requests
import tritonclient.grpc
import tritonclient.http
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import InferenceServerException

from conftest import REPOSITORY, Stack, free_port
from triton_embed.gateway.process.supervisor import ServeError, check_ports, listen
from triton_embed.gateway.process.triton_process import SHARED_MEMORY, STUB, TritonOptions
from triton_embed.python_backend.checkpoint import repository

DRAIN_SECONDS = 4.0  # the default


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    server = Stack(tmp_path_factory.mktemp("stack") / "log", "--model=minilm")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Start a server with two workers, JSON logs and two API keys."""
    flags = ("--model=minilm", "--workers=2", "--log-format=json", "--api-key=hush,k3y", "--allow-shared-memory")
    server = Stack(tmp_path_factory.mktemp("crew") / "log", *flags)
    for _ in range(100):
        if server.output().count("Model 'minilm' is ready") == 2:  # each worker logs it
            break
        time.sleep(0.1)
    yield server
    server.stop()


def _command(process: psutil.Process) -> list[str]:
    """Return the command line; of a process that has ended meanwhile, an empty one."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def _victim(stack: Stack, name: str) -> psutil.Process:
    return next(process for process in stack.processes() if name in "".join(_command(process)[:1]))


def _workers(stack: Stack) -> list[psutil.Process]:
    return [process for process in stack.processes() if "triton_embed.gateway.process.server" in _command(process)]


def _has_name(process: psutil.Process, name: str) -> bool:
    """Return whether the process has the name; one that ended meanwhile has none, and a zombie is not looked for."""
    try:
        return process.name() == name and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


KEY = {"Authorization": "Bearer k3y"}


@dataclass(frozen=True)
class Exchange:
    """One request and its outcome: a status, or the name of the connection error."""

    began: float
    ended: float
    outcome: int | str
    message: str


def _send(url: str, body: bytes, session: requests.Session) -> Exchange:
    began = time.monotonic()
    try:
        # A long deadline, because requests that would be late are refused at once.
        answer = session.post(f"{url}/v1/embeddings", data=body, headers=KEY | {"x-request-timeout": "600"}, timeout=60)
    except requests.RequestException as error:
        return Exchange(began, time.monotonic(), type(error).__name__, str(error))
    message = answer.json().get("error", {}).get("message", "")
    return Exchange(began, time.monotonic(), answer.status_code, message)


class Load:
    """Four clients that send requests until stopped."""

    def __init__(self, stack: Stack) -> None:
        self.exchanges: list[Exchange] = []
        self._stack, self._done = stack, threading.Event()
        self._threads = [threading.Thread(target=self._send_until_done) for _ in range(4)]
        for thread in self._threads:
            thread.start()
        time.sleep(1)

    def _send_until_done(self) -> None:
        body = json.dumps({"input": ["hello world"] * 8}).encode()
        while not self._done.is_set():
            self.exchanges.append(_send(self._stack.url, body, requests.Session()))
            time.sleep(0.02)

    def await_recovery(self, killed: float, seconds: float) -> None:
        """Wait until requests succeed again, then stop; check that failures were answered and that none hung."""
        while time.monotonic() - killed < seconds:
            time.sleep(0.2)
            if any(exchange.outcome == 200 for exchange in self.exchanges if exchange.began > killed + 0.5):
                time.sleep(3)  # let the requests in flight end too
                break
        self._done.set()
        for thread in self._threads:
            thread.join(70)
        outcomes = [exchange.outcome for exchange in self.exchanges if exchange.began > killed - 1]
        assert outcomes[-8:] == [200] * 8, self._stack.output()[-2000:]
        assert set(outcomes) <= {200, 500, 503}
        assert any(outcome != 200 for outcome in outcomes)  # the process did die
        assert all(exchange.message for exchange in self.exchanges if exchange.outcome != 200)
        assert max(exchange.ended - exchange.began for exchange in self.exchanges) < 10


def _is_stub_since(process: psutil.Process, earlier: psutil.Process) -> bool:
    """Return whether a process is a model's and started after another one."""
    return _is_stub(process) and process.create_time() > earlier.create_time()


def _is_stub(process: psutil.Process) -> bool:
    """Return whether a process is a model's. The launcher runs a stub without arguments, to test it."""
    stub, *arguments = _command(process) or [""]
    return stub.endswith("triton_python_backend_stub") and bool(arguments)


def _serve(*flags: str, prefix: tuple[str, ...] = (), **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a server that ends by itself."""
    names = ("port", "triton-http-port", "triton-grpc-port", "triton-metrics-port")
    command = [*prefix, str(Path(sys.executable).with_name("triton-embed")), "serve"]
    command += [*(f"--{name}={free_port()}" for name in names), *flags]
    environment = {**os.environ, **variables}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


HANGING = """
import time
class TritonPythonModel:
    def initialize(self, args):
        time.sleep(1_000)
"""


def test_serve_ends_if_no_model_can_be_served(tmp_path: Path) -> None:
    """Serve a model without a checkpoint, and one whose process hangs while it loads."""
    shutil.copytree(REPOSITORY / "bge", tmp_path / "models" / "bge", ignore=shutil.ignore_patterns("__pycache__"))
    hanging = repository.write_model(REPOSITORY, "bge", tmp_path / "models", "hanging", {})
    (hanging / "1" / "model.py").write_text(HANGING)
    ended = _serve(
        f"--model-repository={tmp_path}/models", f"--checkpoints={tmp_path}", TRITON_EMBED_LOAD_TIMEOUT="2.5"
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        "triton-embed: no model can be served (bge: no checkpoint. "
        "Fetch it with: triton-embed download BAAI/bge-base-en-v1.5; "
        "hanging: it made no progress in 2.5 s; TRITON_EMBED_LOAD_TIMEOUT allows more)"
    )


NO_MOUNTS = ("unshare", "-m", "bash", "-c", 'mount --make-rprivate / && mount -o remount,ro,bind / && exec "$@"', "x")


@pytest.mark.parametrize(
    ("prefix", "variables", "message"),
    [
        (("bash", "-c", 'ulimit -n 64; exec "$@"', "x"), {}, "may open only 64 files; allow it at least 128"),
        ((), {"TMPDIR": "my tmp"}, "my tmp/.*: Triton cannot load models from a path with a space.*; set TMPDIR"),
        (NO_MOUNTS, {}, "No usable temporary directory found in .*: make one writable, or set TMPDIR"),
    ],
    ids=["open files", "TMPDIR", "read-only"],
)
def test_surroundings_that_do_not_suffice_end_the_start_with_one_sentence(
    prefix: tuple[str, ...], variables: dict[str, str], message: str, tmp_path: Path
) -> None:
    if "unshare" in prefix and os.geteuid() != 0:
        pytest.skip("only root can mount")
    for name, value in variables.items():
        (tmp_path / value).mkdir()
        variables = {**variables, name: str(tmp_path / value)}
    ended = _serve("--model=minilm", prefix=prefix, **variables)
    assert ended.returncode == 1
    assert re.search(f"^triton-embed: .*{message}", ended.stderr.splitlines()[-1]), ended.stderr
    assert "Traceback" not in ended.stderr


def test_memory_shared_with_a_model_has_no_name(stack: Stack) -> None:
    """Compute a request that needs more memory than the region has at first."""
    answer = requests.post(f"{stack.url}/v1/embeddings", json={"input": ["word " * 6_000] * 50}, timeout=60)
    assert len(answer.json()["data"]) == 50
    regions = [SHARED_MEMORY / words[2] for words in map(_command, stack.processes()) if "_stub" in "".join(words[:1])]
    assert regions
    assert not any(region.exists() for region in regions)


def test_nothing_can_be_loaded_through_the_ports_of_triton(stack: Stack) -> None:
    config = {"name": "evil", "backend": "python", "output": [{"name": "B", "data_type": "TYPE_INT32", "dims": [1]}]}
    files = {"file:1/model.py": b"raise SystemExit"}
    for module, address in ((tritonclient.http, stack.triton_http), (tritonclient.grpc, stack.grpc)):
        client = module.InferenceServerClient(address)
        with pytest.raises(InferenceServerException, match="not allowed"):
            client.load_model("evil", config=json.dumps(config), files=files)
        with pytest.raises(InferenceServerException, match="not allowed"):
            client.unload_model("minilm")
        assert client.is_model_ready("minilm")
        client.close()


def test_apis_that_reach_beyond_models_are_closed_to_everybody(stack: Stack) -> None:
    """Even to a user who reads the required header in the list of processes: it is not a valid name of a header."""
    words = _command(_victim(stack, "tritonserver"))
    flag = next(word for word in words if word.startswith("--http-restricted-api="))
    name, _, value = flag.partition("=")[2].partition(":")[2].partition("=")
    for module, address in ((tritonclient.http, stack.triton_http), (tritonclient.grpc, stack.grpc)):
        client = module.InferenceServerClient(address)
        for call in (
            client.get_system_shared_memory_status,
            client.get_cuda_shared_memory_status,
            partial(client.register_system_shared_memory, "mine", "/theirs", 4),
            client.get_trace_settings,
            partial(client.update_trace_settings, settings={"trace_rate": "1"}),
            client.get_log_settings,
            partial(client.update_log_settings, {"log_verbose_level": 3}),
        ):
            with pytest.raises(InferenceServerException, match="restricted"):
                call()
        client.close()
    with socket.create_connection(stack.triton_http.split(":")) as connection:
        connection.sendall(f"GET /v2/logging HTTP/1.1\r\n{name}: {value}\r\nConnection: close\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 403 ")
    assert _grpc_answers(stack.grpc, "ServerLive", f"triton-grpc-protocol-{name}", value) is False
    assert _grpc_answers(stack.grpc, "ServerLive", "triton-grpc-protocol-name", value) is True


def _grpc_answers(address: str, method: str, header: str, value: str) -> bool:
    """Send a call with a header that gRPC's clients refuse to send. Return whether a message comes back."""

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload

    headers = {":method": "POST", ":scheme": "http", ":path": f"/inference.GRPCInferenceService/{method}"}
    headers |= {":authority": "a", "te": "trailers", "content-type": "application/grpc", header: value}
    block = b"".join(b"\0" + b"".join(bytes([len(word)]) + word.encode() for word in pair) for pair in headers.items())
    settings, empty_message = frame(4, 0, 0, b""), frame(0, 1, 1, bytes(5))
    with socket.create_connection(address.split(":"), timeout=10) as connection, connection.makefile("rb") as stream:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings + frame(1, 4, 1, block) + empty_message)
        while True:
            size, kind = struct.unpack(">IB", b"\0" + stream.read(4))
            stream.read(5 + size)
            if kind in (0, 3):  # DATA or RST_STREAM
                return kind == 0


def test_shared_memory_of_triton_can_be_allowed(crew: Stack) -> None:
    region = SHARED_MEMORY / f"triton-embed-test-{os.getpid()}"
    region.write_bytes(bytes(4096))
    client = tritonclient.grpc.InferenceServerClient(crew.grpc)
    try:
        client.register_system_shared_memory("mine", f"/{region.name}", 4096)
        assert [known.name for known in client.get_system_shared_memory_status().regions.values()] == ["mine"]
        with pytest.raises(InferenceServerException, match="restricted"):
            client.get_log_settings()
    finally:
        client.close()
        region.unlink()


def test_killed_model_process_is_restarted_under_load(stack: Stack) -> None:
    stub = _victim(stack, "triton_python_backend_stub")
    load = Load(stack)
    stub.kill()
    load.await_recovery(time.monotonic(), 15)
    assert not stub.is_running()


def test_killed_process_of_one_of_two_instances_is_noticed(tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(REPOSITORY / "minilm", models / "minilm", ignore=shutil.ignore_patterns("__pyc*"))
    config = models / "minilm" / "config.pbtxt"
    config.write_text(config.read_text().replace("count: 1", "count: 2"))
    stack = Stack(tmp_path / "log", f"--model-repository={models}")

    def stubs() -> list[psutil.Process]:
        return [process for process in stack.processes() if STUB in "".join(_command(process)[:1])]

    try:
        first = stubs()
        assert len(first) == 2
        load = Load(stack)
        first[0].kill()
        load.await_recovery(time.monotonic(), 30)
        assert not set(first) & set(stubs())
        assert len(stubs()) == 2
    finally:
        stack.stop()


LOSING = """

from pathlib import Path

from triton_embed.python_backend.errors import DeviceLostError

Model = TritonPythonModel


class TritonPythonModel(Model):
    def initialize(self, args):
        super().initialize(args)
        compute, lost = self._scheduler._compute, Path({lost!r})

        def compute_or_lose(*args):
            if not lost.exists():
                lost.touch()
                raise DeviceLostError("CUDA error: an illegal memory access was encountered")
            return compute(*args)

        self._scheduler._compute = compute_or_lose
"""


def test_model_that_loses_its_gpu_says_so_and_comes_back(tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(REPOSITORY / "minilm", models / "minilm", ignore=shutil.ignore_patterns("__pyc*"))
    with (models / "minilm" / "1" / "model.py").open("a") as model:
        model.write(LOSING.format(lost=str(tmp_path / "lost")))
    stack = Stack(tmp_path / "log", f"--model-repository={models}")

    def post() -> requests.Response:
        return requests.post(f"{stack.url}/v1/embeddings", json={"input": ["hello world"] * 3}, timeout=60)

    try:
        lost = post()
        assert lost.status_code == 503
        assert lost.json()["error"]["message"] == "Model 'minilm' lost its GPU and starts again"
        deadline = time.monotonic() + 30
        while (answer := post()).status_code != 200:
            assert answer.status_code == 503, answer.text
            assert time.monotonic() < deadline, stack.output()[-2000:]
            time.sleep(0.2)
        assert len(answer.json()["data"]) == 3
    finally:
        stack.stop()


def test_killed_tritonserver_is_restarted_under_load_even_if_killed_again(stack: Stack) -> None:
    """Kill tritonserver, its successor while that starts, and the next one's model while it loads.

    It is unhealthy meanwhile. Only a failure of the very first start is final.
    """
    assert requests.get(f"{stack.url}/health", timeout=10).json() == {"status": "healthy"}
    stub, first = _victim(stack, "triton_python_backend_stub"), _victim(stack, "tritonserver")
    load = Load(stack)
    first.kill()
    time.sleep(0.3)
    health = requests.get(f"{stack.url}/health", timeout=10)
    assert (health.status_code, health.json()["status"]) == (503, "unavailable")
    deadline = time.monotonic() + 15
    # The process is named python until the launcher replaces itself with tritonserver.
    while not (named := [child for child in stack.processes() if _has_name(child, "tritonserver")]) or first in named:
        assert time.monotonic() < deadline, stack.output()[-2000:]
        time.sleep(0.02)
    named[0].kill()
    while not (loading := [child for child in stack.processes() if _is_stub_since(child, named[0])]):
        assert time.monotonic() < deadline, stack.output()[-2000:]
        time.sleep(0.02)
    time.sleep(0.5)
    loading[0].kill()
    load.await_recovery(time.monotonic(), 30)
    assert "the process of model minilm died while it loaded, restarting" in stack.output()
    assert stack.process.poll() is None
    assert not stub.is_running()
    while requests.get(f"{stack.url}/health", timeout=10).json() != {"status": "healthy"}:
        assert time.monotonic() < deadline + 30, stack.output()[-2000:]
        time.sleep(0.2)


def test_workers_share_the_port_and_each_reports_summed_metrics(crew: Stack) -> None:
    def send(_: int) -> int:  # one connection per request
        body = {"input": "hello world"}
        return requests.post(f"{crew.url}/v1/embeddings", json=body, headers=KEY, timeout=30).status_code

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(send, range(64))) == {200}
    assert len(_workers(crew)) == 2
    pages = [requests.get(f"{crew.url}/metrics", headers=KEY, timeout=10).text for _ in range(8)]
    assert all("triton_embed_tokens_total" in page for page in pages)
    for page in pages:
        samples = {s.name: s.value for family in text_string_to_metric_families(page) for s in family.samples}
        assert samples["triton_embed_inputs_total"] == 64
        assert samples["triton_embed_model_info"] == 1
    assert samples["triton_embed_requests_in_flight"] == 1  # the request for this page
    # Both workers served: each logs once that the model is ready.
    lines = [json.loads(line) for line in crew.output().splitlines()]
    assert Counter(line["message"] for line in lines)["Model 'minilm' is ready"] == 2
    answered = [line for line in lines if line.get("route") == "/v1/embeddings"]
    assert len({line["request_id"] for line in answered}) == 64
    assert all(line["status"] == 200 for line in answered)


def test_api_keys_do_not_appear_in_process_list_or_log(crew: Stack) -> None:
    for process in _workers(crew):
        assert not {"hush", "k3y"} & set(" ".join([*process.cmdline(), *process.environ().values()]).split())
        assert "hush" not in " ".join([*process.cmdline(), *process.environ().values()])
    assert "hush" not in crew.output()


def test_killed_worker_is_restarted_and_metrics_are_kept(crew: Stack) -> None:
    def inputs() -> float:
        page = requests.get(f"{crew.url}/metrics", headers=KEY, timeout=10).text
        samples = {s.name: s.value for family in text_string_to_metric_families(page) for s in family.samples}
        return samples["triton_embed_inputs_total"]

    body = {"input": "hello world"}
    assert requests.post(f"{crew.url}/v1/embeddings", json=body, headers=KEY, timeout=30).status_code == 200
    counted = inputs()
    before = _workers(crew)
    before[0].kill()
    for _ in range(40):  # connections that reach the dead worker wait for its successor
        answer = requests.post(f"{crew.url}/v1/embeddings", json=body, headers=KEY, timeout=30)
        assert answer.status_code == 200
    after = _workers(crew)
    assert len(after) == 2
    assert before[1] in after
    assert before[0] not in after
    assert inputs() == counted + 40
    assert "ended with code -9, restarting" in crew.output()


def _is_running(process: psutil.Process) -> bool:
    """Return whether the process runs; a zombie does not, its parent only has yet to reap it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_shutdown_under_load_answers_every_request(crew: Stack) -> None:
    """Stop with SIGQUIT under load: earlier requests get 200 or 503, then no process remains.

    The last test of `crew`.
    """
    processes = crew.processes()
    seen: list[Exchange] = []
    done = threading.Event()
    quick = json.dumps({"input": ["hello world"] * 4}).encode()
    fair, *long = (  # the last two take far longer than the drain allows; no two texts are the same
        json.dumps({"input": [f"{start + i} {'a long text ' * 40}" for i in range(count)]}).encode()
        for start, count in ((0, 100), (1_000, 2_000), (5_000, 2_000))
    )

    def send_until_done(body: bytes, keep_alive: bool) -> None:
        with requests.Session() as session:
            while not done.is_set():
                if keep_alive:
                    seen.append(_send(crew.url, body, session))
                else:
                    with requests.Session() as new_session:
                        seen.append(_send(crew.url, body, new_session))
                if isinstance(seen[-1].outcome, str):
                    return  # the server no longer listens

    threads = [threading.Thread(target=send_until_done, args=(quick, i % 2 == 0)) for i in range(8)]
    threads += [threading.Thread(target=send_until_done, args=(body, False)) for body in (fair, *long)]
    for thread in threads[:8]:
        thread.start()
    time.sleep(2)
    for thread in threads[8:]:  # last, because later requests queue behind them
        thread.start()
        time.sleep(0.05)
    signalled = time.monotonic()
    took = crew.stop(signal.SIGQUIT)
    done.set()
    for thread in threads:
        thread.join(70)
    before = [exchange for exchange in seen if exchange.began < signalled - 0.02]
    in_flight = [exchange for exchange in before if exchange.ended > signalled]
    rejections = {exchange.message for exchange in before if exchange.outcome == 503}
    assert len(in_flight) >= 3
    # 429: one of the long ones, if it would be late at the speed that is left beside the others.
    assert {exchange.outcome for exchange in before} - {429} == {200, 503}, in_flight
    assert rejections == {"The server is stopping"}, crew.output()
    assert any(exchange.outcome == 200 for exchange in in_flight)
    assert all(exchange.ended - signalled < DRAIN_SECONDS + 1.5 for exchange in in_flight)
    assert "reset" not in " ".join(exchange.message for exchange in before).lower()
    assert took < DRAIN_SECONDS + 6
    assert crew.process.returncode == 0
    assert [process for process in processes if _is_running(process)] == []
    assert "Traceback" not in crew.output(), crew.output()


def test_every_worker_answers_once_ready_and_shutdown_without_load_is_quick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve on every address, without Triton's HTTP. At the end nothing is in flight, so there is no drain."""
    monkeypatch.setenv("TRITON_EMBED_DRAIN_SECONDS", "60")
    stack = Stack(tmp_path / "log", "--model=minilm", "--workers=3", "--host=::", "--triton-http-port=0")
    # Every worker answers since the ready line. One connection per request: the kernel spreads them over the workers.
    answers = [requests.post(f"{stack.url}/v1/embeddings", json={"input": "a"}, timeout=60) for _ in range(40)]
    assert [answer.status_code for answer in answers] == [200] * 40
    port = stack.url.rpartition(":")[2]
    assert requests.get(f"http://[::1]:{port}/health", timeout=10).status_code == 200
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(stack.triton_http.split(":"))
    metrics = set(Path(tmp_path.root, "tmp").glob("triton-embed-metrics-*"))
    processes = stack.processes()
    assert stack.stop(signal.SIGINT) < 30
    assert stack.process.returncode == 0
    assert metrics - set(Path(tmp_path.root, "tmp").glob("triton-embed-metrics-*"))
    assert [process for process in processes if _is_running(process)] == []


def test_killed_supervisor_takes_every_child_with_it(tmp_path: Path) -> None:
    stack = Stack(tmp_path / "log", "--model=minilm", "--workers=2")
    processes = stack.processes()
    assert len(processes) >= 4  # two workers, tritonserver, a stub
    stack.process.kill()
    stack.process.wait()
    for _ in range(150):
        if not any(map(_is_running, processes)):
            return
        time.sleep(0.1)
    raise AssertionError([process for process in processes if _is_running(process)])


def test_listen_shares_a_port_only_between_workers() -> None:
    shared = listen("127.0.0.1", 0, 3)
    assert len({listener.getsockname() for (listener,) in shared}) == 1
    alone = listen("127.0.0.1", 0, 1)[0][0]
    alone.listen()
    with pytest.raises(ServeError, match=r"cannot listen on 127\.0\.0\.1:\d+ .*in use"):
        listen("127.0.0.1", alone.getsockname()[1], 1)
    for workers in (1, 2):  # sockets that share their port would not notice that others use it
        with pytest.raises(ServeError, match=r"cannot listen on 127\.0\.0\.1:\d+ .*in use"):
            listen("127.0.0.1", alone.getsockname()[1], workers)
    for host in ("no.such.host.invalid", "a..b"):
        with pytest.raises(ServeError, match=rf"cannot listen on {host} .* choose another with --host"):
            listen(host, 0, 1)
    for listener in (*(listener for (listener,) in shared), alone):
        listener.close()


def test_listen_binds_both_families_for_every_address() -> None:
    listeners = listen("::", 0, 2)
    for pair in listeners:
        assert {listener.getsockname()[0] for listener in pair} == {"0.0.0.0", "::"}
    assert len({listener.getsockname()[1] for pair in listeners for listener in pair}) == 1
    for listener in (listener for pair in listeners for listener in pair):
        listener.close()


@pytest.mark.parametrize(
    ("ports", "message"),
    [
        ({"grpc_port": 0}, "--triton-grpc-port is 0; it must be between 1 and 65535"),
        ({"http_port": 70_000}, "--triton-http-port is 70000; it must be between 1 and 65535"),
        ({"http_port": 1234, "grpc_port": 1234}, "--triton-http-port and --triton-grpc-port are both 1234"),
    ],
)
def test_ports_that_triton_cannot_open_are_refused(ports: dict[str, int], message: str) -> None:
    with pytest.raises(ServeError, match=message):
        check_ports(TritonOptions(Path("m"), **ports), [])


def test_port_of_the_gateway_is_not_free_for_triton() -> None:
    for host in ("127.0.0.1", "0.0.0.0"):
        (listener,) = listen(host, 0, 1)[0]
        port = listener.getsockname()[1]
        with pytest.raises(ServeError, match=f"--port and --triton-grpc-port are both {port}"):
            check_ports(TritonOptions(Path("m"), grpc_port=port), [listener])
        listener.close()


def test_listen_binds_every_address_of_a_host_name() -> None:
    port = free_port()
    listeners = listen("localhost", port, 1)[0]
    addresses = {info[4][0] for info in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM)}
    assert "127.0.0.1" in {listener.getsockname()[0] for listener in listeners} <= addresses
    for listener in listeners:
        listener.close()
