"""One request, one inference: shielded calls against a scripted gRPC server, tensors against the real one."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor

from conftest import Triton, free_port
from triton_embed.gateway.client import TritonClient
from triton_embed.gateway.errors import ApiError
from triton_embed.gateway.forms import Form
from triton_embed.gateway.items import Faults, Prompt
from triton_embed.gateway.model import ModelInfo
from triton_embed.gateway.schemas import EmbeddingRequest, Embeddings

T = TypeVar("T")


def texts(*items: str, **fields: Any) -> EmbeddingRequest:
    return EmbeddingRequest(model=None, texts=list(items), ids=[], single=False, param="input", **fields)


def ids(*rows: list[int], **fields: Any) -> EmbeddingRequest:
    return EmbeddingRequest(model=None, texts=[], ids=list(rows), single=False, param="input", **fields)


def embed(client: TritonClient, model: str, request: EmbeddingRequest, images: Any = None, **how: Any) -> Any:
    """A whole request in one call."""
    return client.embed(model, request, range(request.count), images, **how)


def with_client(target: str, use: Callable[[TritonClient], Awaitable[T]], **options: Any) -> T:
    async def run() -> T:
        client = TritonClient(target, **options)
        try:
            return await use(client)
        finally:
            await client.close()

    return asyncio.run(run())


class Scripted(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """A Triton in this process: it answers after `seconds`, or fails as told, and sees what it is sent."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.failure: tuple[grpc.StatusCode, str] | None = None
        self.outputs = ("EMBEDDING", "TOKENS", "DROPPED")
        self.most = 10**9  # at once; others find the queue full
        self.running = self.peak = self.refused = self.answered = 0
        self.cancelled = 0
        self.metadata: dict[str, str] = {}
        self.asked: list[Any] = []

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        if self.running >= self.most:
            self.refused += 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        self.answered += 1
        self.asked.append(request)
        self.metadata = dict(context.invocation_metadata())
        if self.failure is not None:
            await context.abort(*self.failure)
        rows = request.inputs[0].shape[0]
        reply = service_pb2.ModelInferResponse(model_name=request.model_name)
        for name in self.outputs:
            reply.outputs.add(name=name)
            reply.raw_output_contents.append(bytes(4 * rows))
        return reply

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        self.metadata = dict(context.invocation_metadata())
        return service_pb2.RepositoryIndexResponse()


