"""One request, one inference: the only file that speaks to Triton, and the one that reads its errors.

A call that was sent is never cancelled, because cancelling one can kill tritonserver 2.51: each runs in a task of
its own, shielded from its caller, and a deadline only ends the wait for it. gRPC's own stubs are used rather than
tritonclient's class: they keep the status code apart from the text and copy the tensors once less.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import grpc
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2, service_pb2_grpc

from triton_embed.gateway.errors import ApiError, invalid
from triton_embed.gateway.schemas import EmbeddingRequest, Embeddings

T = TypeVar("T")

RETRY_AFTER_SECONDS = 1
CONTROL_SECONDS = 2.0  # for questions that cost Triton no compute
DRAIN_SECONDS = 3.0
PADDED_IDS = 2**20  # the most cells of one INPUT_IDS tensor: 4 MiB
FLOAT32, INT32 = np.dtype("<f4"), np.dtype("<i4")
CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A Triton that is back is noticed at once; gRPC would wait up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One model of Triton's repository index."""

    name: str
    version: str
    state: str  # READY, LOADING, UNLOADING, UNAVAILABLE, or empty for one never loaded


class TritonClient:
    """Calls to one tritonserver. Open it inside a running event loop and close it there.

    Every method raises ApiError: 503 when Triton or the model does not answer, 504 past the deadline.
    """

    def __init__(self, target: str, *, timeout: float, repository_header: str = "") -> None:
        self._channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._timeout = timeout
        key, _, value = repository_header.partition("=")
        self._repository_metadata = ((f"triton-grpc-protocol-{key.lower()}", value),) if key else ()
        self._running: set[asyncio.Task[Any]] = set()

    async def close(self) -> None:
        """Let running calls end, for a few seconds; closing the channel cancels those that have not."""
        if self._running:
            await asyncio.wait(self._running, timeout=DRAIN_SECONDS)
        await self._channel.close()

    async def live(self) -> bool:
        """Whether tritonserver answers."""
        request = service_pb2.ServerLiveRequest()
        reply = await self._call("", lambda: self._stub.ServerLive(request), CONTROL_SECONDS)
        return bool(reply.live)

    async def index(self) -> list[IndexEntry]:
        """Every model of the repository, loaded or not."""
        request = service_pb2.RepositoryIndexRequest()
        reply = await self._call(
            "", lambda: self._stub.RepositoryIndex(request, metadata=self._repository_metadata), CONTROL_SECONDS
        )
        return [IndexEntry(model.name, model.version, model.state) for model in reply.models]

    async def config(self, model: str) -> dict[str, str]:
        """The string parameters of a loaded model's config.pbtxt."""
        request = service_pb2.ModelConfigRequest(name=model)
        reply = await self._call(model, lambda: self._stub.ModelConfig(request), CONTROL_SECONDS)
        return {key: value.string_value for key, value in reply.config.parameters.items()}

    async def info(self, model: str) -> bytes:
        """What a model says about itself: a JSON object, answered without compute."""
        request = service_pb2.ModelInferRequest(model_name=model)
        _add_ids(request, [[0]])
        request.outputs.add(name="INFO")
        reply = await self._call(model, lambda: self._stub.ModelInfer(request), CONTROL_SECONDS)
        return _output(reply, "INFO")[4:]  # after the length

    async def embed(
        self, model: str, request: EmbeddingRequest, images: Sequence[Sequence[bytes]] | None = None
    ) -> Embeddings:
        """Vectors of every input, in order. ApiError 400: the model refuses them; 429: its queue is full.

        A model that takes images must be given `images`, those of each input, even where there are none: requests
        with different sets of tensors never share a batch.
        """
        if request.texts:
            return await self._infer(model, request, partial(_add_texts, texts=request.texts, images=images))
        parts = [await self._infer(model, request, partial(_add_ids, rows=rows)) for rows in even_parts(request.ids)]
        if len(parts) == 1:
            return parts[0]
        return Embeddings(
            np.concatenate([part.vectors for part in parts]),
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.dropped for part in parts]),
        )

    async def _infer(self, model: str, request: EmbeddingRequest, fill: Callable[[Any], None]) -> Embeddings:
        infer = service_pb2.ModelInferRequest(model_name=model)
        fill(infer)
        for name in ("EMBEDDING", "TOKENS", "DROPPED"):
            infer.outputs.add(name=name)
        for key, value in request.parameters().items():
            if isinstance(value, str):
                infer.parameters[key].string_param = value
            else:
                infer.parameters[key].int64_param = value
        reply = await self._call(model, lambda: self._stub.ModelInfer(infer), self._timeout)
        count = infer.inputs[0].shape[0]
        vectors = np.frombuffer(_output(reply, "EMBEDDING"), FLOAT32).reshape(count, -1)
        return Embeddings(vectors, _counts(reply, "TOKENS", count), _counts(reply, "DROPPED", count))

    async def _call(self, model: str, start: Callable[[], Awaitable[T]], seconds: float) -> T:
        """Run one call to its end, whatever becomes of the caller; wait `seconds` for it."""
        task = asyncio.create_task(_finish(start))
        self._running.add(task)
        task.add_done_callback(self._forget)
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.shield(task)
        except TimeoutError:
            raise ApiError(504, f"No answer within {seconds:g} s") from None
        except grpc.aio.AioRpcError as error:
            raise _translate(error, model) from None

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # seen: nobody may be waiting for it any more


