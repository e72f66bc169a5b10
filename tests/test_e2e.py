"""End to end: `triton-embed serve`, then common clients."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import oracles
import psutil
import pytest
import requests
from checkpoints import write_decoder, write_xlm_roberta
from sentence_transformers import SentenceTransformer

from conftest import MINILM, ROOT, Stack, write_bert
from test_checkpoint_files import Hub, hub

TEXT = "Once upon a time"
WORDS = ["the cat sat on the mat", "hello world", "你好，世界。", "a photo of a dog " * 9]
TRITON_EMBED = Path(sys.executable).with_name("triton-embed")
__all__ = ["hub"]  # a fixture


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    server = Stack(tmp_path_factory.mktemp("stack") / "log")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return SentenceTransformer(str(MINILM), device="cpu").encode([TEXT])[0]


def _is_close(vector: Any, expected: np.ndarray) -> bool:
    return float(np.asarray(vector) @ expected) > 0.99999


def test_ready_line_has_model_names_and_a_curl_command(stack: Stack) -> None:
    assert re.search(r"minilm", stack.output())
    command = next(line[line.index("curl") :] for line in stack.output().splitlines() if "curl" in line)
    response = json.loads(subprocess.check_output(["bash", "-c", command], stderr=subprocess.DEVNULL))
    assert len(response["data"][0]["embedding"]) == 384


def test_curl_without_a_content_type(stack: Stack, expected: np.ndarray) -> None:
    body = json.dumps({"model": "sentence-transformers/all-MiniLM-L6-v2", "input": TEXT})
    command = f"curl -s {stack.url}/v1/embeddings -d {shlex.quote(body)}"
    response = json.loads(subprocess.check_output(["bash", "-c", command]))
    assert list(response) == ["object", "data", "model", "usage"]
    assert response["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    assert _is_close(response["data"][0]["embedding"], expected)


def test_curl_with_token_ids(stack: Stack, expected: np.ndarray) -> None:
    ids = SentenceTransformer(str(MINILM), device="cpu").tokenizer.encode(TEXT)
    body = json.dumps({"model": "minilm", "input": ids})
    command = f"curl -s {stack.url}/v1/embeddings -d {shlex.quote(body)}"
    response = json.loads(subprocess.check_output(["bash", "-c", command]))
    assert _is_close(response["data"][0]["embedding"], expected)


def test_requests_with_json(stack: Stack, expected: np.ndarray) -> None:
    payload = {"model": "all-MiniLM-L6-v2", "input": TEXT, "encoding_format": "float"}
    response = requests.post(f"{stack.url}/v1/embeddings", json=payload, timeout=30).json()
    assert _is_close(response["data"][0]["embedding"], expected)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], lambda x: {"input": x}], ids=["text", "list", "dict"])
def test_openai_client(stack: Stack, expected: np.ndarray, wrap: Any) -> None:
    with openai.Client(base_url=f"{stack.url}/v1", api_key="EMPTY") as client:
        response = client.embeddings.create(model="minilm", input=wrap(TEXT))
    assert response.model == "minilm"
    assert _is_close(response.data[0].embedding, expected)


def test_openai_client_keeps_the_order_of_a_list(stack: Stack) -> None:
    texts = ["苹果是一种水果", "香蕉也是一种水果", "Python 是一种编程语言", TEXT, "the quick brown fox " * 30]
    with openai.Client(base_url=f"{stack.url}/v1", api_key="EMPTY") as client:
        response = client.embeddings.create(model="minilm", input=texts)
    vectors = SentenceTransformer(str(MINILM), device="cpu").encode(texts)
    for item, vector in zip(response.data, vectors, strict=True):
        assert _is_close(item.embedding, vector)


def test_refused_input_of_a_split_request_is_named_by_its_index(stack: Stack) -> None:
    """Send more tokens than fit in a forward pass: calls to Triton hold other inputs than the first ones."""
    texts = [f"{'word ' * (i * 37 % 90)}number {i}" for i in range(200)]
    texts[150] = "word " * 300
    body = {"model": "minilm", "input": texts, "truncate": "none"}
    message = "The input (302 tokens) is longer than the model's context length (256 tokens). (input at index 150)"
    error = {"message": message, "type": "invalid_request_error", "param": "input", "code": None}
    refused = requests.post(f"{stack.url}/v1/embeddings", json=body, timeout=30)
    assert (refused.status_code, refused.json()) == (400, {"error": error})
    texts[3] = texts[150]
    reported = requests.post(f"{stack.url}/v1/embeddings", json={**body, "on_error": "report"}, timeout=30).json()
    errors = {item["index"]: item["error"] for item in reported["data"] if item["object"] == "error"}
    assert errors == {3: {**error, "message": message.replace("150", "3")}, 150: error}


def test_readme_examples_run(stack: Stack) -> None:
    readme = (ROOT / "README.md").read_text().replace("http://127.0.0.1:30000", stack.url)
    blocks = re.findall(r"```(\w+)\n(.*?)```", readme, re.DOTALL)
    curls = [body for kind, body in blocks if kind == "bash" and body.startswith("curl")]
    snippets = [body for kind, body in blocks if kind == "python" and "openai" in body]
    assert curls
    assert snippets
    for body in curls:
        response = json.loads(subprocess.check_output(["bash", "-c", body], stderr=subprocess.DEVNULL))
        assert len(response["data"][0]["embedding"]) == 384
    for body in snippets:
        printed = subprocess.check_output([Path(requests.__file__).parents[4] / "bin" / "python", "-c", body])
        assert printed.strip() == b"384"


def test_local_checkpoint_is_served_under_the_given_name(tmp_path: Path) -> None:
    checkpoint = write_bert(tmp_path / "my model")
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "model_repository").rglob("*.p*")}
    flags = [
        "--model-path",
        str(checkpoint),
        "--served-model-name=mine",
        "--api-key=secret",
        "--dtype=float32",
        "--json-model-override-args",
        '{"matryoshka_dimensions": [20, 40, 1024, 1536]}',  # dimensions above its 60 are ignored
        "--is-embedding",
        "--trust-remote-code",
        "--chat-template=gme-qwen2-vl",
    ]
    server = Stack(tmp_path / "log", *flags)
    try:
        with openai.Client(base_url=f"{server.url}/v1", api_key="secret") as client:
            assert len(client.embeddings.create(model="mine", input="a cat", dimensions=20).data[0].embedding) == 20
            with pytest.raises(openai.BadRequestError, match=r"only supports \[20, 40\] matryoshka"):
                client.embeddings.create(model="mine", input="a cat", dimensions=30)
            assert "mine" in [model.id for model in client.models.list().data]
        refused = requests.post(f"{server.url}/v1/embeddings", json={"input": "a"}, timeout=30)
        assert refused.status_code == 401
        assert "no remote code is run" in server.output()
    finally:
        server.stop()
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_added_models_are_served_with_the_others(tmp_path: Path) -> None:
    """Serve with the flags that `add-model` prints. The path in the hub's cache gives one of the models its id."""
    models = tmp_path / "models"
    shutil.copytree(ROOT / "model_repository", models, ignore=shutil.ignore_patterns("__pyc*"))
    cached = tmp_path / "hub" / "models--intfloat--multilingual-e5-tiny" / "snapshots" / "0a1b2c"
    e5 = write_xlm_roberta(cached, pooling="mean")
    qwen3 = write_decoder(tmp_path / "checkpoints" / "Qwen" / "Qwen3-Embedding-0.1B", "qwen3")
    flags = [f"--model-repository={models}", f"--checkpoints={tmp_path / 'checkpoints'}"]
    commands = [
        [TRITON_EMBED, "add-model", e5, *flags],
        [TRITON_EMBED, "add-model", qwen3, "--name=small.v1", *flags],
    ]
    logs = [subprocess.run(command, check=True, capture_output=True, text=True).stderr for command in commands]
    printed_flags = [shlex.split(re.findall(r"serve it alone: (.+)", log)[0])[2:] for log in logs]
    server = Stack(tmp_path / "log", "--model=minilm", *printed_flags[0], *printed_flags[1])
    try:
        names = ("intfloat/Multilingual-E5-tiny", "qwen3-embedding-0.1b")
        bodies = [{"model": name, "input": WORDS} for name in names]
        responses = [requests.post(f"{server.url}/v1/embeddings", json=body, timeout=30).json() for body in bodies]
        models_served = requests.get(f"{server.url}/v1/models", timeout=30).json()["data"]
    finally:
        server.stop()
    expected = (
        oracles.pooled_vectors(e5, oracles.token_ids(e5, WORDS), "mean"),
        oracles.decoder_vectors(qwen3, oracles.token_ids(qwen3, WORDS)),
    )
    for response, vectors in zip(responses, expected, strict=True):
        np.testing.assert_allclose([item["embedding"] for item in response["data"]], vectors, atol=2e-5)
    assert {model["id"]: model["dimensions"] for model in models_served if model["ready"]} == {
        "minilm": 384,
        "multilingual-e5-tiny": 60,
        "small.v1": 52,
    }


