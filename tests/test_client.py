"""The Triton client: shielded calls against a scripted gRPC server, tensors against a real Triton."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor

from conftest import Triton, free_port
from triton_embed.gateway.api.inputs import InputErrors, Prompt
from triton_embed.gateway.api.requests import EmbeddingRequest, Embeddings
from triton_embed.gateway.api.vector_formats import VectorFormat
from triton_embed.gateway.errors import ApiError
from triton_embed.gateway.triton.client import TritonClient
from triton_embed.gateway.triton.model_info import read_info
from triton_embed.python_backend.wire import InputError

T = TypeVar("T")


def texts(*items: str, **fields: Any) -> EmbeddingRequest:
    return EmbeddingRequest(model=None, texts=list(items), ids=[], single=False, param="input", **fields)


def ids(*rows: list[int], **fields: Any) -> EmbeddingRequest:
    return EmbeddingRequest(model=None, texts=[], ids=list(rows), single=False, param="input", **fields)


def embed(client: TritonClient, model: str, request: EmbeddingRequest, images: Any = None, **options: Any) -> Any:
    """Embed all inputs of a request in one call."""
    return client.embed(model, request, range(request.count), images, **options)


def with_client(target: str, use: Callable[[TritonClient], Awaitable[T]], **options: Any) -> T:
    async def run() -> T:
        client = TritonClient(target, **options)
        try:
            return await use(client)
        finally:
            await client.close()

    return asyncio.run(run())


class Scripted(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """A scripted Triton in this process: it answers after `seconds` or with `failure`, and records requests."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.failure: tuple[grpc.StatusCode, str] | None = None
        self.outputs: Sequence[str] = ("EMBEDDING", "TOKENS", "DROPPED")
        self.errors: Sequence[str] = ()  # ASCII
        self.max_running = 10**9  # above it, calls get "Exceeds maximum queue size"
        self.running = self.peak = self.refused = self.answered = 0
        self.cancelled = 0
        self.metadata: dict[str, str] = {}
        self.requests: list[Any] = []

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        if self.running >= self.max_running:
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
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        if self.failure is not None:
            await context.abort(*self.failure)
        rows = request.inputs[0].shape[0]
        reply = service_pb2.ModelInferResponse(model_name=request.model_name)
        for name in self.outputs:
            reply.outputs.add(name=name)
            texts = "".join(error.ljust(max(map(len, self.errors))) for error in self.errors)
            reply.raw_output_contents.append(texts.encode() if name == "ERROR" else bytes(4 * rows))
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


def test_deadline_ends_the_wait_but_not_the_call() -> None:
    async def use(client: TritonClient, script: Scripted) -> None:
        script.seconds = 0.4
        ended: list[float] = []
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await embed(client, "m", texts("a"), ended=lambda: ended.append(time.monotonic()))
        assert time.monotonic() - start < 0.3
        assert not ended
        await asyncio.sleep(0.5)
        assert (script.answered, script.cancelled) == (1, 0)
        assert len(ended) == 1

    with_scripted(use)


def test_ended_is_called_for_a_failed_call() -> None:
    async def use(client: TritonClient, script: Scripted) -> None:
        script.failure = (grpc.StatusCode.INTERNAL, "")
        ended: list[bool] = []
        with pytest.raises(ApiError):
            await embed(client, "m", texts("a"), ended=lambda: ended.append(True))
        await asyncio.sleep(0)
        assert ended == [True]

    with_scripted(use)


def test_parameters_and_metadata_are_sent() -> None:
    async def use(client: TritonClient, script: Scripted) -> None:
        request = texts("a", "b", "c", prompts=[Prompt("x"), Prompt(), Prompt(prompt_name="q")], truncate="none")
        await client.embed("m", request, [2, 0], seconds=1.5, metadata=(("traceparent", "00-1-2-3"),))
        sent = script.requests[0]
        assert received(sent) == {"TEXT": [[b"c"], [b"a"]]}
        assert json.loads(sent.parameters["prompts"].string_param) == [{"prompt_name": "q"}, {"instruction": "x"}]
        assert sent.parameters["truncate"].string_param == "none"
        assert sent.parameters["timeout_ms"].int64_param == 1500
        assert [output.name for output in sent.outputs] == ["EMBEDDING", "TOKENS", "DROPPED"]
        assert script.metadata["traceparent"] == "00-1-2-3"

    with_scripted(use)


def test_cancelled_caller_does_not_cancel_the_call() -> None:
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


def test_close_waits_for_running_calls() -> None:
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
        ("CANCELLED", "/secret", 504, "Deadline exceeded before model 'm' started this request"),
        ("UNKNOWN", "/secret", 500, "Model 'm' failed to answer"),
        ("RESOURCE_EXHAUSTED", "/secret", 500, "Model 'm' failed to answer"),
    ],
)  # fmt: skip
def test_translation_of_grpc_errors(status: str, details: str, expected: int, message: str) -> None:
    async def use(client: TritonClient, script: Scripted) -> ApiError:
        script.failure = (grpc.StatusCode[status], details)
        with pytest.raises(ApiError) as caught:
            await embed(client, "m", texts("a"))
        return caught.value

    error = with_scripted(use)
    assert (error.status, error.message) == (expected, message)
    assert error.headers is None