def even_parts(rows: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
    """`rows` in order, in runs that pad to at most PADDED_IDS: one long row among 2,000 short ones costs gigabytes."""
    first, longest = 0, 0
    for i, row in enumerate(rows):
        longest = max(longest, len(row))
        if i > first and (i + 1 - first) * longest > PADDED_IDS:
            yield rows[first:i]
            first, longest = i, len(row)
    yield rows[first:]


async def _finish(start: Callable[[], Awaitable[T]]) -> T:
    return await start()


def _add_texts(infer: Any, texts: Sequence[str], images: Sequence[Sequence[bytes]] | None) -> None:
    """TEXT [n,1] in UTF-8, and IMAGE [n,k], k the most images of an input; an empty cell is none."""
    _add_bytes(infer, "TEXT", (len(texts), 1), [text.encode() for text in texts])
    if images is not None:
        width = max(1, *map(len, images))
        cells = [image for row in images for image in (*row, *[b""] * (width - len(row)))]
        _add_bytes(infer, "IMAGE", (len(images), width), cells)


def _add_bytes(infer: Any, name: str, shape: tuple[int, int], cells: Sequence[bytes]) -> None:
    """BYTES: each cell after its length, row by row."""
    infer.inputs.add(name=name, datatype="BYTES", shape=shape)
    infer.raw_input_contents.append(b"".join(len(cell).to_bytes(4, "little") + cell for cell in cells))


def _add_ids(infer: Any, rows: Sequence[Sequence[int]]) -> None:
    """INT32 [n,L]: each row padded with -1."""
    padded = np.full((len(rows), max(map(len, rows))), -1, INT32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    infer.inputs.add(name="INPUT_IDS", datatype="INT32", shape=padded.shape)
    infer.raw_input_contents.append(padded.tobytes())


def _output(reply: Any, name: str) -> bytes:
    for output, content in zip(reply.outputs, reply.raw_output_contents, strict=True):
        if output.name == name:
            return bytes(content)
    raise ApiError(500, f"Model '{reply.model_name}' answered without {name}")


def _counts(reply: Any, name: str, rows: int) -> npt.NDArray[np.int32]:
    return np.frombuffer(_output(reply, name), INT32).reshape(rows)


def _translate(error: grpc.aio.AioRpcError, model: str) -> ApiError:
    """What a caller may know of a gRPC error. Only the model's own sentences are passed on, never Triton's."""
    details = error.details() or ""
    match error.code():
        case grpc.StatusCode.INVALID_ARGUMENT:
            return invalid(details, None)
        case grpc.StatusCode.UNAVAILABLE if "Exceeds maximum queue size" in details:
            wait = {"Retry-After": str(RETRY_AFTER_SECONDS)}
            return ApiError(429, f"The queue of model '{model}' is full, try again shortly", headers=wait)
        case grpc.StatusCode.UNAVAILABLE if details.startswith(f"Model '{model}' "):
            # The first line is for callers, the others are for the operator.
            return ApiError(503, details.splitlines()[0], code="model_not_ready")
        case grpc.StatusCode.NOT_FOUND:
            return ApiError(503, f"Model '{model}' is not loaded", code="model_not_ready")
        case grpc.StatusCode.UNAVAILABLE:
            return ApiError(503, "The inference server cannot be reached")
        case _:
            return ApiError(500, f"Model '{model}' failed to answer" if model else "The inference server failed")
