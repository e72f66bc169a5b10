"""The gRPC client of tritonserver, and the translation of its errors.

A call that was sent is never cancelled, because cancelling one can kill tritonserver 2.51: each call runs in a separate
task, shielded from its caller, and a deadline only ends the wait for it. gRPC's generated stubs are used rather than
tritonclient's class, because they report the status code apart from the text and save one copy of each tensor.
"""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import grpc
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2, service_pb2_grpc

from triton_embed.gateway.api.requests import EmbeddingRequest, Embeddings
from triton_embed.gateway.errors import ApiError, invalid
from triton_embed.python_backend import wire
from triton_embed.python_backend.wire import InputError

log = logging.getLogger(__name__)

T = TypeVar("T")
Metadata = Sequence[tuple[str, str]]

CONTROL_SECONDS = 2.0  # for calls without compute
DRAIN_SECONDS = 3.0
# What Triton, its Python backend and C++ say when memory runs out, /dev/shm included. Later it may suffice.
_NO_MEMORY = re.compile(r"shared memory|out of memory|bad_alloc|No space left", re.IGNORECASE)
FLOAT32, INT32 = np.dtype("<f4"), np.dtype("<i4")
CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # gRPC would wait up to two minutes before it reconnects to a restarted Triton.
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
    state: str  # READY, LOADING, UNLOADING, UNAVAILABLE, or empty if it was never loaded


class RefusedInputError(ApiError):
    """A 400 for one input of a call."""

    def __init__(self, error: InputError) -> None:
        super().__init__(400, error.text)
        self.error = error


