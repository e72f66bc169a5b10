"""The requests of SGLang's embedding pages and of the Qwen3-Embedding walkthrough; only the address differs.

Each response must have the vector that transformers computes for a checkpoint of the same family.
"""

import io
import json
import shlex
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import openai
import oracles
import pytest
import requests
import tritonclient.grpc
import tritonclient.http
from checkpoints import write_clip, write_decoder, write_qwen2_vl
from PIL import Image

from conftest import REPOSITORY, Stack, write_bert
from triton_embed.python_backend.checkpoint import repository

TEXT = "Once upon a time"
GTE = "Alibaba-NLP/gte-Qwen2-1.5B-instruct"
QWEN3 = "Qwen/Qwen3-Embedding-0.6B"
# Triton model -> the names that the documents use.
NAMES = {
    "qwen3_embedding": f"{QWEN3}, Qwen3-Embedding-0.6B, Qwen/Qwen3-Embedding-4B",
    "gte_qwen2": f"{GTE}, Alibaba-NLP/gte-Qwen2-7B-instruct",
    "gme_qwen2_vl": "gme-qwen2-vl, Alibaba-NLP/gme-Qwen2-VL-2B-Instruct",
    "clip": "openai/clip-vit-large-patch14-336",
    "e5_mistral": "intfloat/e5-mistral-7b-instruct",
    "bge": "BAAI/bge-large-en-v1.5",
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "qwen3_embedding": write_decoder(root / "qwen3", "qwen3", hidden_size=520),
        "gte_qwen2": write_decoder(root / "gte", "qwen2", is_causal=False, old_rope=True),
        "gme_qwen2_vl": write_qwen2_vl(root / "gme", max_position_embeddings=2048),
        "clip": write_clip(root / "clip"),
        "e5_mistral": write_decoder(root / "e5", "mistral"),
        "bge": write_bert(root / "bge"),
    }


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def image_url(image: Image.Image) -> Iterator[str]:
    """Serve an image on a local host that the gateway may fetch from; yield its URL."""
    file = io.BytesIO()
    image.save(file, "PNG")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(file.getvalue())))
            self.end_headers()
            self.wfile.write(file.getvalue())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/images/023.jpg"
        server.shutdown()


