"""The gateway as its callers meet it: real HTTP clients, uvicorn, and the real tritonserver behind."""

import asyncio
import base64
import json
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import requests
import uvicorn

from conftest import Triton, free_port
from triton_embed.gateway.app import create_app
from triton_embed.gateway.registry import REFRESH_GAP_SECONDS
from triton_embed.gateway.settings import read_settings


class Served:
    """The gateway under uvicorn in a thread, on a free port."""

    def __init__(self, **settings: Any) -> None:
        app = create_app(read_settings(**settings))
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none"))
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def post(self, body: Any, path: str = "/v1/embeddings") -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=30)

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, timeout=30)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def served(triton: Triton) -> Iterator[Served]:
    """Two models are ready behind it, minilm and bge_tiny; bge has no checkpoint."""
    gateway = Served(triton_grpc=triton.grpc)
    yield gateway
    gateway.stop()


@pytest.fixture(scope="module")
def locked(triton: Triton) -> Iterator[Served]:
    """With a key, small limits, and a name of its own."""
    gateway = Served(triton_grpc=triton.grpc, api_key="k3y", max_body_bytes=2000, max_inputs=3, request_timeout=5)
    yield gateway
    gateway.stop()


def error_of(response: requests.Response | httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = body["error"]
    return error


def vectors_of(response: requests.Response) -> np.ndarray[Any, Any]:
    assert response.status_code == 200, response.text
    return np.array([item["embedding"] for item in response.json()["data"]], dtype=np.float32)


def test_openai_with_its_default_base64(served: Served) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="EMPTY") as client:
        reply = client.embeddings.create(model="all-MiniLM-L6-v2", input=["hello world", "你好 😀"])
        packed = np.array([item.embedding for item in reply.data])
        plain = client.embeddings.create(model="minilm", input=["hello world", "你好 😀"], encoding_format="float")
        ids = client.embeddings.create(model="minilm", input=[101, 7592, 2088, 102])
        told = client.embeddings.create(model="tiny", input={"input": "hello", "instruction": "the cat"})  # type: ignore[arg-type]
        untold = client.embeddings.create(model="tiny", input="hello", dimensions=60)
        assert [model.id for model in client.models.list()] == ["bge_tiny", "minilm", "bge"]
        retrieved = client.models.retrieve("sentence-transformers/all-MiniLM-L6-v2")
    assert reply.model == "all-MiniLM-L6-v2"
    assert np.allclose(packed, [item.embedding for item in plain.data], atol=1e-7)
    assert np.allclose(ids.data[0].embedding, packed[0], atol=2e-5)
    assert not np.allclose(told.data[0].embedding, untold.data[0].embedding, atol=1e-2)
    assert (plain.usage.prompt_tokens, ids.usage.total_tokens) == (plain.usage.total_tokens, 4)
    assert retrieved.id == "minilm"


def test_openai_async_many_at_once(served: Served) -> None:
    async def run() -> list[list[float]]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="EMPTY") as client:
            calls = [client.embeddings.create(model="tiny", input=f"the cat {i}") for i in range(32)]
            return [reply.data[0].embedding for reply in await asyncio.gather(*calls)]

    together = np.array(asyncio.run(run()))
    alone = vectors_of(served.post({"model": "tiny", "input": [f"the cat {i}" for i in range(32)]}))
    assert np.allclose(together, alone, atol=2e-5)


def test_curl_without_a_content_type(served: Served) -> None:
    for given in ("Once upon a time", [101, 2320, 2588, 1037, 2051, 102]):
        body = json.dumps({"model": "minilm", "input": given})
        command = ["curl", "-s", f"{served.url}/v1/embeddings", "-d", body]
        reply = json.loads(subprocess.check_output(command))
        assert len(reply["data"][0]["embedding"]) == 384
        assert reply["usage"]["prompt_tokens"] == 6


def test_requests_as_in_the_documents(served: Served) -> None:
    payload = {"model": "minilm", "input": "法国的首都是什么?", "encoding_format": "float"}
    reply = requests.post(served.url + "/v1/embeddings", json=payload, timeout=30).json()
    assert list(reply) == ["object", "data", "model", "usage"]
    assert list(reply["data"][0]) == ["object", "embedding", "index"]
    assert np.isclose(np.linalg.norm(reply["data"][0]["embedding"]), 1, atol=1e-6)