def test_hub_id_is_downloaded_and_served_under_it(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_bert(tmp_path / "source")
    files = {str(path.relative_to(source)): path.read_bytes() for path in source.rglob("*") if path.is_file()}
    monkeypatch.setattr(
        "test_checkpoint_files.FILES", {**files, "pytorch_model.bin": b"a pickle", "modeling.py": b"code"}
    )
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    flags = ("--model-path=org/tiny", f"--checkpoints={tmp_path / 'checkpoints'}", "--triton-http-port=0")
    server = Stack(tmp_path / "log", *flags)
    try:
        (triton,) = (process for process in server.processes() if process.name() == "tritonserver")
        open_ports = {c.laddr.port for c in triton.net_connections() if c.status == psutil.CONN_LISTEN}
        assert len(open_ports) == 2  # gRPC and metrics
        assert int(server.grpc.rpartition(":")[2]) in open_ports
        response = requests.post(
            f"{server.url}/v1/embeddings", json={"model": "org/tiny", "input": "a cat"}, timeout=30
        )
    finally:
        server.stop()
    assert len(response.json()["data"][0]["embedding"]) == 60
    fetched = {
        str(path.relative_to(tmp_path / "checkpoints" / "org" / "tiny")) for path in tmp_path.rglob("tiny/**/*.*")
    }
    assert files.keys() <= fetched
    assert not {"pytorch_model.bin", "modeling.py"} & fetched


def test_full_queue_is_429_and_other_requests_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test a Triton queue of two calls, which one large request fills, and a small queue in the gateway."""
    monkeypatch.setenv("TRITON_EMBED_MAX_WAITING_TOKENS", "15000")
    models = tmp_path / "models"
    shutil.copytree(ROOT / "model_repository" / "minilm", models / "minilm", ignore=shutil.ignore_patterns("__pyc*"))
    config = models / "minilm" / "config.pbtxt"
    policy = "dynamic_batching { default_queue_policy { max_queue_size: 2 } }"
    small = config.read_text().replace("dynamic_batching { }", policy)
    assert policy in small
    config.write_text(small)
    server = Stack(tmp_path / "log", f"--model-repository={models}")
    body = {"input": [f"{i} {'many words ' * 40}" for i in range(16)], "encoding_format": "base64"}

    def send(_: int) -> requests.Response:
        return requests.post(f"{server.url}/v1/embeddings", json=body, timeout=60)

    try:
        with ThreadPoolExecutor(16) as pool:
            responses = list(pool.map(send, range(16)))
    finally:
        server.stop()
    assert {response.status_code for response in responses} == {200, 429}
    for response in responses:
        if response.status_code == 429:
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["type"] == "rate_limit_error"
        else:
            assert len(response.json()["data"]) == 16