@pytest.fixture(scope="module")
def stack(checkpoints: dict[str, Path], image_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    directory = tmp_path_factory.mktemp("documents")
    for family, path in checkpoints.items():
        parameters = {"checkpoint": str(path), "aliases": NAMES[family], "threads": "1"}
        repository.write_model(REPOSITORY, family, directory / "models", family, parameters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_EMBED_MEDIA_ALLOWED_HOSTS", image_url.split("/")[2])
        server = Stack(directory / "log", f"--model-repository={directory / 'models'}")
    yield server
    server.stop()


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.Client]:
    with openai.Client(base_url=f"{stack.url}/v1", api_key="EMPTY") as openai_client:
        yield openai_client


def gte(checkpoints: dict[str, Path], *texts: str) -> np.ndarray:
    directory = checkpoints["gte_qwen2"]
    return oracles.decoder_vectors(directory, oracles.token_ids(directory, texts))


def qwen3(checkpoints: dict[str, Path], *texts: str) -> np.ndarray:
    directory = checkpoints["qwen3_embedding"]
    return oracles.decoder_vectors(directory, oracles.token_ids(directory, texts))


def gme(directory: Path, items: list[dict[str, Any]]) -> np.ndarray:
    return oracles.gme_vectors(directory, list(oracles.gme_inputs(directory, items, 256, 1280)), "mrope")


def assert_close(actual: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.array(actual), expected, atol=2e-5)


def curl(stack: Stack, body: dict[str, Any]) -> Any:
    command = f"curl -s {stack.url}/v1/embeddings -d {shlex.quote(json.dumps(body))}"
    return json.loads(subprocess.check_output(["bash", "-c", command]))["data"][0]["embedding"]


def test_gte_with_curl_requests_and_the_openai_client(
    stack: Stack, client: openai.Client, checkpoints: dict[str, Path]
) -> None:
    expected = gte(checkpoints, TEXT)[0]
    assert_close(curl(stack, {"model": GTE, "input": TEXT}), expected)
    response = requests.post(f"{stack.url}/v1/embeddings", json={"model": GTE, "input": TEXT}, timeout=30).json()
    assert_close(response["data"][0]["embedding"], expected)
    assert_close(client.embeddings.create(model=GTE, input=TEXT).data[0].embedding, expected)


def test_gte_with_input_ids(stack: Stack, checkpoints: dict[str, Path]) -> None:
    """Send ids unchanged: the page's tokenizer appends no end token, so the vector differs from the text's."""
    ids = oracles.token_ids(checkpoints["gte_qwen2"], [TEXT], append_end=False)
    vector = curl(stack, {"model": GTE, "input": ids[0]})
    assert_close(vector, oracles.decoder_vectors(checkpoints["gte_qwen2"], ids)[0])
    assert np.array(vector) @ gte(checkpoints, TEXT)[0] < 0.999


def test_qwen3_with_a_text_and_a_list(client: openai.Client, checkpoints: dict[str, Path]) -> None:
    text = "今天天气真好,适合出门散步"
    response = client.embeddings.create(model="Qwen3-Embedding-0.6B", input=text)
    assert_close(response.data[0].embedding, qwen3(checkpoints, text)[0])
    texts = ["苹果是一种水果", "香蕉也是一种水果", "Python 是一种编程语言", "Java 也是一种编程语言"]
    response = client.embeddings.create(model="Qwen3-Embedding-0.6B", input=texts)
    assert_close([item.embedding for item in response.data], qwen3(checkpoints, *texts))


def test_qwen3_with_an_instruction_in_the_input(client: openai.Client, checkpoints: dict[str, Path]) -> None:
    question, task = "如何修复 Python 中的 ModuleNotFoundError?", "将该问题转为用于搜索引擎召回的向量"
    search_input: Any = {"input": question, "instruction": task}
    response = client.embeddings.create(model="Qwen3-Embedding-0.6B", input=search_input)
    assert_close(response.data[0].embedding, qwen3(checkpoints, f"Instruct: {task}\nQuery:{question}")[0])


def test_qwen3_with_fewer_dimensions(stack: Stack, checkpoints: dict[str, Path]) -> None:
    payload = {"model": QWEN3, "input": "Explain diffusion models simply.", "dimensions": 512}
    response = requests.post(f"{stack.url}/v1/embeddings", json=payload, timeout=30).json()
    truncated = qwen3(checkpoints, "Explain diffusion models simply.")[0, :512]
    assert_close(response["data"][0]["embedding"], truncated / np.linalg.norm(truncated))


def test_gme_with_a_text_and_an_image_url(
    stack: Stack, checkpoints: dict[str, Path], image_url: str, image: Image.Image
) -> None:
    text = "Represent this image in embedding space."
    payload = {"model": "gme-qwen2-vl", "input": [{"text": text}, {"image": image_url}]}
    response = requests.post(f"{stack.url}/v1/embeddings", json=payload, timeout=60).json()
    items = [{"text": text}, {"images": [image]}]
    assert_close([x["embedding"] for x in response["data"]], gme(checkpoints["gme_qwen2_vl"], items))


def test_clip_with_a_text_and_an_image_url(
    stack: Stack, checkpoints: dict[str, Path], image_url: str, image: Image.Image
) -> None:
    payload = {"model": "openai/clip-vit-large-patch14-336", "input": [{"image": image_url}, {"text": "a photo"}]}
    response = requests.post(f"{stack.url}/v1/embeddings", json=payload, timeout=60).json()
    directory = checkpoints["clip"]
    assert_close(response["data"][0]["embedding"], oracles.clip_image_vectors(directory, [image])[0])
    assert_close(
        response["data"][1]["embedding"],
        oracles.clip_text_vectors(directory, oracles.token_ids(directory, ["a photo"]))[0],
    )


def test_health_generate_embeds_with_every_family(stack: Stack, checkpoints: dict[str, Path]) -> None:
    response = requests.get(f"{stack.url}/health_generate", timeout=60).json()
    assert response == {"status": "healthy", "models": dict.fromkeys(checkpoints, "ok")}


@pytest.mark.parametrize("protocol", [tritonclient.http, tritonclient.grpc], ids=["http", "grpc"])
def test_every_family_through_tritonclient(stack: Stack, checkpoints: dict[str, Path], protocol: Any) -> None:
    client = protocol.InferenceServerClient(stack.triton_http if protocol is tritonclient.http else stack.grpc)
    try:
        for family, directory in checkpoints.items():
            tensor = protocol.InferInput("TEXT", [1, 1], "BYTES")
            tensor.set_data_from_numpy(np.array([[TEXT]], dtype=np.object_))
            vector = client.infer(family, [tensor]).as_numpy("EMBEDDING")[0]
            assert_close(vector, expected_vector(family, directory))
    finally:
        client.close()


def expected_vector(family: str, directory: Path) -> np.ndarray:
    """Return transformers' vector of TEXT."""
    if family == "gme_qwen2_vl":
        return gme(directory, [{"text": TEXT}])[0]
    return oracles.vectors_of(directory, oracles.token_ids(directory, [TEXT]))[0]
