"""The gateway under uvicorn with real HTTP clients and the real tritonserver."""

import asyncio
import base64
import http.client
import json
import shutil
import signal
import socket
import subprocess
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import requests
import uvicorn
from sentence_transformers import SentenceTransformer
from sentence_transformers.util.quantization import quantize_embeddings
from transformers import AutoTokenizer

from conftest import MINILM, Triton, free_port
from triton_embed.gateway.app import create_app
from triton_embed.gateway.settings import read_settings
from triton_embed.gateway.triton.registry import REFRESH_GAP_SECONDS


class Served:
    """A gateway under uvicorn in a thread, on a free port."""

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
    """Start a gateway with two ready models, minilm and bge_tiny; bge has no checkpoint."""
    gateway = Served(triton_grpc=triton.grpc)
    yield gateway
    gateway.stop()


@pytest.fixture(scope="module")
def locked(triton: Triton) -> Iterator[Served]:
    """Start a gateway with an API key and small limits."""
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


def test_openai_client_with_default_base64(served: Served) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="EMPTY") as client:
        reply = client.embeddings.create(model="all-MiniLM-L6-v2", input=["hello world", "你好 😀"])
        packed = np.array([item.embedding for item in reply.data])
        plain = client.embeddings.create(model="minilm", input=["hello world", "你好 😀"], encoding_format="float")
        ids = client.embeddings.create(model="minilm", input=[101, 7592, 2088, 102])
        instructed = client.embeddings.create(model="tiny", input={"input": "hello", "instruction": "the cat"})  # type: ignore[arg-type]
        plain_tiny = client.embeddings.create(model="tiny", input="hello", dimensions=60)
        assert [model.id for model in client.models.list()] == ["bge_tiny", "minilm", "bge"]
        retrieved = client.models.retrieve("sentence-transformers/all-MiniLM-L6-v2")
    assert reply.model == "all-MiniLM-L6-v2"
    assert np.allclose(packed, [item.embedding for item in plain.data], atol=1e-7)
    assert np.allclose(ids.data[0].embedding, packed[0], atol=2e-5)
    assert not np.allclose(instructed.data[0].embedding, plain_tiny.data[0].embedding, atol=1e-2)
    assert (plain.usage.prompt_tokens, ids.usage.total_tokens) == (plain.usage.total_tokens, 4)
    assert retrieved.id == "minilm"


def test_openai_async_client_with_concurrent_requests(served: Served) -> None:
    async def run() -> list[list[float]]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="EMPTY") as client:
            calls = [client.embeddings.create(model="tiny", input=f"the cat {i}") for i in range(32)]
            return [reply.data[0].embedding for reply in await asyncio.gather(*calls)]

    together = np.array(asyncio.run(run()))
    alone = vectors_of(served.post({"model": "tiny", "input": [f"the cat {i}" for i in range(32)]}))
    assert np.allclose(together, alone, atol=2e-5)


def test_curl_without_a_content_type(served: Served) -> None:
    for value in ("Once upon a time", [101, 2320, 2588, 1037, 2051, 102]):
        body = json.dumps({"model": "minilm", "input": value})
        command = ["curl", "-s", f"{served.url}/v1/embeddings", "-d", body]
        reply = json.loads(subprocess.check_output(command))
        assert len(reply["data"][0]["embedding"]) == 384
        assert reply["usage"]["prompt_tokens"] == 6


def test_requests_client_as_in_sglang_docs(served: Served) -> None:
    payload = {"model": "minilm", "input": "法国的首都是什么?", "encoding_format": "float"}
    reply = requests.post(served.url + "/v1/embeddings", json=payload, timeout=30).json()
    assert list(reply) == ["object", "data", "model", "usage"]
    assert list(reply["data"][0]) == ["object", "embedding", "index"]
    assert np.isclose(np.linalg.norm(reply["data"][0]["embedding"]), 1, atol=1e-6)


def test_httpx_on_the_alias_route(served: Served) -> None:
    payload = {"model": "tiny", "input": ["a", "b"], "encoding_format": "base64", "dimensions": 20, "user": "me"}
    with httpx.Client() as client:
        reply = client.post(f"{served.url}/embeddings", json=payload).json()
    rows = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in reply["data"]]
    assert [row.shape for row in rows] == [(20,), (20,)]
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


def test_truncation_is_reported(served: Served) -> None:
    long = served.post({"model": "minilm", "input": ["word " * 400, "short", "word " * 300]})
    assert long.headers["x-truncated-inputs"] == "2"
    assert long.json()["usage"]["prompt_tokens"] == 256 + 3 + 256
    assert "x-truncated-inputs" not in served.post({"model": "minilm", "input": "short"}).headers
    start = served.post({"model": "minilm", "input": "first " + "word " * 400, "truncate": "start"})
    end = served.post({"model": "minilm", "input": "first " + "word " * 400})
    assert not np.allclose(vectors_of(start), vectors_of(end), atol=1e-3)


