"""EmbeddingServer, the base class of every family, and the only file that talks to Triton's Python backend.

Inputs: TEXT (BYTES [n,1]) and, for models that take images, IMAGE (BYTES [n,k]: encoded files, empty = none); or
INPUT_IDS (INT32 [n,L], rows padded with -1).

Outputs: EMBEDDING (FP32 [n,d]), TOKENS and DROPPED (INT32 [n,1]), REUSED (INT32 [n,1], the codes of `wire.Reused`), and
ERROR (UINT8 [n,L]: text) with on_error "report". Two outputs need no compute if they are requested alone: INFO
(UINT8 [n,L]: JSON about the model) and IDS (INT32 [n,L]: the token ids before truncation, rows padded with -1).

Texts are UTF-8 padded with spaces. No output is BYTES: tritonserver divides by the size of an element, which is 0 for
BYTES, if a request asks for the classes of an output, and dies.

Everything else is a request parameter. Every request gets exactly one response.
"""

import gc
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from triton_embed.python_backend import wire
from triton_embed.python_backend.checkpoint import files as checkpoint
from triton_embed.python_backend.checkpoint.config import ServingConfig
from triton_embed.python_backend.errors import BadInput, BadRequest
from triton_embed.python_backend.inputs.parameters import parse_parameters
from triton_embed.python_backend.scheduling.metrics import EngineMetrics
from triton_embed.python_backend.scheduling.sender import Sender
from triton_embed.python_backend.spec import Spec

if TYPE_CHECKING:
    from triton_embed.python_backend.inputs.processors import TextProcessor
    from triton_embed.python_backend.inputs.rows import RequestRows

CHARACTERS_PER_TOKEN = 4  # of ordinary text
# After which a thread gives up the interpreter lock to the engine, which launches kernels meanwhile (measured beside a
# busy thread: the engine has it back after 1.9 ms, and after 9.5 ms with Python's 5 ms)
SWITCH_SECONDS = 0.0005
PASSES_IN_FLIGHT = 2  # on a GPU: one is computed, and one waits, so that the GPU never does
SENT_SECONDS = 0.5  # in which tritonserver takes the last replies of this process