def test_httpx_on_the_alias_route(served: Served) -> None:
    given = {"model": "tiny", "input": ["a", "b"], "encoding_format": "base64", "dimensions": 20, "user": "me"}
    with httpx.Client() as client:
        reply = client.post(f"{served.url}/embeddings", json=given).json()
    rows = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in reply["data"]]
    assert [row.shape for row in rows] == [(20,), (20,)]
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


def test_what_was_cut_is_told(served: Served) -> None:
    long = served.post({"model": "minilm", "input": ["word " * 400, "short", "word " * 300]})
    assert long.headers["x-truncated-inputs"] == "2"
    assert long.json()["usage"]["prompt_tokens"] == 256 + 3 + 256
    assert "x-truncated-inputs" not in served.post({"model": "minilm", "input": "short"}).headers
    start = served.post({"model": "minilm", "input": "first " + "word " * 400, "truncate": "start"})
    end = served.post({"model": "minilm", "input": "first " + "word " * 400})
    assert not np.allclose(vectors_of(start), vectors_of(end), atol=1e-3)


REFUSED = [
    ({"model": "minilm"}, 400, "input", "input is required"),
    ({"model": "minilm", "input": ""}, 400, "input", "Input cannot be empty"),
    ({"model": "minilm", "input": []}, 400, "input", "Input cannot be empty"),
    ({"model": "minilm", "input": ["a", " "]}, 400, "input", "Input at index 1 cannot be empty or whitespace only"),
    ({"model": "minilm", "input": [[1], []]}, 400, "input", "Input at index 1 cannot be empty"),
    ({"model": "minilm", "input": [[1], [30522]]}, 400, "input", "Input at index 1 has token id 30522, which"),
    ({"model": "minilm", "input": [-1]}, 400, "input", "Input at index 0 has token id -1, which"),
    ({"model": "minilm", "input": ["a"] * 2049}, 400, "input", "At most 2048 inputs fit in one request, got 2049"),
    ({"model": "minilm", "input": [[1] * 300_001]}, 400, "input", "The request has 300001 tokens"),
    (
        {"model": "minilm", "input": ["a", "word " * 300], "truncate": "none"},
        400,
        None,
        "The input (302 tokens) is longer than the model's context length (256 tokens).",
    ),
    (
        {"model": "minilm", "input": [1] * 300, "truncate": False},
        400,
        "input",
        "The input (300 tokens) is longer than the model's context length (256 tokens).",
    ),
    (
        {"model": "minilm", "input": "a", "encoding_format": "int8"},
        400,
        "encoding_format",
        "encoding_format must be either 'float' or 'base64', got 'int8'",
    ),
    (
        {"model": "minilm", "input": "a", "dimensions": 128},
        400,
        "dimensions",
        "Model 'minilm' does not support matryoshka representation, changing output dimensions will lead to "
        "poor results.",
    ),
    (
        {"model": "tiny", "input": "a", "dimensions": 30},
        400,
        "dimensions",
        "Model 'bge_tiny' only supports [20, 40] matryoshka dimensions, using other output dimensions will lead to "
        "poor results.",
    ),
    (
        {"model": "tiny", "input": "a", "dimensions": 61},
        400,
        "dimensions",
        "Provided dimensions are greater than max embedding dimension: 60",
    ),
    (
        {"model": "tiny", "input": "a", "dimensions": 0},
        400,
        "dimensions",
        "Requested dimensions must be greater than 0",
    ),
    ({"model": "minilm", "input": "a", "instruction": "b"}, 400, "instruction", "Model 'minilm' takes no instruction"),
    ({"model": "minilm", "input": "a", "prompt_name": "zzz"}, 400, None, "Model 'minilm' has no prompt_name 'zzz'"),
    ({"model": "minilm", "input": [{"image": "x"}]}, 400, "input", "Input at index 0 is an object"),
    ({"input": "a"}, 400, "model", "model is required, as several are served: bge_tiny, minilm"),
    ({"model": "gpt", "input": ""}, 400, "input", "Input cannot be empty"),
    ({"model": "gpt", "input": "a"}, 404, "model", "The model 'gpt' does not exist. Ready to be asked: bge_tiny, mi"),
    ({"model": "bge", "input": "a"}, 503, None, "Model 'bge' has no checkpoint. Fetch it with: triton-embed download "),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "param", "message"), REFUSED)