INVALID_REQUESTS = [
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
        "input",
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
    ({"model": "minilm", "input": "a", "prompt_name": "zzz"}, 400, "prompt_name", "Model 'minilm' has no prompt_name"),
    (
        {"model": "minilm", "input": ["a", {"image": "http://127.0.0.1/"}]},
        400,
        "input",
        "Model 'minilm' takes no images (input at index 1)",
    ),
    ({"model": "minilm", "input": [{"video": "x"}]}, 400, "input", "Input at index 0 has an unknown key 'video'"),
    ({"input": "a"}, 400, "model", "model is required because several are served: bge_tiny, minilm"),
    ({"model": "gpt", "input": ""}, 400, "input", "Input cannot be empty"),
    ({"model": "gpt", "input": "a"}, 404, "model", "The model 'gpt' does not exist. Available models: bge_tiny, mi"),
    ({"model": "bge", "input": "a"}, 503, None, "Model 'bge' has no checkpoint. Fetch it with: triton-embed download "),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "param", "message"), INVALID_REQUESTS)
def test_invalid_requests(served: Served, body: Any, status: int, param: str | None, message: str) -> None:
    response = served.post(body)
    error = error_of(response)
    assert (response.status_code, error["param"]) == (status, param)
    assert error["message"].startswith(message)
    assert "\n" not in error["message"]
    code = {404: "model_not_found", 503: "model_not_ready"}.get(status)
    assert error["code"] == code


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[]", b"[" * 10**5, b'{"input": NaN}'])
def test_malformed_json_is_400(served: Served, body: bytes) -> None:
    response = requests.post(served.url + "/v1/embeddings", data=body, timeout=30)
    assert response.status_code == 400
    assert error_of(response)["message"].startswith("The request body ")


def test_invalid_request_does_not_fail_concurrent_ones(served: Served) -> None:
    async def run() -> list[int]:
        async with httpx.AsyncClient(base_url=served.url, timeout=30) as client:
            bodies = [{"model": "tiny", "input": f"cat {i}"} for i in range(15)]
            bodies.insert(7, {"model": "tiny", "input": "cat " * 300, "truncate": "none"})
            replies = await asyncio.gather(*(client.post("/v1/embeddings", json=body) for body in bodies))
            return [reply.status_code for reply in replies]

    assert asyncio.run(run()) == [200] * 7 + [400] + [200] * 8


def test_encode_in_sglang_format(served: Served) -> None:
    single = served.post({"model": "minilm", "text": "hello world"}, "/encode").json()
    assert (len(single["embedding"]), single["meta_info"]["prompt_tokens"]) == (384, 4)
    many = served.post({"model": "minilm", "input_ids": [[101, 7592, 2088, 102], [101, 102]]}, "/encode").json()
    assert np.allclose(many[0]["embedding"], single["embedding"], atol=2e-5)
    assert [item["meta_info"]["prompt_tokens"] for item in many] == [4, 2]
    refused = served.post({"model": "minilm", "image_data": "x"}, "/encode")
    assert (refused.status_code, error_of(refused)["param"]) == (400, "image_data")
    assert error_of(refused)["message"] == "Model 'minilm' takes no images (input at index 0)"


def test_text_objects_and_parts_for_a_text_model(served: Served) -> None:
    plain = served.post({"model": "tiny", "input": ["hello", "the cat"], "instruction": "dog"})
    items = served.post(
        {"model": "tiny", "input": ["hello", {"text": "the cat", "instruction": "dog"}], "instruction": "dog"}
    )
    parts = [[{"type": "text", "text": "hello"}], [{"type": "text", "text": "the cat"}]]
    assert np.allclose(vectors_of(items), vectors_of(plain), atol=2e-5)
    as_parts = served.post({"model": "tiny", "input": parts, "instruction": "dog"})
    assert np.allclose(vectors_of(as_parts), vectors_of(plain), atol=2e-5)


# The vector of a row: length of the text, number of images, and a checksum of the images.
IMAGE_MODEL = """
import json
import zlib

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse(list(self.outputs(request))) for request in requests]

    def outputs(self, request):
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        if list(request.requested_output_names()) == ["INFO"]:
            assert list(inputs) == ["INPUT_IDS"]
            yield pb_utils.Tensor("INFO", np.frombuffer(INFO, dtype=np.uint8)[None])
            return
        rows = []
        if "INPUT_IDS" in inputs:
            assert list(inputs) == ["INPUT_IDS"]
            rows = [[len(row), 0, 0] for row in inputs["INPUT_IDS"]]
        else:
            assert sorted(inputs) == ["IMAGE", "TEXT"]
            for text, images in zip(inputs["TEXT"], inputs["IMAGE"], strict=True):
                images = [image for image in images if image]
                rows.append([len(text[0]), len(images), zlib.crc32(b"".join(images)) % 2**20])
        yield pb_utils.Tensor("EMBEDDING", np.array(rows, dtype=np.float32))
        yield pb_utils.Tensor("TOKENS", np.array([[1 + row[1] * 64] for row in rows], dtype=np.int32))
        yield pb_utils.Tensor("DROPPED", np.zeros((len(rows), 1), dtype=np.int32))
"""
IMAGE_CONFIG = """
backend: "python"
max_batch_size: 2048
input [
  { name: "TEXT" data_type: TYPE_STRING dims: [ 1 ] optional: true },
  { name: "INPUT_IDS" data_type: TYPE_INT32 dims: [ -1 ] allow_ragged_batch: true optional: true },
  { name: "IMAGE" data_type: TYPE_STRING dims: [ -1 ] allow_ragged_batch: true optional: true }
]
output [
  { name: "EMBEDDING" data_type: TYPE_FP32 dims: [ -1 ] },
  { name: "TOKENS" data_type: TYPE_INT32 dims: [ 1 ] },
  { name: "DROPPED" data_type: TYPE_INT32 dims: [ 1 ] },
  { name: "INFO" data_type: TYPE_UINT8 dims: [ -1 ] }
]
instance_group [ { kind: KIND_CPU count: 1 } ]
dynamic_batching { }
"""
IMAGE_INFO = {
    "family": "test", "checkpoint": None, "dimensions": 3, "max_model_len": 77, "vocab_size": 100, "pooling": "last",
    "matryoshka": None, "instructions": True, "prompt_names": [], "default_prompt_name": None, "batch_tokens": 1024,
    "small_tokens": 256, "max_request_tokens": 300_000, "dtype": "float32", "device": "cpu", "kernels": "",
    "instances": 1,
}  # fmt: skip
IMAGES = {"/a.png": b"\x89PNG a" * 99, "/b.jpg": bytes(70_000), "/c": b"GIF89a c"}


class ImageSite(BaseHTTPRequestHandler):
    """A web site that serves IMAGES."""

    def do_GET(self) -> None:
        body = IMAGES.get(self.path)
        self.send_response(200 if body else 404)
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), ImageSite)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def image_triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    """Start tritonserver with two image models, of which only `fused` embeds text and image together."""
    directory = tmp_path_factory.mktemp("images")
    for name, modalities in {"fused": ["text", "image", "text+image"], "either": ["text", "image"]}.items():
        (directory / "models" / name / "1").mkdir(parents=True)
        (directory / "models" / name / "config.pbtxt").write_text(IMAGE_CONFIG)
        info = json.dumps({"name": name, "modalities": modalities, **IMAGE_INFO}).encode()
        (directory / "models" / name / "1" / "model.py").write_text(f"INFO = {info!r}\n{IMAGE_MODEL}")
    server = Triton(directory / "models", directory / "log")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def imaging(image_triton: Triton, site: str) -> Iterator[Served]:
    gateway = Served(triton_grpc=image_triton.grpc, media_allowed_hosts=site)
    yield gateway
    gateway.stop()