@pytest.mark.parametrize(
    ("details", "status", "message"),
    [
        (
            "Failed to increase the shared memory pool size for key 'triton_python_backend_shm_region_1' to 68157440 "
            "bytes. If you are running Triton inside docker, use '--shm-size' flag to control the shared memory region "
            "size. Error: No space left on device",
            503,
            "Model 'm' has no memory for this request now",
        ),
        ("std::bad_alloc", 503, "Model 'm' has no memory for this request now"),
        ("Failed to process", 500, "Model 'm' failed to answer"),
    ],
)
def test_cause_of_a_failure_is_logged(
    details: str, status: int, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def use(client: TritonClient, script: Scripted) -> ApiError:
        script.failure = (grpc.StatusCode.INTERNAL, details)
        with pytest.raises(ApiError) as caught:
            await embed(client, "m", texts("a"))
        return caught.value

    error = with_scripted(use)
    assert (error.status, error.message) == (status, message)
    assert (error.headers or {}).get("Retry-After") == ("1" if status == 503 else None)
    assert f"Triton failed a call of model 'm' with INTERNAL: {details}" in caplog.messages


@pytest.mark.parametrize("report", [False, True])
def test_errors_have_the_index_in_the_request(report: bool) -> None:
    async def use(client: TritonClient, script: Scripted) -> Sequence[str]:
        request = texts(*"abcdef", errors=InputErrors(report))
        errors = [InputError(1, "empty", "Input is bad").to_json(), "", "not JSON"]
        script.failure = None if report else (grpc.StatusCode.INVALID_ARGUMENT, errors[0])
        script.outputs, script.errors = (*script.outputs, "ERROR"), errors
        if report:
            return (await client.embed("m", request, [5, 3, 0])).errors
        with pytest.raises(ApiError) as caught:
            await client.embed("m", replace(request, param="image_data"), [5, 3, 0])
        assert (caught.value.status, caught.value.param) == (400, "image_data")
        assert script.requests[0].parameters["error_format"].string_param == "json"
        return [caught.value.message]

    expected = ["Input at index 3 is bad", "", "not JSON"]
    assert with_scripted(use) == (expected if report else expected[:1])


def test_missing_output_is_an_error() -> None:
    async def use(client: TritonClient, script: Scripted) -> None:
        script.outputs = ("EMBEDDING", "TOKENS")
        await embed(client, "m", texts("a"))

    with pytest.raises(ApiError, match="answered without DROPPED"):
        with_scripted(use)


@pytest.mark.parametrize(
    ("header", "expected"),
    [("Triton-Embed=s3=cret", {"triton-grpc-protocol-triton-embed": "s3=cret"}), ("", {})],
)
def test_header_of_a_restricted_repository_is_sent(header: str, expected: dict[str, str]) -> None:
    async def use(client: TritonClient, script: Scripted) -> dict[str, str]:
        assert await client.index() == []
        return {key: value for key, value in script.metadata.items() if key.startswith("triton")}

    assert with_scripted(use, repository_header=header) == expected


def test_refused_connection_fails_immediately() -> None:
    async def use(client: TritonClient) -> None:
        for _ in range(3):
            start = time.monotonic()
            with pytest.raises(ApiError) as caught:
                await embed(client, "m", texts("a"))
            assert (caught.value.status, caught.value.code) == (503, None)
            assert time.monotonic() - start < 0.5

    with_client(f"127.0.0.1:{free_port()}", use)


def test_reconnects_to_a_started_triton_within_a_second() -> None:
    async def run() -> float:
        port = free_port()
        client = TritonClient(f"127.0.0.1:{port}")
        for _ in range(20):  # long enough for gRPC's reconnect backoff to grow
            with pytest.raises(ApiError):
                await client.live()
            await asyncio.sleep(0.1)
        server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Scripted(), server)
        server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        start = time.monotonic()
        while True:
            try:
                await embed(client, "m", texts("a"))
                break
            except ApiError:
                await asyncio.sleep(0.02)
                assert time.monotonic() - start < 5
        seconds = time.monotonic() - start
        await client.close()
        await server.stop(None)
        return seconds

    assert asyncio.run(run()) < 1


def received(request: Any) -> dict[str, list[list[bytes]]]:
    """Return the BYTES tensors of a request, deserialized by tritonclient."""
    return {
        tensor.name: deserialize_bytes_tensor(content).reshape(tuple(tensor.shape)).tolist()
        for tensor, content in zip(request.inputs, request.raw_input_contents, strict=True)
        if tensor.datatype == "BYTES"
    }