def test_refusals(served: Served, body: Any, status: int, param: str | None, message: str) -> None:
    response = served.post(body)
    error = error_of(response)
    assert (response.status_code, error["param"]) == (status, param)
    assert error["message"].startswith(message)
    assert "\n" not in error["message"]
    code = {404: "model_not_found", 503: "model_not_ready"}.get(status)
    assert error["code"] == code


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe", b'{"input": "\\ud800", "model": "minilm"}', b"[]", b"[" * 10**5, b'{"input": NaN}']
)
def test_bytes_that_are_no_request(served: Served, body: bytes) -> None:
    response = requests.post(served.url + "/v1/embeddings", data=body, timeout=30)
    assert response.status_code == 400
    assert error_of(response)["message"].startswith("The request body ")


def test_one_bad_request_among_good_ones_fails_alone(served: Served) -> None:
    async def run() -> list[int]:
        async with httpx.AsyncClient(base_url=served.url, timeout=30) as client:
            bodies = [{"model": "tiny", "input": f"cat {i}"} for i in range(15)]
            bodies.insert(7, {"model": "tiny", "input": "cat " * 300, "truncate": "none"})
            replies = await asyncio.gather(*(client.post("/v1/embeddings", json=body) for body in bodies))
            return [reply.status_code for reply in replies]

    assert asyncio.run(run()) == [200] * 7 + [400] + [200] * 8


def test_encode_in_sglangs_form(served: Served) -> None:
    one = served.post({"model": "minilm", "text": "hello world"}, "/encode").json()
    assert (len(one["embedding"]), one["meta_info"]["prompt_tokens"]) == (384, 4)
    many = served.post({"model": "minilm", "input_ids": [[101, 7592, 2088, 102], [101, 102]]}, "/encode").json()
    assert np.allclose(many[0]["embedding"], one["embedding"], atol=2e-5)
    assert [item["meta_info"]["prompt_tokens"] for item in many] == [4, 2]
    refused = served.post({"model": "minilm", "image_data": "x"}, "/encode")
    assert (refused.status_code, error_of(refused)["param"]) == (400, "image_data")


def test_model_cards(served: Served) -> None:
    cards = {card["id"]: card for card in served.get("/v1/models").json()["data"]}
    minilm = cards["minilm"]
    assert (minilm["object"], minilm["ready"], minilm["dimensions"]) == ("model", True, 384)
    assert (minilm["max_model_len"], minilm["modalities"], minilm["pooling"]) == (256, ["text"], "mean")
    assert minilm["checkpoint"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert cards["bge"]["ready"] is False
    assert cards["bge"]["reason"].startswith("Model 'bge' has no checkpoint.")
    assert cards["bge_tiny"]["checkpoint"] is None  # a local path is nobody's business
    assert served.get("/v1/models/BAAI/bge-tiny").json() == cards["bge_tiny"]
    missing = served.get("/v1/models/nope/nope")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "model_not_found")


def test_model_info_in_sglangs_form(served: Served) -> None:
    info = served.get("/get_model_info?model=minilm").json()
    assert info["model_path"] == info["tokenizer_path"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert info["is_generation"] is False
    assert served.get("/model_info?model=tiny").json()["model_path"] == "bge_tiny"
    assert served.get("/get_model_info").status_code == 400


def test_health(served: Served) -> None:
    for path in ("/health", "/ready", "/ping"):
        assert served.get(path).json() == {"status": "healthy"}
    generated = served.get("/health_generate")
    assert (generated.status_code, generated.json()["models"]) == (200, {"bge_tiny": "ok", "minilm": "ok"})


def test_metrics(served: Served) -> None:
    def total(sample: str) -> float:
        lines = served.get("/metrics").text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(sample)), 0.0)

    names = [
        'triton_embed_requests_total{route="/v1/embeddings",status="200"}',
        'triton_embed_tokens_total{model="minilm"}',
        'triton_embed_stage_seconds_count{stage="encode"}',
    ]
    before = [total(name) for name in names]
    served.post({"model": "minilm", "input": "hello world"})
    after = [total(name) for name in names]
    assert np.subtract(after, before).tolist() == [1, 4, 1]
    assert served.get("/metrics").headers["content-type"].startswith("text/plain")