def expected(text: str, *images: bytes) -> list[float]:
    return [len(text.encode()), len(images), zlib.crc32(b"".join(images)) % 2**20]


def test_every_image_format_reaches_the_right_row(imaging: Served, site: str) -> None:
    a, b, c = IMAGES.values()
    packed = base64.b64encode(a).decode()
    items: list[Any] = [
        "plain 文",
        {"image": f"http://{site}/b.jpg"},
        {"text": "both", "image": packed},
        {"image_url": {"url": f"data:image/png;base64,{packed}"}},
        {"text": "several", "image": [f"http://{site}/c", packed, f"http://{site}/b.jpg"]},
        [{"type": "text", "text": "parts"}, {"type": "image_url", "image_url": {"url": f"http://{site}/a.png"}}],
        {"text": "text"},
    ]
    reply = imaging.post({"model": "fused", "input": items})
    assert vectors_of(reply).tolist() == [
        expected("plain 文"),
        expected("", b),
        expected("both", a),
        expected("", a),
        expected("several", c, a, b),
        expected("parts", a),
        expected("text"),
    ]
    assert reply.json()["usage"]["prompt_tokens"] == 7 + 64 * 7
    single = imaging.post({"model": "fused", "input": items[5]})
    assert vectors_of(single).tolist() == [expected("parts", a)]


def test_multimodal_request_of_sglang_docs(imaging: Served, site: str) -> None:
    text = "Represent this image in embedding space."
    payload = {"model": "either", "input": [{"text": text}, {"image": f"http://{site}/a.png"}]}
    reply = requests.post(imaging.url + "/v1/embeddings", json=payload, timeout=30).json()
    vectors = [x.get("embedding") for x in reply.get("data", [])]
    assert vectors == [expected(text), expected("", IMAGES["/a.png"])]