def with_scripted(use: Callable[[TritonClient, Scripted], Awaitable[T]], **options: Any) -> T:
    async def run() -> T:
        script = Scripted()
        server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(script, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        client = TritonClient(f"127.0.0.1:{port}", **options)
        try:
            return await use(client, script)
        finally:
            await client.close()
            await server.stop(None)

    return asyncio.run(run())


def test_a_deadline_ends_the_wait_and_not_the_call() -> None:
    async def use(client: TritonClient, script: Scripted) -> None:
        script.seconds = 0.4
        ended: list[float] = []
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await embed(client, "m", texts("a"), ended=lambda: ended.append(time.monotonic()))
        assert time.monotonic() - began < 0.3
        assert not ended
        await asyncio.sleep(0.5)
        assert (script.answered, script.cancelled) == (1, 0)
        assert len(ended) == 1

    with_scripted(use)


def test_a_call_that_fails_has_ended_too() -> None:
    async def use(client: TritonClient, script: Scripted) -> None:
        script.failure = (grpc.StatusCode.INTERNAL, "")
        ended: list[bool] = []
        with pytest.raises(ApiError):
            await embed(client, "m", texts("a"), ended=lambda: ended.append(True))
        await asyncio.sleep(0)
        assert ended == [True]

    with_scripted(use)


def test_what_travels_beside_the_inputs() -> None:
    async def use(client: TritonClient, script: Scripted) -> None:
        request = texts("a", "b", "c", prompts=[Prompt("x"), Prompt(), Prompt(prompt_name="q")], truncate="none")
        await client.embed("m", request, [2, 0], seconds=1.5, metadata=(("traceparent", "00-1-2-3"),))
        asked = script.asked[0]
        assert received(asked) == {"TEXT": [[b"c"], [b"a"]]}
        assert json.loads(asked.parameters["prompts"].string_param) == [{"prompt_name": "q"}, {"instruction": "x"}]
        assert asked.parameters["truncate"].string_param == "none"
        assert asked.parameters["timeout_ms"].int64_param == 1500
        assert [output.name for output in asked.outputs] == ["EMBEDDING", "TOKENS", "DROPPED"]
        assert script.metadata["traceparent"] == "00-1-2-3"

    with_scripted(use)


def test_a_caller_that_leaves_does_not_cancel_the_call() -> None:
    async def use(client: TritonClient, script: Scripted) -> None:
        script.seconds = 0.2
        callers = [asyncio.create_task(embed(client, "m", texts("a"))) for _ in range(5)]
        await asyncio.sleep(0.1)
        for caller in callers:
            caller.cancel()
        outcomes = await asyncio.gather(*callers, return_exceptions=True)
        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
        await asyncio.sleep(0.3)
        assert (script.answered, script.cancelled) == (5, 0)

    with_scripted(use)


def test_closing_waits_for_running_calls() -> None:
    async def use(client: TritonClient, script: Scripted) -> None:
        script.seconds = 0.2
        caller = asyncio.create_task(embed(client, "m", texts("a")))
        await asyncio.sleep(0.05)
        await client.close()
        assert len((await caller).tokens) == 1
        assert script.cancelled == 0

    with_scripted(use)


@pytest.mark.parametrize(
    ("status", "details", "expected", "message"),
    [
        ("INVALID_ARGUMENT", "Input at index 3 is bad", 400, "Input at index 3 is bad"),
        (
            "UNAVAILABLE",
            "[request id: <id_unknown>] Exceeds maximum queue size",
            429,
            "The queue of model 'm' is full, try again shortly",
        ),
        (
            "UNAVAILABLE",
            "Model 'm' has no checkpoint. Fetch it with: x\nLooked in /secret",
            503,
            "Model 'm' has no checkpoint. Fetch it with: x",
        ),
        ("UNAVAILABLE", "something /secret", 503, "The inference server cannot be reached"),
        ("NOT_FOUND", "Request for unknown model: 'm' is not found", 503, "Model 'm' is not loaded"),
        ("INTERNAL", "Failed to process\n\nAt:\n  /secret/model.py(24)", 500, "Model 'm' failed to answer"),
        ("CANCELLED", "/secret", 504, "Model 'm' did not come to this request in time"),
        ("UNKNOWN", "/secret", 500, "Model 'm' failed to answer"),
        ("RESOURCE_EXHAUSTED", "/secret", 500, "Model 'm' failed to answer"),
    ],
)  # fmt: skip
def test_what_becomes_of_tritons_errors(status: str, details: str, expected: int, message: str) -> None:
    async def use(client: TritonClient, script: Scripted) -> ApiError:
        script.failure = (grpc.StatusCode[status], details)
        with pytest.raises(ApiError) as caught:
            await embed(client, "m", texts("a"))
        return caught.value

    error = with_scripted(use)
    assert (error.status, error.message) == (expected, message)
    assert error.headers is None


def test_an_answer_without_its_outputs_is_an_error() -> None:
    async def use(client: TritonClient, script: Scripted) -> None:
        script.outputs = ("EMBEDDING", "TOKENS")
        await embed(client, "m", texts("a"))

    with pytest.raises(ApiError, match="answered without DROPPED"):
        with_scripted(use)


@pytest.mark.parametrize(
    ("header", "expected"),
    [("Triton-Embed=s3=cret", {"triton-grpc-protocol-triton-embed": "s3=cret"}), ("", {})],
)
def test_the_header_of_a_restricted_repository(header: str, expected: dict[str, str]) -> None:
    async def use(client: TritonClient, script: Scripted) -> dict[str, str]:
        assert await client.index() == []
        return {key: value for key, value in script.metadata.items() if key.startswith("triton")}

    assert with_scripted(use, repository_header=header) == expected


def test_a_refused_connection_fails_at_once() -> None:
    async def use(client: TritonClient) -> None:
        for _ in range(3):
            began = time.monotonic()
            with pytest.raises(ApiError) as caught:
                await embed(client, "m", texts("a"))
            assert (caught.value.status, caught.value.code) == (503, None)
            assert time.monotonic() - began < 0.5

    with_client(f"127.0.0.1:{free_port()}", use)


def test_a_triton_that_comes_up_is_noticed_within_a_second() -> None:
    async def run() -> float:
        port = free_port()
        client = TritonClient(f"127.0.0.1:{port}")
        for _ in range(20):  # long enough for gRPC's pauses between attempts to grow
            with pytest.raises(ApiError):
                await client.live()
            await asyncio.sleep(0.1)
        server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Scripted(), server)
        server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        began = time.monotonic()
        while True:
            try:
                await embed(client, "m", texts("a"))
                break
            except ApiError:
                await asyncio.sleep(0.02)
                assert time.monotonic() - began < 5
        took = time.monotonic() - began
        await client.close()
        await server.stop(None)
        return took

    assert asyncio.run(run()) < 1


