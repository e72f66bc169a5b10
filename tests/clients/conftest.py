"""The real stack, started by the command users start it with, and the vectors that clients must get from it.

Nothing of ours is imported here: the clients live in an environment of their own, .venv/clients, and know the server
by its address alone. `make conformance` runs this.
"""

import json
import os
import socket
import subprocess
import sysconfig
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SERVER = ROOT / ".venv" / "bin"
KEY = "secret"
WAITING_TOKENS = 20_000  # three requests of test_openai's that fills the queue

# Documented switches, all of them: no telemetry, no price list fetched. What asks for the network all the same meets
# a port that nobody listens on.
os.environ |= {
    "TRITON_EMBED_DTYPE": "float32",  # as expected.py
    "ANONYMIZED_TELEMETRY": "False",
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "NO_PROXY": "127.0.0.1,localhost",
}
# LlamaIndex carries tiktoken's tables: LangChain finds them there, and so does the server.
os.environ["TIKTOKEN_CACHE_DIR"] = str(Path(sysconfig.get_path("purelib"), "llama_index/core/_static/tiktoken_cache"))
os.environ |= {name.lower(): os.environ[name] for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")}

pytest_plugins = ["table"]


@dataclass(frozen=True)
class Expected:
    """What expected.py computed."""

    directory: Path
    vectors: dict[str, dict[str, list[float]]]
    ids: dict[str, dict[str, list[int]]]

    def check(self, found: Sequence[Any], keys: Sequence[str], model: str = "minilm") -> None:
        """Each of the found vectors is of unit length and points where the expected one does."""
        assert len(found) == len(keys)
        for vector, key in zip(found, keys, strict=True):
            wanted, given = np.array(self.vectors[model][key]), np.array(vector, np.float64)
            assert given.shape == wanted.shape
            assert abs(np.linalg.norm(given) - 1) < 1e-5
            assert given @ wanted > 0.99999 * np.linalg.norm(wanted)


class Stack:
    """`triton-embed serve` on free ports until all its models are ready, or have failed."""

    def __init__(self, log: Path, *flags: str) -> None:
        self.port, http, grpc, metrics = (_free_port() for _ in range(4))
        self.url = f"http://127.0.0.1:{self.port}"
        self.base_url = f"{self.url}/v1"  # as OpenAI's clients want it
        self.triton_http, self.triton_grpc = f"127.0.0.1:{http}", f"127.0.0.1:{grpc}"
        ports = (f"--triton-http-port={http}", f"--triton-grpc-port={grpc}", f"--triton-metrics-port={metrics}")
        with log.open("wb") as stream:
            command = [SERVER / "triton-embed", "serve", f"--port={self.port}", *ports, *flags]
            self._process = subprocess.Popen(command, stdout=stream, stderr=stream)
        deadline = time.monotonic() + 90
        while "Try: curl" not in log.read_text(errors="replace"):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise AssertionError(log.read_text(errors="replace"))
            time.sleep(0.1)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    directory = tmp_path_factory.mktemp("expected")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.getenv("PYTHONPATH", "")])}
    subprocess.run([SERVER / "python", HERE / "expected.py", directory], env=environment, check=True)
    return Expected(directory, **json.loads((directory / "expected.json").read_text()))


@pytest.fixture(scope="session")
def picture_url(expected: Expected) -> Iterator[str]:
    """The picture on a web server, on a host that the operator allows."""
    stored = (expected.directory / "picture.png").read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.send_header("Content-Length", str(len(stored)))
            self.end_headers()
            self.wfile.write(stored)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/images/023.jpg"
        server.shutdown()


@pytest.fixture(scope="session")
def stack(expected: Expected, picture_url: str) -> Iterator[Stack]:
    """Four models, without a key: minilm with its real weights, and the three that the documents ask."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_EMBED_MEDIA_ALLOWED_HOSTS", picture_url.split("/")[2])
        server = Stack(expected.directory / "log", f"--model-repository={expected.directory / 'models'}")
    with urllib.request.urlopen(f"{server.url}/v1/models") as answer:
        assert all(card["ready"] for card in json.load(answer)["data"])
    yield server
    server.stop()


@pytest.fixture(scope="session")
def strict(expected: Expected) -> Iterator[Stack]:
    """minilm behind a key, where little work may wait; clip without a checkpoint."""
    flags = (f"--model-repository={expected.directory / 'strict'}", f"--api-key={KEY}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_EMBED_MAX_WAITING_TOKENS", str(WAITING_TOKENS))
        server = Stack(expected.directory / "strict.log", *flags)
    yield server
    server.stop()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