def test_texts_and_ids_for_an_image_model(imaging: Served) -> None:
    assert vectors_of(imaging.post({"model": "either", "input": ["a", "bc"]})).tolist() == [[1, 0, 0], [2, 0, 0]]
    assert vectors_of(imaging.post({"model": "either", "input": [1, 2, 3]})).tolist() == [[3, 0, 0]]
    assert imaging.get("/health_generate").json()["models"] == {"either": "ok", "fused": "ok"}
    assert imaging.get("/v1/models/fused").json()["modalities"] == ["text", "image", "text+image"]


def test_openai_client_with_images(imaging: Served, site: str) -> None:
    with openai.OpenAI(base_url=f"{imaging.url}/v1", api_key="EMPTY") as client:
        inputs: Any = [{"image": f"http://{site}/a.png"}, "text"]
        reply = client.embeddings.create(model="fused", input=inputs)
    assert [item.embedding for item in reply.data] == [expected("", IMAGES["/a.png"]), expected("text")]


def test_encode_with_images(imaging: Served, site: str) -> None:
    a, c = IMAGES["/a.png"], IMAGES["/c"]
    urls = [f"http://{site}/a.png", f"http://{site}/c"]
    single = imaging.post({"model": "fused", "text": "both", "image_data": urls[0]}, "/encode").json()
    assert (single["embedding"], single["meta_info"]["prompt_tokens"]) == (expected("both", a), 65)
    two = imaging.post({"model": "fused", "image_data": urls}, "/encode").json()
    assert two["embedding"] == expected("", a, c)
    many = imaging.post({"model": "fused", "text": ["x", ""], "image_data": [None, urls]}, "/encode").json()
    assert [item["embedding"] for item in many] == [expected("x"), expected("", a, c)]


@pytest.mark.parametrize(
    ("model", "item", "message"),
    [
        (
            "either",
            {"text": "a", "image": "SITE/c"},
            "Model 'either' embeds a text or an image, not both together (inp",
        ),
        ("either", {"image": ["SITE/c"] * 2}, "Model 'either' embeds one image at a time (input at index 1)"),
        ("fused", {"image": "SITE/none"}, "Input at index 1: the image could not be fetched: its host answered with s"),
        ("fused", {"image": "http://127.0.0.1:1/"}, "Input at index 1: the image could not be fetched: its host is un"),
        ("fused", {"image": "http://169.254.169.254/latest/meta-data/"}, "Input at index 1: the image could not be f"),
        ("fused", {"image": "/etc/passwd"}, "Input at index 1: image must be base64, a data: URI in base64 or an http"),
        ("fused", {"image": "file:///etc/passwd"}, "Input at index 1: image must be base64, a data: URI in base64 or"),
        (
            "fused",
            {"text": "a", "prompt_name": "p"},
            "Input at index 1: Model 'fused' has no prompt_name 'p'; it has",
        ),
    ],
)
def test_invalid_images(imaging: Served, site: str, model: str, item: Any, message: str) -> None:
    item = json.loads(json.dumps(item).replace("SITE", f"http://{site}"))
    response = imaging.post({"model": model, "input": ["a", item]})
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, "prompt_name" if "prompt_name" in item else "input")
    assert error["message"].startswith(message)
    assert site not in error["message"]


