"""Conformance of tritonclient, connected directly to Triton over HTTP and gRPC."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException
from words import LONG, MATRYOSHKA, QUERY, TASK, TEXT, TEXTS

from conftest import Expected, Stack

CLIENT, PACKAGE = "tritonclient HTTP and gRPC", "tritonclient"
PROTOCOLS = {"http": tritonclient.http, "grpc": tritonclient.grpc}


def address(stack: Stack, protocol: Any) -> str:
    return stack.triton_http if protocol is tritonclient.http else stack.triton_grpc


@pytest.fixture(params=PROTOCOLS.values(), ids=PROTOCOLS)
def protocol(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def client(stack: Stack, protocol: Any) -> Iterator[Any]:
    client = protocol.InferenceServerClient(address(stack, protocol))
    yield client
    client.close()


def tensor(protocol: Any, name: str, rows: Any, datatype: str) -> Any:
    values = np.array(rows, np.object_ if datatype == "BYTES" else np.int32)
    infer_input = protocol.InferInput(name, list(values.shape), datatype)
    infer_input.set_data_from_numpy(values)
    return infer_input


def texts(protocol: Any, *values: str) -> Any:
    return tensor(protocol, "TEXT", [[text] for text in values], "BYTES")


def test_texts(client: Any, protocol: Any, expected: Expected) -> None:
    """Embed texts and count their tokens."""
    outputs = [protocol.InferRequestedOutput(name) for name in ("EMBEDDING", "TOKENS", "DROPPED")]
    result = client.infer("minilm", [texts(protocol, *TEXTS, LONG)], outputs=outputs)
    expected.check(result.as_numpy("EMBEDDING"), [*TEXTS, LONG])
    counts = [len(expected.ids["minilm"][text]) for text in TEXTS]
    assert result.as_numpy("TOKENS").ravel().tolist() == [*counts, 256]
    assert (result.as_numpy("DROPPED").ravel() > 0).tolist() == [False] * len(TEXTS) + [True]


def test_token_ids(client: Any, protocol: Any, expected: Expected) -> None:
    """Embed token ids padded with -1."""
    ids = [expected.ids["minilm"][text] for text in TEXTS]
    longest = max(map(len, ids))
    rows = [row + [-1] * (longest - len(row)) for row in ids]
    result = client.infer("minilm", [tensor(protocol, "INPUT_IDS", rows, "INT32")])
    expected.check(result.as_numpy("EMBEDDING"), TEXTS)


def test_parameters(client: Any, protocol: Any, expected: Expected) -> None:
    """Set the request parameters `dimensions` and `instruction`."""
    result = client.infer("qwen3_embedding", [texts(protocol, MATRYOSHKA)], parameters={"dimensions": 512})
    expected.check(result.as_numpy("EMBEDDING"), [MATRYOSHKA], "qwen3_embedding")
    result = client.infer("qwen3_embedding", [texts(protocol, QUERY)], parameters={"instruction": TASK})
    expected.check(result.as_numpy("EMBEDDING"), [TASK], "qwen3_embedding")


def test_image(client: Any, protocol: Any, expected: Expected) -> None:
    """Embed an encoded image."""
    image_bytes = (expected.directory / "picture.png").read_bytes()
    inputs = [tensor(protocol, "IMAGE", [[image_bytes]], "BYTES"), texts(protocol, "")]
    result = client.infer("gme_qwen2_vl", inputs)
    expected.check(result.as_numpy("EMBEDDING"), ["picture"], "gme_qwen2_vl")


def test_async(stack: Stack, protocol: Any, expected: Expected) -> None:
    """Send 16 concurrent requests with the asynchronous clients."""

    async def infer_all() -> list[Any]:
        async with protocol.aio.InferenceServerClient(address(stack, protocol)) as client:
            calls = [client.infer("minilm", [texts(protocol, text)]) for text in TEXTS * 3 + [TEXT]]
            return await asyncio.gather(*calls)

    vectors = [result.as_numpy("EMBEDDING")[0] for result in asyncio.run(infer_all())]
    expected.check(vectors, TEXTS * 3 + [TEXT])


def test_readiness_metadata_and_info(client: Any, protocol: Any) -> None:
    """Read readiness, model metadata and `INFO`."""
    assert client.is_server_ready()
    assert client.is_model_ready("minilm")
    metadata = client.get_model_metadata("minilm")
    inputs = metadata["inputs"] if protocol is tritonclient.http else metadata.inputs
    assert {item["name"] if protocol is tritonclient.http else item.name for item in inputs} == {"TEXT", "INPUT_IDS"}
    result = client.infer("minilm", [texts(protocol, "a")], outputs=[protocol.InferRequestedOutput("INFO")])
    assert json.loads(bytes(result.as_numpy("INFO")[0]))["dimensions"] == 384


def test_errors(client: Any, protocol: Any) -> None:
    """Raise InferenceServerException with the model's message."""
    with pytest.raises(InferenceServerException, match="dimensions"):
        client.infer("minilm", [texts(protocol, TEXT)], parameters={"dimensions": 128})
    with pytest.raises(InferenceServerException, match="empty"):
        client.infer("minilm", [texts(protocol, TEXT, "")])
    with pytest.raises(InferenceServerException, match="nowhere"):
        client.infer("nowhere", [texts(protocol, TEXT)])