class EmbeddingServer:
    """The base class of every family's `1/model.py`, which sets only what the weights of the family require."""

    spec: ClassVar[Spec]
    prompt: ClassVar[str | None] = None  # template with {instruction} and {text}; None: instructions are refused

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the checkpoint. Without one, answer requests with UNAVAILABLE: an exception would stop the server."""
        _hide_shared_memory()
        self._serving = serving = ServingConfig.from_triton(args)
        logging.basicConfig(handlers=[_TritonLog()], level=logging.INFO, format="%(message)s", force=True)
        self._sender = Sender()
        self._unanswered: set[_InferRequest] = set()
        self._unavailable = None
        directory = checkpoint.locate(serving)
        if directory is None:
            expected = checkpoint.directory_of(serving.checkpoint, serving.checkpoint_root)
            self._unavailable = (
                f"Model '{serving.name}' has no checkpoint. Fetch it with: "
                f"triton-embed download {serving.checkpoint}\nLooked in {expected}"
            )
            logging.warning(self._unavailable)
            return

        gc.disable()  # looking for garbage among what is imported and loaded takes a tenth of the start
        # Imported here, because a family without a checkpoint should not cost the import of torch.
        from triton_embed.python_backend.execution.embedder import Embedder
        from triton_embed.python_backend.scheduling.scheduler import Scheduler

        if serving.device != "cpu":
            sys.setswitchinterval(SWITCH_SECONDS)
        self._engine = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._embedder = self._engine.submit(Embedder, self.spec, directory, serving).result()
        self._model = self._embedder.model
        processor_class = self.spec.load(self.spec.processor)
        self._processor: TextProcessor = processor_class(
            self._model.directory, self._model, self._model.network_config, serving, self.spec.eos, self.prompt
        )
        # Pillow releases the interpreter lock while it decodes and resizes.
        self._pool = ThreadPoolExecutor(serving.thread_count, thread_name_prefix="image")
        family = getattr(pb_utils, "MetricFamily", None)
        self._scheduler = Scheduler(
            self._embedder.start,
            self._embedder.budget,
            self._sender,
            self._engine,
            family and EngineMetrics(family, serving.name),
            serving.cache_bytes,
            1 if serving.device == "cpu" else PASSES_IN_FLIGHT,
            _end_process,
        )
        gc.freeze()  # nor is it ever looked for among what stays until the end
        gc.enable()
        self._info = self._describe()
        self._info_json = self._info.to_json().encode()
        threads = serving.thread_count
        logging.info(
            "%s: serving %s in %s on %s, kernels %s, %d tokens per forward pass",
            serving.name,
            directory,
            self._embedder.computes_in,
            f"{threads} of {os.cpu_count()} cores" if serving.device == "cpu" else serving.device,
            self._embedder.kernels,
            self._embedder.budget.pass_tokens,
        )

    def is_ready(self) -> bool:
        """Return whether the model can serve. Called by Triton 26.03 and later, never by 2.51."""
        return self._unavailable is None

    def execute(self, requests: Sequence[Any]) -> None:
        """Parse requests, tokenize their texts, and admit them. The sender thread sends the responses."""
        pending = [_InferRequest(request, self._serving.name, self._unanswered) for request in requests]
        try:
            self._for_each_open(pending, self._accept)
            self._for_each_open(pending, self._parse)
            for group in self._groups(pending):
                self._for_each_open(group, self._tokenize(group))
                self._for_each_open(group, self._admit)
        finally:
            for request in pending:
                if request.send_response is not None:
                    self._sender.put(request.send_response)

    def finalize(self) -> None:
        """Drain: answer every admitted request, then stop."""
        if self._unavailable is None:
            self._scheduler.close()
            self._engine.shutdown()
            self._pool.shutdown()
        self._sender.close()
        if self._unavailable is None:
            del self._scheduler  # ends its metrics while the stub can still report that to Triton

    def _for_each_open(self, pending: Sequence["_InferRequest"], step: Callable[["_InferRequest"], None]) -> None:
        """Run a step for each request without a response. An error refuses that request only."""
        for request in pending:
            if request.send_response is not None:
                continue
            try:
                step(request)
            except BadInput as refused:
                error_format = request.parameters.get("error_format", "text")
                request.refuse(refused.error.write(error_format), pb_utils.TritonError.INVALID_ARG)
            except BadRequest as error:
                request.refuse(str(error), pb_utils.TritonError.INVALID_ARG)
            except Exception:
                logging.exception("A request could not be parsed")
                request.refuse("The model failed to read this request", pb_utils.TritonError.INTERNAL)

    def _accept(self, request: "_InferRequest") -> None:
        """Refuse a request before any work is done for it if too many wait."""
        if len(self._unanswered) < wire.MAX_REQUESTS:
            self._unanswered.add(request)
        else:
            request.refuse(wire.QUEUE_FULL, pb_utils.TritonError.UNAVAILABLE)

    def _parse(self, request: "_InferRequest") -> None:
        if self._unavailable is not None:
            request.refuse(self._unavailable, pb_utils.TritonError.UNAVAILABLE)
            return
        if request.outputs == {wire.INFO}:
            request.reply_info(self._info_json)
            return
        from triton_embed.python_backend.inputs.rows import IdRows, ItemRows

        request.parameters = parameters = parse_parameters(request.triton.parameters())
        dimensions = parameters.get("dimensions")
        if dimensions is not None and (message := wire.dimensions_error(dimensions, self._info)):
            raise BadRequest(message)
        if request.reports_errors and wire.ERROR not in request.outputs:
            raise BadRequest('on_error "report" needs the output ERROR to be requested')
        ids, text, image = (request.tensor(name) for name in (wire.INPUT_IDS, wire.TEXT, wire.IMAGE))
        if ids is None:
            request.rows = items = ItemRows(
                self._processor,
                parameters,
                text,
                image,
                limit=self._serving.max_request_tokens,
                whole=request.wants_ids,
            )
            if not request.wants_ids:
                items.decode_images(self._pool)
        elif text is None and image is None:
            request.rows = IdRows(self._processor, parameters, ids)
        else:
            raise BadRequest("Send either INPUT_IDS or TEXT and IMAGE")

    def _groups(self, pending: Sequence["_InferRequest"]) -> Iterator[list["_InferRequest"]]:
        """Yield the requests to tokenize together: all small ones, then one large one after the other.

        So a small request does not wait until large ones are tokenized, nor the engine until all of them are.
        """
        waiting = [request for request in pending if request.send_response is None]
        if waiting:
            max_characters = CHARACTERS_PER_TOKEN * self._embedder.budget.small_job_tokens
            yield [request for request in waiting if request.rows.characters <= max_characters]
            yield from ([request] for request in waiting if request.rows.characters > max_characters)

    def _tokenize(self, pending: Sequence["_InferRequest"]) -> Callable[["_InferRequest"], None]:
        """Encode the texts of requests in one call, on all cores. Return the step that hands out the ids."""
        encoded = self._encode(
            [text for request in pending if request.send_response is None for text in request.rows.texts()]
        )
        return lambda request: request.rows.set_ids(encoded)

    def _encode(self, texts: list[str]) -> Iterator[npt.NDArray[np.int32]]:
        """Yield the ids of each text. A generator, so that an error is raised inside a step, which handles it."""
        yield from self._processor.tokenizer.encode(texts)

    def _admit(self, request: "_InferRequest") -> None:
        from triton_embed.python_backend.scheduling.job import Job
        from triton_embed.python_backend.scheduling.scheduler import LaneFullError

        rows, parameters = request.rows, request.parameters
        if request.wants_ids:
            request.reply({wire.IDS: rows.padded_ids()})
            return
        rows.make_rows(self._serving.max_request_tokens)
        request.dims = dims = parameters.get("dimensions") or self._model.dimensions
        if not rows.rows:
            request.reply(request.outputs_of(np.empty((0, dims), np.float32), np.empty(0, np.int32)))
            return
        timeout = parameters.get("timeout_ms")
        deadline = math.inf if timeout is None else request.received + timeout / 1_000
        job_dims = self._model.dimensions if rows.averaged else dims
        try:
            self._scheduler.submit(Job(rows.rows, job_dims, request, deadline))
        except LaneFullError:
            request.refuse(wire.QUEUE_FULL, pb_utils.TritonError.UNAVAILABLE)

    def _describe(self) -> wire.ModelInfo:
        model, serving = self._model, self._serving
        return wire.ModelInfo(
            name=serving.name,
            family=model.model_type,
            checkpoint=None if serving.checkpoint.startswith("/") else serving.checkpoint,
            dimensions=model.dimensions,
            max_model_len=model.max_tokens,
            vocab_size=model.vocab_size,
            pooling=model.pooling,
            modalities=self._processor.modalities,
            matryoshka=model.matryoshka,
            instructions=self.prompt is not None,
            prompt_names=tuple(self._processor.prompt_names),
            default_prompt_name=model.default_prompt,
            batch_tokens=self._embedder.budget.pass_tokens,
            small_tokens=self._embedder.budget.small_job_tokens,
            max_request_tokens=serving.max_request_tokens,
            dtype=self._embedder.computes_in,
            device=self._embedder.device,
            kernels=self._embedder.kernels,
            instances=serving.instances,
        )


class _InferRequest:
    """One Triton request and its response.

    Args:
        unanswered: The accepted requests, from which this one is removed when its response is sent.
    """

    def __init__(self, triton: Any, model: str, unanswered: set["_InferRequest"]) -> None:
        self._model = model
        self._unanswered = unanswered
        self.triton = triton  # pb_utils.InferenceRequest
        self.response_sender = triton.get_response_sender()
        self.outputs = set(triton.requested_output_names())
        self.received = time.monotonic()
        self.parameters: dict[str, Any] = {}
        self.rows: RequestRows
        self.dims = 0  # of EMBEDDING
        self.send_response: Callable[[], None] | None = None  # set if the response needs no compute

    @property
    def reports_errors(self) -> bool:
        """Whether errors of rows are reported in ERROR."""
        return self.parameters.get("on_error") == "report"

    @property
    def wants_ids(self) -> bool:
        """Whether IDS are requested, and nothing that must be computed. A request without output names wants all."""
        return wire.IDS in self.outputs and self.outputs <= {wire.IDS, wire.ERROR}

    def tensor(self, name: str) -> npt.NDArray[Any] | None:
        tensor = pb_utils.get_input_tensor_by_name(self.triton, name)
        return None if tensor is None else tensor.as_numpy()

    def reply_info(self, info: bytes) -> None:
        """Reply with INFO, one row per input row."""
        inputs = map(self.tensor, (wire.TEXT, wire.IMAGE, wire.INPUT_IDS))
        tensor = next((tensor for tensor in inputs if tensor is not None), None)
        row = np.frombuffer(info, np.uint8)
        self.reply({wire.INFO: np.tile(row, (1 if tensor is None else len(tensor), 1))})

    def reply(self, outputs: Mapping[str, npt.NDArray[Any]]) -> None:
        """Reply with outputs that needed no compute."""
        tensors = self._tensors(outputs)
        self.send_response = lambda: self._send(tensors)

    def refuse(self, message: str, code: Any) -> None:
        """Reply with an error."""
        self.send_response = lambda: self._send([], pb_utils.TritonError(message, code))

    # The scheduler's Reply: every method but `cancelled` is called on the sender thread.

    def cancelled(self) -> bool:
        return bool(self.response_sender.is_cancelled())

    def done(self, vectors: npt.NDArray[np.float32], reused: npt.NDArray[np.int32]) -> None:
        self._send(self._tensors(self.outputs_of(vectors, reused)))

    def failed(self, reason: str) -> None:
        self._send([], pb_utils.TritonError(reason, pb_utils.TritonError.INTERNAL))

    def dropped(self, reason: str) -> None:
        self._send([], pb_utils.TritonError(reason, pb_utils.TritonError.CANCELLED))

    def unavailable(self) -> None:
        message = f"Model '{self._model}' lost its GPU and starts again"
        self._send([], pb_utils.TritonError(message, pb_utils.TritonError.UNAVAILABLE))

    def outputs_of(
        self, vectors: npt.NDArray[np.float32], reused: npt.NDArray[np.int32]
    ) -> dict[str, npt.NDArray[Any]]:
        """Return the outputs for the vectors of the computed rows and the sources of these vectors."""
        return {
            wire.EMBEDDING: self.rows.embeddings(vectors, self.dims),
            wire.TOKENS: self.rows.tokens(),
            wire.DROPPED: self.rows.dropped(),
            wire.REUSED: self.rows.reused(reused),
        }

    def _tensors(self, outputs: Mapping[str, npt.NDArray[Any]]) -> list[Any]:
        """Return the requested outputs, with ERROR if errors are reported."""
        available = {**outputs, wire.ERROR: self.rows.errors()} if self.reports_errors else outputs
        return [pb_utils.Tensor(name, value) for name, value in available.items() if name in self.outputs]

    def _send(self, tensors: list[Any], error: Any = None) -> None:
        self._unanswered.discard(self)
        response = pb_utils.InferenceResponse(output_tensors=tensors, error=error)
        self.response_sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


class _TritonLog(logging.Handler):
    """A logging handler that writes to Triton's log."""

    def emit(self, record: logging.LogRecord) -> None:
        write = {logging.WARNING: pb_utils.Logger.log_warn, logging.ERROR: pb_utils.Logger.log_error}
        write.get(record.levelno, pb_utils.Logger.log_info)(self.format(record))


def _end_process() -> None:
    """End this process, which makes the supervisor of tritonserver start it again."""
    time.sleep(SENT_SECONDS)
    os._exit(1)


def _hide_shared_memory() -> None:
    """Remove the name of the memory that this process shares with tritonserver, which holds what callers send.

    Both have it open. By its name, which every user of this machine can list, others could read it, and Triton's
    shared-memory API would read and write it for them. Without a name it also ends with its processes.
    """
    stub, _, region, *_ = Path("/proc/self/cmdline").read_text(errors="replace").split("\0") + [""] * 3
    if stub.endswith("triton_python_backend_stub") and region:
        Path("/dev/shm", region).unlink(missing_ok=True)  # noqa: S108 - where Triton's Python backend puts its regions