def test_openapi_describes_the_routes(served: Served) -> None:
    page = served.get("/openapi.json").json()
    posted = page["paths"]["/v1/embeddings"]["post"]
    assert "input" in posted["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert "422" not in json.dumps(page)


def test_keys(locked: Served) -> None:
    refused = locked.post({"model": "tiny", "input": "a"})
    assert (refused.status_code, error_of(refused)["code"]) == (401, "invalid_api_key")
    assert {locked.get(path).status_code for path in ("/health", "/health_generate", "/ready", "/ping")} == {200}
    assert {locked.get(path).status_code for path in ("/v1/models", "/metrics", "/openapi.json")} == {401}
    with (
        openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong") as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.embeddings.create(model="tiny", input="a")
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key="k3y") as client:
        assert len(client.embeddings.create(model="tiny", input="a").data[0].embedding) == 60


def test_limits_are_the_operators(locked: Served) -> None:
    headers = {"Authorization": "Bearer k3y"}
    url = locked.url + "/v1/embeddings"
    many = requests.post(url, json={"model": "tiny", "input": ["a"] * 4}, headers=headers, timeout=30)
    assert error_of(many)["message"] == "At most 3 inputs fit in one request, got 4"
    body = json.dumps({"model": "tiny", "input": "a" * 3_000_000}).encode()
    for data in (body, iter([body[:1500], body[1500:]])):  # with a Content-Length, and in chunks without
        large = requests.post(url, data=data, headers=headers, timeout=30)
        assert (large.status_code, error_of(large)["code"]) == (413, "body_too_large")


def test_a_client_that_hangs_up_leaves_the_others_alone(served: Served) -> None:
    body = json.dumps({"model": "minilm", "input": ["word " * 250] * 8}).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for part in (head + body, head + body[:100]):
        for _ in range(4):
            with socket.create_connection(("127.0.0.1", served.port)) as connection:
                connection.sendall(part)
                time.sleep(0.02)
    assert vectors_of(served.post({"model": "minilm", "input": "still here"})).shape == (1, 384)


def test_one_model_and_a_name_for_it(triton: Triton, model_directory: Path, tmp_path: Path) -> None:
    """A real server of one model, its repository API locked; killed, and started again."""
    for name in ("bge_tiny", "bge"):
        shutil.copytree(model_directory / name, tmp_path / "models" / name)
    flag = "--grpc-restricted-protocol=model-repository:triton-embed=s3cret"
    server = Triton(tmp_path / "models", tmp_path / "log", flag)
    gateway = Served(triton_grpc=server.grpc, triton_repository_header="triton-embed=s3cret", served_model_name="Mine")
    keyless = Served(triton_grpc=server.grpc)
    try:
        assert error_of(keyless.post({"input": "a"}))["code"] == "unavailable"
        for body in ({"input": "a"}, {"model": "mine", "input": "a"}, {"model": "default", "input": "a"}):
            assert vectors_of(gateway.post(body)).shape == (1, 60)
        assert gateway.post({"input": "a"}).json()["model"] == "Mine"
        assert [card["id"] for card in gateway.get("/v1/models").json()["data"]] == ["Mine", "bge"]
        assert gateway.get("/get_model_info").json()["name"] == "bge_tiny"

        server.stop(signal.SIGKILL)
        for path in ("/health", "/ready", "/health_generate"):
            assert gateway.get(path).json() == {
                "status": "unavailable",
                "reason": "The inference server cannot be reached",
            }
        for body in ({"input": "a"}, {"model": "tiny", "input": "a"}):
            began = time.monotonic()
            response = gateway.post(body)
            assert (response.status_code, error_of(response)["type"]) == (503, "server_error")
            assert time.monotonic() - began < 1
        deadline = time.monotonic() + 5
        while {card["ready"] for card in gateway.get("/v1/models").json()["data"]} != {False}:
            assert time.monotonic() < deadline, "the registry still calls a model ready"
            time.sleep(REFRESH_GAP_SECONDS)
        assert gateway.post({"model": "unheard-of", "input": "a"}).status_code == 503

        server.start()
        deadline = time.monotonic() + 10
        while (response := gateway.post({"input": "a"})).status_code != 200:
            assert time.monotonic() < deadline, response.text
            time.sleep(0.05)
    finally:
        gateway.stop()
        keyless.stop()
        server.stop()


def test_no_triton_at_all() -> None:
    gateway = Served(triton_grpc=f"127.0.0.1:{free_port()}")
    try:
        response = gateway.post({"model": "minilm", "input": "a"})
        assert (response.status_code, error_of(response)["code"]) == (503, "unavailable")
        assert gateway.get("/v1/models").json()["data"] == []
    finally:
        gateway.stop()