def test_image_loading_is_a_separate_stage(imaging: Served, site: str) -> None:
    def count() -> float:
        lines = imaging.get("/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if 'stage_seconds_count{stage="media"}' in line)

    before = count()
    imaging.post({"model": "fused", "input": "text"})
    assert count() == before
    imaging.post({"model": "fused", "input": {"image": f"http://{site}/c"}})
    assert count() == before + 1


def test_operator_can_disable_image_urls(image_triton: Triton) -> None:
    gateway = Served(triton_grpc=image_triton.grpc, media_urls=False)
    try:
        response = gateway.post({"model": "fused", "input": {"image": "https://example.com/a.png"}})
        assert (response.status_code, "does not fetch URLs" in error_of(response)["message"]) == (400, True)
        packed = base64.b64encode(b"GIF89a").decode()
        assert vectors_of(gateway.post({"model": "fused", "input": {"image": packed}})).shape == (1, 3)
    finally:
        gateway.stop()


def test_list_of_models(served: Served) -> None:
    models = {model["id"]: model for model in served.get("/v1/models").json()["data"]}
    minilm = models["minilm"]
    assert (minilm["object"], minilm["ready"], minilm["dimensions"]) == ("model", True, 384)
    assert (minilm["max_model_len"], minilm["modalities"], minilm["pooling"]) == (256, ["text"], "mean")
    assert minilm["checkpoint"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert models["bge"]["ready"] is False
    assert models["bge"]["reason"].startswith("Model 'bge' has no checkpoint.")
    assert models["bge_tiny"]["checkpoint"] is None  # a local path is not revealed
    assert served.get("/v1/models/BAAI/bge-tiny").json() == models["bge_tiny"]
    missing = served.get("/v1/models/nope/nope")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "model_not_found")


def test_model_info_in_sglang_format(served: Served) -> None:
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
    (minilm,) = [
        line for line in served.get("/metrics").text.splitlines() if 'model="minilm"' in line and "_info{" in line
    ]
    assert 'device="cpu"' in minilm
    assert 'kernels="cpu"' in minilm


def test_openapi_describes_the_routes(served: Served) -> None:
    page = served.get("/openapi.json").json()
    posted = page["paths"]["/v1/embeddings"]["post"]
    input_schema = posted["requestBody"]["content"]["application/json"]["schema"]["properties"]["input"]
    objects = [form for form in input_schema["anyOf"] if form["type"] == "object"]
    prompt = {"instruction", "prompt_name", "input_type"}
    assert [set(form["properties"]) for form in objects] == [
        {"text", "image", "image_url"} | prompt,
        {"input"} | prompt,
    ]
    assert "422" not in json.dumps(page)
    for path, methods in page["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"], (path, method)
            assert operation["description"], (path, method)
            assert "headers" in operation["responses"]["200"], (path, method)


def test_api_key(locked: Served) -> None:
    refused = locked.post({"model": "tiny", "input": "a"})
    assert (refused.status_code, error_of(refused)["code"]) == (401, "invalid_api_key")
    assert {locked.get(path).status_code for path in ("/health", "/health_generate", "/ready", "/ping")} == {200}
    assert {locked.get(path).status_code for path in ("/v1/models", "/metrics", "/get_server_info")} == {401}
    with (
        openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong") as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.embeddings.create(model="tiny", input="a")
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key="k3y") as client:
        assert len(client.embeddings.create(model="tiny", input="a").data[0].embedding) == 60


def test_configured_limits_apply(locked: Served) -> None:
    headers = {"Authorization": "Bearer k3y"}
    url = locked.url + "/v1/embeddings"
    many = requests.post(url, json={"model": "tiny", "input": ["a"] * 4}, headers=headers, timeout=30)
    assert error_of(many)["message"] == "At most 3 inputs fit in one request, got 4"
    body = json.dumps({"model": "tiny", "input": "a" * 3_000_000}).encode()
    for data in (body, iter([body[:1500], body[1500:]])):  # with a Content-Length, and in chunks without
        large = requests.post(url, data=data, headers=headers, timeout=30)
        assert (large.status_code, error_of(large)["code"]) == (413, "body_too_large")


def test_several_dimensions_in_one_request(served: Served) -> None:
    """Compare each vector with that of a separate request."""
    texts = ["hello world", "the cat"]
    body = {"model": "tiny", "input": texts, "dimensions": [40, 60, 20]}
    several = [item["embedding"] for item in served.post(body).json()["data"]]
    for i, size in enumerate(body["dimensions"]):
        alone = vectors_of(served.post({**body, "dimensions": size}))
        assert np.allclose([vectors[i] for vectors in several], alone, atol=1e-6)
    assert served.post({**body, "dimensions": [20, 30]}).status_code == 400


def test_quantized_output(served: Served) -> None:
    """Compare binary with sentence-transformers, and the other types with the floats after scaling back."""
    body = {"model": "minilm", "input": ["hello world", "你好 😀"]}
    floats = vectors_of(served.post(body))
    for precision in ("binary", "ubinary"):
        packed = served.post({**body, "output_dtype": precision, "encoding_format": "base64"}).json()["data"]
        expected = quantize_embeddings(floats, precision=precision)
        assert [item["embedding"] for item in packed] == expected.tolist()
    for precision, zero in (("int8", 0), ("uint8", 128)):
        items = served.post({**body, "output_dtype": precision}).json()["data"]
        for item, vector in zip(items, floats, strict=True):
            restored = (np.array(item["embedding"]) - zero) * item["scale"]
            assert np.abs(restored - vector).max() <= item["scale"] / 2 + 1e-7
            assert np.abs(item["embedding"]).max() - zero in (127, 126)  # the whole range is used


def test_on_error_report_embeds_the_valid_inputs(served: Served) -> None:
    """Report input errors that the gateway detects, and one that only the model detects."""
    inputs = ["hello", " ", {"text": 7}, "world " * 400, "the cat", {"image": "x"}]
    body = {"model": "minilm", "input": inputs, "truncate": "none", "on_error": "report", "return_receipt": True}
    response = served.post(body)
    data = response.json()["data"]
    assert [item["object"] for item in data] == ["embedding", "error", "error", "error", "embedding", "error"]
    assert [item["index"] for item in data] == list(range(6))
    for i in (1, 2, 3, 5):
        assert f"index {i}" in data[i]["error"]["message"]
        assert data[i]["error"]["param"] == "input"
    good = served.post({"model": "minilm", "input": ["hello", "the cat"]})
    assert np.allclose([data[0]["embedding"], data[4]["embedding"]], vectors_of(good), atol=1e-6)
    assert response.json()["usage"] == good.json()["usage"]
    assert data[0]["receipt"] == {"tokens": 3, "dropped_tokens": 0, "prompt": None, "reused": None}
    assert served.post({**body, "on_error": "fail"}).status_code == 400
    foreign = served.post({"model": "minilm", "input": [[101, 102], [10**6]], "on_error": "report"}).json()["data"]
    assert [item["object"] for item in foreign] == ["embedding", "error"]
    assert "check_embedding_ctx_length" in foreign[1]["error"]["message"]
    assert served.post({"model": "minilm", "input": [" "], "on_error": "report"}).json()["usage"]["total_tokens"] == 0


def test_prompts_of_individual_inputs(served: Served) -> None:
    """Compare with separate requests: an instruction must apply only to the text it came with."""
    texts = ["the cat", {"text": "the cat", "instruction": "a dog: "}, {"text": "the cat", "instruction": "hello "}]
    together = vectors_of(served.post({"model": "tiny", "input": texts}))
    for vector, text in zip(together, texts, strict=True):
        assert np.allclose(vector, vectors_of(served.post({"model": "tiny", "input": [text]}))[0], atol=1e-6)
    assert not np.allclose(together[1], together[2], atol=1e-3)
    shared = vectors_of(served.post({"model": "tiny", "input": ["the cat"], "instruction": "a dog: "}))
    assert np.allclose(shared[0], together[1], atol=1e-6)


def test_large_request_is_split_and_returned_in_order(served: Served) -> None:
    """Send more tokens than fit in a forward pass. An error must name the index in the original request."""
    texts = [f"{'word ' * (i * 37 % 90)}number {i}" for i in range(200)]
    many = vectors_of(served.post({"model": "minilm", "input": texts}))
    sample = [0, 7, 63, 64, 130, 199]
    assert np.allclose(
        many[sample], vectors_of(served.post({"model": "minilm", "input": [texts[i] for i in sample]})), atol=1e-6
    )
    texts[150] = "word " * 300
    refused = served.post({"model": "minilm", "input": texts, "truncate": "none"})
    assert "(input at index 150)" in error_of(refused)["message"]


def test_request_timeout_header(served: Served) -> None:
    body = {"model": "minilm", "input": [f"{i} {'word ' * 250}" for i in range(64)]}
    url = f"{served.url}/v1/embeddings"
    late = requests.post(url, json=body, headers={"x-request-timeout": "0.05"}, timeout=30)
    # 429 if requests of other tests are still in flight: then it is known at once that this one will be late.
    assert (late.status_code, error_of(late)["message"][:24]) in (
        (504, "No answer within 0.05 s"),
        (429, "Too much work is waiting"),
    )
    for invalid in ("0", "-1", "soon", "nan", "inf"):
        refused = requests.post(
            f"{served.url}/v1/embeddings", json=body, headers={"x-request-timeout": invalid}, timeout=30
        )
        assert (refused.status_code, error_of(refused)["param"]) == (400, "x-request-timeout")
    assert served.post({**body, "input": "hello"}).headers["server-timing"].startswith("parse;dur=")


def test_rerank_and_score(served: Served) -> None:
    """Compare with the cosines of sentence-transformers' vectors, best first."""
    query, documents = "What is red?", ["The sea is blue.", "A ripe cherry is red.", "Red wine", "Snow"]
    model = SentenceTransformer(str(MINILM), device="cpu")
    scores = model.similarity(model.encode([query]), model.encode(documents))[0].numpy()
    body = {"model": "minilm", "query": query, "documents": documents, "return_documents": True, "top_n": 3}
    reply = served.post(body, "/v1/rerank").json()
    order = np.argsort(-scores)[:3]
    assert [result["index"] for result in reply["results"]] == order.tolist()
    assert np.allclose([result["relevance_score"] for result in reply["results"]], scores[order], atol=1e-5)
    assert [result["document"]["text"] for result in reply["results"]] == [documents[i] for i in order]
    pairs = served.post({"model": "minilm", "text_1": query, "text_2": documents}, "/v1/score").json()
    assert np.allclose([item["score"] for item in pairs["data"]], scores, atol=1e-5)
    each = served.post({"model": "minilm", "text_1": documents, "text_2": documents[::-1]}, "/score").json()["data"]
    vectors = model.encode(documents)
    assert np.allclose([item["score"] for item in each], (vectors * vectors[::-1]).sum(axis=1), atol=1e-5)


@pytest.mark.parametrize("prompt", [{}, {"instruction": "a dog: "}])
def test_rerank_prompts_only_the_query(served: Served, prompt: dict[str, str]) -> None:
    """Check the model's prompt for queries and the caller's instruction."""
    documents = ["hello", "the cat", "the dog"]
    payload = {"model": "tiny", "input": "the cat", **(prompt or {"input_type": "query"})}
    query = vectors_of(served.post(payload))[0]
    assert not np.allclose(query, vectors_of(served.post({"model": "tiny", "input": "the cat"}))[0], atol=1e-2)
    expected = vectors_of(served.post({"model": "tiny", "input": documents})) @ query
    body = {"model": "tiny", "query": "the cat", "documents": documents, **prompt}
    results = served.post(body, "/rerank").json()["results"]
    scores = {result["index"]: result["relevance_score"] for result in results}
    assert np.allclose([scores[i] for i in range(3)], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("rerank", {"query": "a"}, "documents"),
        ("rerank", {"query": "a", "documents": []}, "documents"),
        ("rerank", {"query": "a", "documents": ["b", " "]}, "documents"),
        ("rerank", {"query": " ", "documents": ["b"]}, "query"),
        ("rerank", {"query": ["a"], "documents": ["b"]}, "query"),
        ("rerank", {"query": "a", "documents": ["b"], "top_n": 0}, "top_n"),
        ("rerank", {"query": "a", "documents": ["b"], "on_error": "report"}, "on_error"),
        ("rerank", {"query": "a", "documents": ["b"], "instruction": "i"}, "instruction"),
        ("score", {"text_1": ["a", "b"], "text_2": ["a"]}, "text_1"),
        ("score", {"text_1": "a", "text_2": [1]}, "text_2"),
        ("score", {"text_1": "a", "text_2": "b", "dimensions": [3]}, "dimensions"),
    ],
)
def test_invalid_rerank_and_score(served: Served, path: str, body: dict[str, Any], param: str) -> None:
    response = served.post({"model": "minilm", **body}, f"/v1/{path}")
    assert (response.status_code, error_of(response)["param"]) == (400, param)