class TritonClient:
    """Calls to one tritonserver. Create and close it in a running event loop.

    Every method raises ApiError: 503 if Triton or the model does not answer, 504 after the deadline.
    """

    def __init__(self, target: str, *, repository_header: str = "") -> None:
        self._channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        key, _, value = repository_header.partition("=")
        self._repository_metadata = ((f"triton-grpc-protocol-{key.lower()}", value),) if key else ()
        self._running: set[asyncio.Task[Any]] = set()

    async def close(self) -> None:
        """Wait a few seconds for running calls, then close the channel, which cancels the rest."""
        if self._running:
            await asyncio.wait(self._running, timeout=DRAIN_SECONDS)
        await self._channel.close()

    async def live(self) -> bool:
        """Return whether tritonserver is live."""
        request = service_pb2.ServerLiveRequest()
        reply = await self._call("", lambda: self._stub.ServerLive(request), CONTROL_SECONDS)
        return bool(reply.live)

    async def index(self) -> list[IndexEntry]:
        """Return every model of the repository, loaded or not."""
        request = service_pb2.RepositoryIndexRequest()
        reply = await self._call(
            "", lambda: self._stub.RepositoryIndex(request, metadata=self._repository_metadata), CONTROL_SECONDS
        )
        return [IndexEntry(model.name, model.version, model.state) for model in reply.models]

    async def config(self, model: str) -> dict[str, str]:
        """Return the string parameters of a loaded model's config.pbtxt."""
        request = service_pb2.ModelConfigRequest(name=model)
        reply = await self._call(model, lambda: self._stub.ModelConfig(request), CONTROL_SECONDS)
        return {key: value.string_value for key, value in reply.config.parameters.items()}

    async def info(self, model: str) -> bytes:
        """Return a model's INFO output: a JSON object, computed without a forward pass."""
        request = service_pb2.ModelInferRequest(model_name=model)
        _add_ids(request, [[0]])
        request.outputs.add(name=wire.INFO)
        reply = await self._call(model, lambda: self._stub.ModelInfer(request), CONTROL_SECONDS)
        return _output(reply, wire.INFO)

    async def embed(
        self,
        model: str,
        request: EmbeddingRequest,
        rows: Sequence[int],
        images: Sequence[Sequence[bytes]] | None = None,
        *,
        seconds: float | None = None,
        metadata: Metadata = (),
        ended: Callable[[], None] | None = None,
    ) -> Embeddings:
        """Embed some inputs of a request.

        Args:
            rows: Indices of the inputs; the result has their order. Errors have the index in the request.
            images: The images of every input of the request. Required for a model that takes images, even if there are
                none: requests with different sets of tensors never share a batch.
            seconds: Time from now until the model drops the request, unless it has begun to compute it.
            ended: Called when the call has ended, even if its caller has gone.

        Raises:
            ApiError: 400 if the model refuses the request or an input; 429 if its queue is full.
        """
        infer = service_pb2.ModelInferRequest(model_name=model)
        _add_inputs(infer, request, rows, images)
        report, receipt = request.errors.report, request.vector_format.receipt
        optional = [wire.ERROR] * report + [wire.REUSED] * receipt
        for name in (wire.EMBEDDING, wire.TOKENS, wire.DROPPED, *optional):
            infer.outputs.add(name=name)
        _add_parameters(infer, request.parameters(rows))
        if seconds is not None:
            infer.parameters["timeout_ms"].int64_param = max(1, int(1_000 * seconds))
        try:
            reply = await self._call(model, lambda: self._stub.ModelInfer(infer, metadata=metadata), None, ended)
        except RefusedInputError as refused:
            raise invalid(_text(refused.error, rows), request.param) from None
        vectors = np.frombuffer(_output(reply, wire.EMBEDDING), FLOAT32).reshape(len(rows), -1)
        errors = [_reported(text, rows) for text in _texts(_output(reply, wire.ERROR), len(rows))] if report else ()
        return Embeddings(
            vectors,
            _counts(reply, wire.TOKENS, len(rows)),
            _counts(reply, wire.DROPPED, len(rows)),
            errors,
            _counts(reply, wire.REUSED, len(rows)) if receipt else None,
        )

    async def tokenize(self, model: str, request: EmbeddingRequest, takes_images: bool) -> list[list[int]]:
        """Return the token ids of each text as the model sees them, without truncation."""
        infer = service_pb2.ModelInferRequest(model_name=model)
        rows = range(request.count)
        _add_inputs(infer, request, rows, [()] * request.count if takes_images else None)
        infer.outputs.add(name=wire.IDS)
        _add_parameters(infer, request.parameters(rows))
        reply = await self._call(model, lambda: self._stub.ModelInfer(infer), None)
        padded = np.frombuffer(_output(reply, wire.IDS), INT32).reshape(request.count, -1)
        return [row[row >= 0].tolist() for row in padded]

    async def _call(
        self,
        model: str,
        start: Callable[[], Awaitable[T]],
        seconds: float | None,
        ended: Callable[[], None] | None = None,
    ) -> T:
        """Run one call to its end even if the caller is cancelled.

        Args:
            start: Sends the call.
            seconds: Longest wait for the result; None waits until the call ends.
            ended: Called when the call has ended.
        """
        task = asyncio.create_task(_finish(start))
        self._running.add(task)
        task.add_done_callback(self._forget)
        if ended is not None:
            task.add_done_callback(lambda _: ended())
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
            task.exception()  # mark it as retrieved: the caller may have gone


async def _finish(start: Callable[[], Awaitable[T]]) -> T:
    """Await a gRPC call in a coroutine, because asyncio.create_task does not accept other awaitables."""
    return await start()


def _add_inputs(
    infer: Any, request: EmbeddingRequest, rows: Sequence[int], images: Sequence[Sequence[bytes]] | None
) -> None:
    """Add INPUT_IDS; or TEXT [n,1] in UTF-8 and, unless `images` is None, IMAGE [n,k].

    k is the largest number of images of an input. Inputs with fewer images are padded with empty cells.
    """
    if request.ids:
        _add_ids(infer, [request.ids[i] for i in rows])
        return
    _add_bytes(infer, wire.TEXT, (len(rows), 1), [request.texts[i].encode() for i in rows])
    if images is not None:
        selected = [images[i] for i in rows]
        width = max(1, *map(len, selected))
        cells = [cell for row in selected for cell in (*row, *[b""] * (width - len(row)))]
        _add_bytes(infer, wire.IMAGE, (len(rows), width), cells)


