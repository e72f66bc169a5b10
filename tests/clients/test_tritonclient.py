"""tritonclient straight at Triton, past the gateway, over both of its protocols."""

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
    made = protocol.InferenceServerClient(address(stack, protocol))
    yield made
    made.close()


def tensor(protocol: Any, name: str, rows: Any, kind: str) -> Any:
    values = np.array(rows, np.object_ if kind == "BYTES" else np.int32)
    made = protocol.InferInput(name, list(values.shape), kind)
    made.set_data_from_numpy(values)
    return made


def texts(protocol: Any, *given: str) -> Any:
    return tensor(protocol, "TEXT", [[text] for text in given], "BYTES")


def test_texts(client: Any, protocol: Any, expected: Expected) -> None:
    """Texts, and how many tokens they had."""
    outputs = [protocol.InferRequestedOutput(name) for name in ("EMBEDDING", "TOKENS", "DROPPED")]
    answer = client.infer("minilm", [texts(protocol, *TEXTS, LONG)], outputs=outputs)
    expected.check(answer.as_numpy("EMBEDDING"), [*TEXTS, LONG])
    counts = [len(expected.ids["minilm"][text]) for text in TEXTS]
    assert answer.as_numpy("TOKENS").ravel().tolist() == [*counts, 256]
    assert (answer.as_numpy("DROPPED").ravel() > 0).tolist() == [False] * len(TEXTS) + [True]


def test_token_ids(client: Any, protocol: Any, expected: Expected) -> None:
    """Token ids, padded with -1."""
    ids = [expected.ids["minilm"][text] for text in TEXTS]
    longest = max(map(len, ids))
    rows = [row + [-1] * (longest - len(row)) for row in ids]
    answer = client.infer("minilm", [tensor(protocol, "INPUT_IDS", rows, "INT32")])
    expected.check(answer.as_numpy("EMBEDDING"), TEXTS)


def test_parameters(client: Any, protocol: Any, expected: Expected) -> None:
    """Request parameters: `dimensions` and `instruction`."""
    answer = client.infer("qwen3_embedding", [texts(protocol, MATRYOSHKA)], parameters={"dimensions": 512})
    expected.check(answer.as_numpy("EMBEDDING"), [MATRYOSHKA], "qwen3_embedding")
    answer = client.infer("qwen3_embedding", [texts(protocol, QUERY)], parameters={"instruction": TASK})
    expected.check(answer.as_numpy("EMBEDDING"), [TASK], "qwen3_embedding")


def test_an_image(client: Any, protocol: Any, expected: Expected) -> None:
    """An encoded image."""
    stored = (expected.directory / "picture.png").read_bytes()
    inputs = [tensor(protocol, "IMAGE", [[stored]], "BYTES"), texts(protocol, "")]
    answer = client.infer("gme_qwen2_vl", inputs)
    expected.check(answer.as_numpy("EMBEDDING"), ["picture"], "gme_qwen2_vl")


def test_asynchronously(stack: Stack, protocol: Any, expected: Expected) -> None:
    """The asynchronous clients, 16 requests at once."""

    async def ask() -> list[Any]:
        async with protocol.aio.InferenceServerClient(address(stack, protocol)) as client:
            calls = [client.infer("minilm", [texts(protocol, text)]) for text in TEXTS * 3 + [TEXT]]
            return await asyncio.gather(*calls)

    found = [answer.as_numpy("EMBEDDING")[0] for answer in asyncio.run(ask())]
    expected.check(found, TEXTS * 3 + [TEXT])


def test_what_a_model_says_of_itself(client: Any, protocol: Any) -> None:
    """Readiness, metadata and `INFO`."""
    assert client.is_server_ready()
    assert client.is_model_ready("minilm")
    metadata = client.get_model_metadata("minilm")
    inputs = metadata["inputs"] if protocol is tritonclient.http else metadata.inputs
    assert {one["name"] if protocol is tritonclient.http else one.name for one in inputs} == {"TEXT", "INPUT_IDS"}
    answer = client.infer("minilm", [texts(protocol, "a")], outputs=[protocol.InferRequestedOutput("INFO")])
    assert json.loads(answer.as_numpy("INFO")[0, 0])["dimensions"] == 384


def test_errors(client: Any, protocol: Any) -> None:
    """Errors: InferenceServerException with the model's message."""
    with pytest.raises(InferenceServerException, match="dimensions"):
        client.infer("minilm", [texts(protocol, TEXT)], parameters={"dimensions": 128})
    with pytest.raises(InferenceServerException, match="empty"):
        client.infer("minilm", [texts(protocol, TEXT, "")])
    with pytest.raises(InferenceServerException, match="nowhere"):
        client.infer("nowhere", [texts(protocol, TEXT)])