def test_tokenize(served: Served) -> None:
    single = served.post({"model": "minilm", "prompt": "hello world"}, "/tokenize").json()
    assert single == {"tokens": [101, 7592, 2088, 102], "count": 4, "max_model_len": 256, "model": "minilm"}
    texts = ["hello", "word " * 400]
    many = served.post({"model": "minilm", "input": texts}, "/tokenize").json()
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    assert many["tokens"] == [tokenizer(text)["input_ids"] for text in texts]
    assert many["count"] == [3, 402]
    prompted = {"model": "tiny", "prompt": "the cat", "instruction": "a dog: "}
    ids = served.post(prompted, "/tokenize").json()["tokens"]
    by_ids, by_text = ({"model": "tiny", "input": ids}, {"model": "tiny", "input": "the cat", "instruction": "a dog: "})
    assert np.allclose(vectors_of(served.post(by_ids)), vectors_of(served.post(by_text)), atol=1e-6)


def test_server_info_has_limits_and_no_secrets(locked: Served) -> None:
    reply = requests.get(f"{locked.url}/get_server_info", headers={"Authorization": "Bearer k3y"}, timeout=30)
    info = reply.json()
    assert (info["max_inputs"], info["max_body_bytes"], info["request_timeout"]) == (3, 2000, 5)
    assert {model["name"] for model in info["models"]} == {"minilm", "bge_tiny"}
    assert not any(secret in reply.text for secret in ("k3y", "127.0.0.1", str(MINILM)))


