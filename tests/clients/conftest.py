"""Fixtures of the client conformance tests: the real stack, and the vectors that clients must receive.

The stack is started with the same command that users run. The clients run in a separate environment, .venv/clients,
which does not import this project and knows the server only by its address. `make conformance` runs these tests.
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
MAX_PENDING_TOKENS = 20_000  # about three requests of the full-queue test in test_openai.py

# Documented switches that disable telemetry and the download of price lists. Any other network access fails because the
# proxy port is closed.
os.environ |= {
    "TRITON_EMBED_DTYPE": "float32",  # the type in which expected.py computes vectors
    "ANONYMIZED_TELEMETRY": "False",
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "NO_PROXY": "127.0.0.1,localhost",
}
# LlamaIndex ships tiktoken's tables; LangChain and the server read them from there.
os.environ["TIKTOKEN_CACHE_DIR"] = str(Path(sysconfig.get_path("purelib"), "llama_index/core/_static/tiktoken_cache"))
os.environ |= {name.lower(): os.environ[name] for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")}

pytest_plugins = ["table"]


@dataclass(frozen=True)
class Expected:
    """The reference vectors and token ids that expected.py computed."""

    directory: Path
    vectors: dict[str, dict[str, list[float]]]
    ids: dict[str, dict[str, list[int]]]

    def check(self, vectors: Sequence[Any], keys: Sequence[str], model: str = "minilm") -> None:
        """Assert that each vector has unit length and the direction of the expected vector for its key."""
        assert len(vectors) == len(keys)
        for vector, key in zip(vectors, keys, strict=True):
            reference, actual = np.array(self.vectors[model][key]), np.array(vector, np.float64)
            assert actual.shape == reference.shape
            assert abs(np.linalg.norm(actual) - 1) < 1e-5
            assert actual @ reference > 0.99999 * np.linalg.norm(reference)


class Stack:
    """A running `triton-embed serve` on free ports; the constructor returns when every model is ready or has failed."""

    def __init__(self, log: Path, *flags: str) -> None:
        self.port, http, grpc, metrics = (_free_port() for _ in range(4))
        self.url = f"http://127.0.0.1:{self.port}"
        self.base_url = f"{self.url}/v1"  # in the form that OpenAI's clients expect
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
def image_url(expected: Expected) -> Iterator[str]:
    """Serve the image on a host that the gateway may fetch from; yield its URL."""
    image_bytes = (expected.directory / "picture.png").read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.send_header("Content-Length", str(len(image_bytes)))
            self.end_headers()
            self.wfile.write(image_bytes)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/images/023.jpg"
        server.shutdown()


@pytest.fixture(scope="session")
def stack(expected: Expected, image_url: str) -> Iterator[Stack]:
    """Start four models without an API key: minilm with its real weights, and three documented families."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_EMBED_MEDIA_ALLOWED_HOSTS", image_url.split("/")[2])
        server = Stack(expected.directory / "log", f"--model-repository={expected.directory / 'models'}")
    with urllib.request.urlopen(f"{server.url}/v1/models") as answer:
        assert all(card["ready"] for card in json.load(answer)["data"])
    yield server
    server.stop()


@pytest.fixture(scope="session")
def strict(expected: Expected) -> Iterator[Stack]:
    """Start minilm with an API key and a small queue, and clip without a checkpoint."""
    flags = (f"--model-repository={expected.directory / 'strict'}", f"--api-key={KEY}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_EMBED_MAX_WAITING_TOKENS", str(MAX_PENDING_TOKENS))
        server = Stack(expected.directory / "strict.log", *flags)
    yield server
    server.stop()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