@pytest.mark.parametrize(
    ("inputs", "images", "expected"),
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
def test_texts_and_images_are_sent_as_tensors(inputs: list[str], images: Any, expected: dict[str, Any]) -> None:
    async def use(client: TritonClient, script: Scripted) -> Any:
        assert len((await embed(client, "m", texts(*inputs), images)).tokens) == len(inputs)
        return script.requests[0]

    assert received(with_scripted(use)) == expected


def test_ids_are_sent_without_images_to_an_image_model() -> None:
    async def use(client: TritonClient, script: Scripted) -> list[str]:
        await embed(client, "m", ids([1, 2]), [])
        return [tensor.name for tensor in script.requests[0].inputs]

    assert with_scripted(use) == ["INPUT_IDS"]


def test_embed_texts_with_token_counts(triton: Triton) -> None:
    async def use(client: TritonClient) -> Embeddings:
        return await embed(client, "minilm", texts("hello world", "你好 😀", "word " * 400))

    reply = with_client(triton.grpc, use)
    assert reply.vectors.shape == (3, 384)
    assert reply.vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(reply.vectors, axis=1), 1, atol=1e-6)
    assert reply.tokens.tolist()[0] == 4  # [CLS] hello world [SEP]
    assert (reply.tokens[2], reply.dropped.tolist()) == (256, [0, 0, 146])


def test_ids_and_their_text_have_the_same_vector(triton: Triton) -> None:
    async def use(client: TritonClient) -> tuple[Embeddings, Embeddings]:
        by_text = await embed(client, "minilm", texts("hello world", "hello"))
        return by_text, await embed(client, "minilm", ids([101, 7592, 2088, 102], [101, 7592, 102]))

    by_text, by_ids = with_client(triton.grpc, use)
    assert by_ids.tokens.tolist() == [4, 3]
    assert np.allclose(by_text.vectors, by_ids.vectors, atol=2e-5)


def test_parameters_reach_the_model(triton: Triton) -> None:
    async def use(client: TritonClient) -> None:
        shortened = await embed(client, "bge_tiny", texts("hello", vector_format=VectorFormat(sizes=(20,))))
        assert shortened.vectors.shape == (1, 20)
        plain = await embed(client, "bge_tiny", texts("hello"))
        prompted = await embed(client, "bge_tiny", texts("hello", prompt=Prompt("the cat")))
        assert not np.allclose(plain.vectors, prompted.vectors, atol=1e-2)
        with pytest.raises(ApiError, match="longer than the model's context length"):
            await embed(client, "bge_tiny", texts("cat " * 300, truncate="none"))

    with_client(triton.grpc, use)


def test_errors_are_reported_per_input(triton: Triton) -> None:
    async def use(client: TritonClient) -> tuple[Embeddings, Embeddings]:
        alone = await embed(client, "bge_tiny", texts("hello"))
        request = texts("cat " * 300, "hello", "", truncate="none", errors=InputErrors(report=True))
        return alone, await embed(client, "bge_tiny", request)

    alone, reported = with_client(triton.grpc, use)
    assert np.allclose(reported.vectors[1], alone.vectors[0], atol=2e-5)
    assert not reported.vectors[[0, 2]].any()
    assert reported.tokens.tolist() == [0, *alone.tokens.tolist(), 0]
    assert "(input at index 0)" in reported.errors[0]
    assert reported.errors[1:] == ["", "Input at index 2 cannot be empty or whitespace only"]


def test_reused_is_requested_only_with_receipts(triton: Triton) -> None:
    async def use(client: TritonClient) -> tuple[Embeddings, Embeddings]:
        with_receipt = texts("hello", "world", "hello", vector_format=VectorFormat(receipt=True))
        return await embed(client, "bge_tiny", texts("hello")), await embed(client, "bge_tiny", with_receipt)

    plain, receipts = with_client(triton.grpc, use)
    assert plain.reused is None
    assert receipts.reused is not None
    assert receipts.reused.tolist() == [0, 0, 1]
    assert np.array_equal(receipts.vectors[0], receipts.vectors[2])


def test_tokenize_returns_ids(triton: Triton) -> None:
    async def use(client: TritonClient) -> list[list[int]]:
        return await client.tokenize("minilm", texts("hello world", "hello"), takes_images=False)

    assert with_client(triton.grpc, use) == [[101, 7592, 2088, 102], [101, 7592, 102]]


def test_index_config_and_info_of_a_real_triton(triton: Triton) -> None:
    async def use(client: TritonClient) -> None:
        assert await client.live()
        index = {entry.name: (entry.version, entry.state) for entry in await client.index()}
        assert index == dict.fromkeys(("minilm", "bge", "bge_tiny"), ("1", "READY"))
        assert (await client.config("bge_tiny"))["aliases"] == "tiny, BAAI/bge-tiny"
        assert read_info(await client.info("bge_tiny")).vocab_size > 90
        with pytest.raises(ApiError) as caught:
            await client.info("bge")
        assert caught.value.code == "model_not_ready"
        with pytest.raises(ApiError, match="Model 'nope' is not loaded"):
            await embed(client, "nope", texts("a"))

    with_client(triton.grpc, use)