def test_token_encoding_without_tables_is_400(served: Served) -> None:
    response = served.post({"model": "minilm", "input": [[9906, 1917]], "token_encoding": "cl100k_base"})
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, "token_encoding")
    assert "check_embedding_ctx_length=False" in error["message"]


def test_full_queue_is_429_with_retry_after(triton: Triton) -> None:
    """Send more tokens than may be pending: rejected requests get a Retry-After header."""
    gateway = Served(triton_grpc=triton.grpc, max_waiting_tokens=3_000)
    try:
        body = {"model": "minilm", "input": [f"{i} {'word ' * 200}" for i in range(40)]}
        with ThreadPoolExecutor(6) as pool:
            replies = list(pool.map(lambda _: gateway.post(body), range(6)))
        assert {reply.status_code for reply in replies} == {200, 429}
        refused = next(reply for reply in replies if reply.status_code == 429)
        assert error_of(refused)["code"] == "queue_full"
        assert 1 <= int(refused.headers["retry-after"]) < 60
        expected = vectors_of(gateway.post({**body, "input": body["input"][:1]}))[0]
        for reply in replies:
            if reply.status_code == 200:
                assert np.allclose(vectors_of(reply)[0], expected, atol=1e-6)
    finally:
        gateway.stop()


def test_bodies_of_all_requests_are_bounded_together(triton: Triton) -> None:
    """Send a large body slowly and a request meanwhile, which gets a 429. The first one is still answered."""
    gateway = Served(triton_grpc=triton.grpc, max_pending_body_bytes=100_000)
    body = json.dumps({"model": "minilm", "input": "word " * 30_000}).encode()
    small = {"model": "minilm", "input": "hello"}
    try:
        connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=30)
        connection.putrequest("POST", "/v1/embeddings")
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders()
        connection.send(body[:-1_000])  # more than the bound, but nothing else is held
        time.sleep(0.3)
        refused = gateway.post(small)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        connection.send(body[-1_000:])
        assert connection.getresponse().status == 200
        connection.close()
        assert gateway.post(small).status_code == 200
    finally:
        gateway.stop()