def received(request: Any) -> dict[str, list[list[bytes]]]:
    """The BYTES tensors of a request, read by tritonclient."""
    return {
        tensor.name: deserialize_bytes_tensor(content).reshape(tuple(tensor.shape)).tolist()
        for tensor, content in zip(request.inputs, request.raw_input_contents, strict=True)
        if tensor.datatype == "BYTES"
    }


@pytest.mark.parametrize(
    ("given", "images", "expected"),
    [
        (["a", "画像"], None, {"TEXT": [[b"a"], ["画像".encode()]]}),
        (["a", "b"], [[], []], {"TEXT": [[b"a"], [b"b"]], "IMAGE": [[b""], [b""]]}),
        (["a"], [()], {"TEXT": [[b"a"]], "IMAGE": [[b""]]}),
        (["a", ""], [[], [b"\0x"]], {"TEXT": [[b"a"], [b""]], "IMAGE": [[b""], [b"\0x"]]}),
        (
            ["", "a", "b"],
            [[b"x", b"yy" * 200], [], [b"z"]],
            {"TEXT": [[b""], [b"a"], [b"b"]], "IMAGE": [[b"x", b"yy" * 200], [b"", b""], [b"z", b""]]},
        ),
    ],
)
def test_texts_and_images_as_tensors(given: list[str], images: Any, expected: dict[str, Any]) -> None:
    async def use(client: TritonClient, script: Scripted) -> Any:
        assert len((await embed(client, "m", texts(*given), images)).tokens) == len(given)
        return script.asked[0]

    assert received(with_scripted(use)) == expected


def test_ids_travel_alone_even_to_a_model_of_images() -> None:
    async def use(client: TritonClient, script: Scripted) -> list[str]:
        await embed(client, "m", ids([1, 2]), [])
        return [tensor.name for tensor in script.asked[0].inputs]

    assert with_scripted(use) == ["INPUT_IDS"]


def test_texts_and_their_tokens(triton: Triton) -> None:
    async def use(client: TritonClient) -> Embeddings:
        return await embed(client, "minilm", texts("hello world", "你好 😀", "word " * 400))

    reply = with_client(triton.grpc, use)
    assert reply.vectors.shape == (3, 384)
    assert reply.vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(reply.vectors, axis=1), 1, atol=1e-6)
    assert reply.tokens.tolist()[0] == 4  # [CLS] hello world [SEP]
    assert (reply.tokens[2], reply.dropped.tolist()) == (256, [0, 0, 146])