def _add_parameters(infer: Any, parameters: Mapping[str, int | str]) -> None:
    """Add request parameters, and `error_format`: the model writes errors of inputs as JSON."""
    infer.parameters["error_format"].string_param = "json"
    for key, value in parameters.items():
        if isinstance(value, str):
            infer.parameters[key].string_param = value
        else:
            infer.parameters[key].int64_param = value


def _add_bytes(infer: Any, name: str, shape: tuple[int, int], cells: Sequence[bytes]) -> None:
    """Add a BYTES tensor: each cell after its length, row by row."""
    infer.inputs.add(name=name, datatype="BYTES", shape=shape)
    infer.raw_input_contents.append(b"".join(len(cell).to_bytes(4, "little") + cell for cell in cells))


def _add_ids(infer: Any, rows: Sequence[Sequence[int]]) -> None:
    """Add INPUT_IDS [n,L], INT32: each row padded with -1."""
    padded = np.full((len(rows), max(1, *map(len, rows))), -1, INT32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    infer.inputs.add(name=wire.INPUT_IDS, datatype="INT32", shape=padded.shape)
    infer.raw_input_contents.append(padded.tobytes())


def _output(reply: Any, name: str) -> bytes:
    for output, content in zip(reply.outputs, reply.raw_output_contents, strict=True):
        if output.name == name:
            return bytes(content)
    raise ApiError(500, f"Model '{reply.model_name}' answered without {name}")


def _texts(content: bytes, rows: int) -> Iterator[str]:
    """Yield the text of each row of a tensor of texts: UTF-8 padded with spaces."""
    size = len(content) // rows
    for start in range(0, len(content), size):
        yield content[start : start + size].decode().rstrip(" ")


def _reported(message: str, rows: Sequence[int]) -> str:
    """Return the text of a row of ERROR, empty if the input has no error."""
    error = InputError.from_json(message) if message else None
    return message if error is None else _text(error, rows)


def _text(error: InputError, rows: Sequence[int]) -> str:
    """Return the text of a model's error, with the input's index in the call replaced by its index in the request."""
    return replace(error, index=rows[error.index]).text


def _counts(reply: Any, name: str, rows: int) -> npt.NDArray[np.int32]:
    return np.frombuffer(_output(reply, name), INT32).reshape(rows)


def _translate(error: grpc.aio.AioRpcError, model: str) -> ApiError:
    """Return the public form of a gRPC error. Only the model's own messages are passed on, never Triton's."""
    details = error.details() or ""
    match error.code():
        case grpc.StatusCode.INVALID_ARGUMENT:
            refused = InputError.from_json(details)
            return invalid(details, None) if refused is None else RefusedInputError(refused)
        case grpc.StatusCode.UNAVAILABLE if wire.QUEUE_FULL in details:
            return ApiError(429, f"The queue of model '{model}' is full, try again shortly")
        case grpc.StatusCode.UNAVAILABLE if details.startswith(f"Model '{model}' "):
            # The first line is for callers, the rest for the operator.
            return ApiError(503, details.splitlines()[0], code="model_not_ready")
        case grpc.StatusCode.CANCELLED:  # the engine's status for a request that it dropped at its deadline
            return ApiError(504, f"Deadline exceeded before model '{model}' started this request")
        case grpc.StatusCode.NOT_FOUND:
            return ApiError(503, f"Model '{model}' is not loaded", code="model_not_ready")
        case grpc.StatusCode.UNAVAILABLE:
            return ApiError(503, "The inference server cannot be reached")
        case code:
            # Callers do not see Triton's words, so the operator must.
            log.error("Triton failed a call of model '%s' with %s: %s", model, code.name, details)
            if _NO_MEMORY.search(details):
                return ApiError(
                    503, f"Model '{model}' has no memory for this request now", headers={"Retry-After": "1"}
                )
            return ApiError(500, f"Model '{model}' failed to answer" if model else "The inference server failed")