def test_interactive_requests_overtake_a_batch_request(served: Served) -> None:
    """Send short queries after 60 texts in the batch lane. They must be answered long before the texts."""
    bulk = {"model": "minilm", "input": [f"{i} {'word ' * 120}" for i in range(60)], "priority": "batch"}
    with ThreadPoolExecutor(1) as pool:
        start = time.monotonic()
        loading = pool.submit(served.post, bulk)
        time.sleep(0.3)
        waits = []
        while not loading.done():
            sent = time.monotonic()
            assert served.post({"model": "minilm", "input": "hello"}).status_code == 200
            waits.append(time.monotonic() - sent)
        total = time.monotonic() - start
    assert loading.result().status_code == 200
    assert len(waits) >= 3
    assert sorted(waits)[len(waits) // 2] < total / 4


def test_disconnect_cancels_pending_work(triton: Triton) -> None:
    """Send 120 texts and disconnect: the next request must not wait for them."""
    gateway = Served(triton_grpc=triton.grpc)
    texts = [f"{i} {'word ' * 120}" for i in range(120)]
    try:
        body = json.dumps({"model": "minilm", "input": texts}).encode()
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        start = time.monotonic()
        with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
            connection.sendall(head + body)
            time.sleep(0.3)
        assert gateway.post({"model": "minilm", "input": "hello"}).status_code == 200
        wait_after_disconnect = time.monotonic() - start
        start = time.monotonic()
        assert gateway.post({"model": "minilm", "input": texts}).status_code == 200
        assert wait_after_disconnect < (time.monotonic() - start) / 2
        assert 'status="499"' in gateway.get("/metrics").text
    finally:
        gateway.stop()


def test_disconnects_do_not_affect_other_requests(served: Served) -> None:
    body = json.dumps({"model": "minilm", "input": ["word " * 250] * 8}).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for part in (head + body, head + body[:100]):
        for _ in range(4):
            with socket.create_connection(("127.0.0.1", served.port)) as connection:
                connection.sendall(part)
                time.sleep(0.02)
    assert vectors_of(served.post({"model": "minilm", "input": "still here"})).shape == (1, 384)


def test_served_model_name_and_triton_restart(triton: Triton, model_directory: Path, tmp_path: Path) -> None:
    """Serve one model with a restricted repository API. Kill tritonserver, then restart it."""
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
        assert [model["id"] for model in gateway.get("/v1/models").json()["data"]] == ["Mine", "bge"]
        assert gateway.get("/get_model_info").json()["name"] == "bge_tiny"

        server.stop(signal.SIGKILL)
        for path in ("/health", "/ready", "/health_generate"):
            assert gateway.get(path).json() == {
                "status": "unavailable",
                "reason": "The inference server cannot be reached",
            }
        for body in ({"input": "a"}, {"model": "tiny", "input": "a"}):
            start = time.monotonic()
            response = gateway.post(body)
            assert (response.status_code, error_of(response)["type"]) == (503, "server_error")
            assert time.monotonic() - start < 1
        deadline = time.monotonic() + 5
        while {model["ready"] for model in gateway.get("/v1/models").json()["data"]} != {False}:
            assert time.monotonic() < deadline, "the registry still reports a model as ready"
            time.sleep(REFRESH_GAP_SECONDS)
        assert gateway.post({"model": "unknown", "input": "a"}).status_code == 503

        server.start()
        deadline = time.monotonic() + 10
        while (response := gateway.post({"input": "a"})).status_code != 200:
            assert time.monotonic() < deadline, response.text
            time.sleep(0.05)
    finally:
        gateway.stop()
        keyless.stop()
        server.stop()


def test_without_triton_requests_get_503() -> None:
    gateway = Served(triton_grpc=f"127.0.0.1:{free_port()}")
    try:
        response = gateway.post({"model": "minilm", "input": "a"})
        assert (response.status_code, error_of(response)["code"]) == (503, "unavailable")
        assert gateway.get("/v1/models").json()["data"] == []
    finally:
        gateway.stop()