def test_ids_are_the_same_text(triton: Triton) -> None:
    async def use(client: TritonClient) -> tuple[Embeddings, Embeddings]:
        by_text = await embed(client, "minilm", texts("hello world", "hello"))
        return by_text, await embed(client, "minilm", ids([101, 7592, 2088, 102], [101, 7592, 102]))

    by_text, by_ids = with_client(triton.grpc, use)
    assert by_ids.tokens.tolist() == [4, 3]
    assert np.allclose(by_text.vectors, by_ids.vectors, atol=2e-5)


def test_parameters_reach_the_model(triton: Triton) -> None:
    async def use(client: TritonClient) -> None:
        assert (await embed(client, "bge_tiny", texts("hello", form=Form(sizes=(20,))))).vectors.shape == (1, 20)
        plain = await embed(client, "bge_tiny", texts("hello"))
        told = await embed(client, "bge_tiny", texts("hello", prompt=Prompt("the cat")))
        assert not np.allclose(plain.vectors, told.vectors, atol=1e-2)
        with pytest.raises(ApiError, match="longer than the model's context length"):
            await embed(client, "bge_tiny", texts("cat " * 300, truncate="none"))

    with_client(triton.grpc, use)


def test_faults_are_reported_row_by_row(triton: Triton) -> None:
    async def use(client: TritonClient) -> tuple[Embeddings, Embeddings]:
        alone = await embed(client, "bge_tiny", texts("hello"))
        request = texts("cat " * 300, "hello", "", truncate="none", faults=Faults(report=True))
        return alone, await embed(client, "bge_tiny", request)

    alone, reported = with_client(triton.grpc, use)
    assert np.allclose(reported.vectors[1], alone.vectors[0], atol=2e-5)
    assert not reported.vectors[[0, 2]].any()
    assert reported.tokens.tolist() == [0, *alone.tokens.tolist(), 0]
    assert "(input at index 0)" in reported.errors[0]
    assert reported.errors[1:] == ["", "Input at index 2 cannot be empty or whitespace only"]


def test_where_vectors_came_from_is_asked_for_with_receipts_alone(triton: Triton) -> None:
    async def use(client: TritonClient) -> tuple[Embeddings, Embeddings]:
        with_receipt = texts("hello", "world", "hello", form=Form(receipt=True))
        return await embed(client, "bge_tiny", texts("hello")), await embed(client, "bge_tiny", with_receipt)

    plain, told = with_client(triton.grpc, use)
    assert plain.reused is None
    assert told.reused is not None
    assert told.reused.tolist() == [0, 0, 1]
    assert np.array_equal(told.vectors[0], told.vectors[2])


def test_ids_of_texts(triton: Triton) -> None:
    async def use(client: TritonClient) -> list[list[int]]:
        return await client.tokenize("minilm", texts("hello world", "hello"), takes_images=False)

    assert with_client(triton.grpc, use) == [[101, 7592, 2088, 102], [101, 7592, 102]]


def test_what_triton_says_of_a_model(triton: Triton) -> None:
    async def use(client: TritonClient) -> None:
        assert await client.live()
        found = {entry.name: (entry.version, entry.state) for entry in await client.index()}
        assert found == dict.fromkeys(("minilm", "bge", "bge_tiny"), ("1", "READY"))
        assert (await client.config("bge_tiny"))["aliases"] == "tiny, BAAI/bge-tiny"
        assert ModelInfo.model_validate_json(await client.info("bge_tiny")).vocab_size > 90
        with pytest.raises(ApiError) as caught:
            await client.info("bge")
        assert caught.value.code == "model_not_ready"
        with pytest.raises(ApiError, match="Model 'nope' is not loaded"):
            await embed(client, "nope", texts("a"))

    with_client(triton.grpc, use)
