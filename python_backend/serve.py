"""EmbeddingServer: a family as Triton sees it. The only file that talks to Triton's Python backend.

Inputs TEXT (BYTES [n,1]) and, where the model takes pictures, IMAGE (BYTES [n,k]: encoded files, empty = none), or
INPUT_IDS (INT32 [n,L], rows padded with -1); outputs EMBEDDING (FP32 [n,d]), TOKENS and DROPPED (INT32 [n,1]), REUSED
(INT32 [n,1]: 0 computed for this request, 1 shared with an identical input of it or in flight, 2 from the cache), ERROR
(BYTES [n,1]) with on_error "report", and without any compute, each when it alone is asked for, INFO (BYTES [n,1]: JSON
about the model) and IDS (INT32 [n,L]: what the model would read, uncut, rows padded with -1).
Everything else is a request parameter. Every request ends in exactly one response.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from triton_embed.python_backend import checkpoint
from triton_embed.python_backend.config import ServingConfig
from triton_embed.python_backend.delivery import Delivery
from triton_embed.python_backend.engine_metrics import EngineMetrics
from triton_embed.python_backend.errors import BadRequest
from triton_embed.python_backend.request import check_dimensions, parse_parameters
from triton_embed.python_backend.spec import Spec

if TYPE_CHECKING:
    from triton_embed.python_backend.inputs import Inputs
    from triton_embed.python_backend.reader import Reader


class EmbeddingServer:
    """What every family's `1/model.py` derives from, stating only what its weights demand."""

    spec: ClassVar[Spec]
    prompt: ClassVar[str | None] = None  # with {instruction} and {text}; None: an instruction is refused

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the checkpoint. Without one, serve a clear UNAVAILABLE instead: a raise would stop the server."""
        self._serving = serving = ServingConfig.from_triton(args)
        logging.basicConfig(handlers=[_TritonLog()], level=logging.INFO, format="%(message)s", force=True)
        self._delivery = Delivery()
        self._unavailable = None
        directory = checkpoint.locate(serving)
        if directory is None:
            looked = checkpoint.directory_of(serving.checkpoint, serving.checkpoint_root)
            self._unavailable = (
                f"Model '{serving.name}' has no checkpoint. Fetch it with: "
                f"triton-embed download {serving.checkpoint}\nLooked in {looked}"
            )
            logging.warning(self._unavailable)
            return

        # Only now: a family without a checkpoint must not pay for torch.
        from triton_embed.python_backend.embedder import Embedder
        from triton_embed.python_backend.scheduler import Scheduler

        self._engine = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._embedder = self._engine.submit(Embedder, self.spec, directory, serving).result()
        self._model = self._embedder.model
        reader = self.spec.load(self.spec.reader)
        self._reader: Reader = reader(directory, self._model, self._model.shape, serving, self.spec.eos, self.prompt)
        # Pillow lets go of the interpreter while it decodes and resizes.
        self._pool = ThreadPoolExecutor(serving.thread_count, thread_name_prefix="picture")
        family = getattr(pb_utils, "MetricFamily", None)
        self._scheduler = Scheduler(
            self._embedder.embed,
            self._embedder.budget,
            self._delivery,
            self._engine,
            family and EngineMetrics(family, serving.name),
            serving.cache_bytes,
        )
        self._info = json.dumps(self._describe()).encode()
        logging.info(
            "%s: serving %s in %s on %s, kernels %s, %d tokens a forward pass",
            serving.name,
            directory,
            self._embedder.computes_in,
            serving.device,
            self._embedder.kernels,
            self._embedder.budget.whole,
        )

    def is_ready(self) -> bool:
        """Asked by Triton 26.03 and later; 2.51 never asks."""
        return self._unavailable is None

    def execute(self, requests: Sequence[Any]) -> None:
        """Read, tokenise in one call, admit. Responses follow from the delivery thread.

        Those that need no compute are handed to it last of all: see delivery.py for what a busy machine makes of one
        that is sent while its own `execute` still runs.
        """
        readings = [_Reading(request) for request in requests]
        try:
            self._guard(readings, self._read)
            self._guard(readings, self._tokenise(readings))
            self._guard(readings, self._admit)
        finally:
            for reading in readings:
                if reading.answer is not None:
                    self._delivery.put(reading.answer)

    def finalize(self) -> None:
        """Drain: everything admitted is answered."""
        if self._unavailable is None:
            self._scheduler.close()
            self._engine.shutdown()
            self._pool.shutdown()
        self._delivery.close()
        if self._unavailable is None:
            del self._scheduler  # with its metrics, which Triton has to hear of while the stub can tell it

    def _guard(self, readings: Sequence["_Reading"], step: Callable[["_Reading"], None]) -> None:
        """Run one step for each open request; an error ends that request alone."""
        for reading in readings:
            if reading.answer is not None:
                continue
            try:
                step(reading)
            except BadRequest as error:
                reading.refuse(str(error), pb_utils.TritonError.INVALID_ARG)
            except Exception:
                logging.exception("a request could not be read")
                reading.refuse("The model failed to read this request", pb_utils.TritonError.INTERNAL)

    def _read(self, reading: "_Reading") -> None:
        if self._unavailable is not None:
            reading.refuse(self._unavailable, pb_utils.TritonError.UNAVAILABLE)
            return
        if reading.outputs == {"INFO"}:
            reading.inform(self._info)
            return
        from triton_embed.python_backend.inputs import IdInputs, ItemInputs

        reading.parameters = parameters = parse_parameters(reading.request.parameters())
        check_dimensions(parameters.get("dimensions"), self._serving.name, self._model)
        if reading.reports and "ERROR" not in reading.outputs:
            raise BadRequest('on_error "report" needs the output ERROR to be asked for')
        ids, text, image = (reading.tensor(name) for name in ("INPUT_IDS", "TEXT", "IMAGE"))
        if ids is None:
            reading.inputs = items = ItemInputs(self._reader, parameters, text, image)
            if not reading.lists_ids:
                items.open_pictures(self._pool)
        elif text is None and image is None:
            reading.inputs = IdInputs(self._reader, parameters, ids)
        else:
            raise BadRequest("Send either INPUT_IDS or TEXT and IMAGE")

    def _tokenise(self, readings: Sequence["_Reading"]) -> Callable[["_Reading"], None]:
        """Encode the texts of all requests at once, on every core; the step hands each request its own."""
        encoded = self._encode(
            [text for reading in readings if reading.answer is None for text in reading.inputs.texts()]
        )
        return lambda reading: reading.inputs.take(encoded)

    def _encode(self, texts: list[str]) -> Iterator[npt.NDArray[np.int32]]:
        """A generator, so that what goes wrong does so inside a step, where requests are answered for it."""
        yield from self._reader.tokenizer.encode(texts)

    def _admit(self, reading: "_Reading") -> None:
        from triton_embed.python_backend.job import Job

        inputs, parameters = reading.inputs, reading.parameters
        if reading.lists_ids:
            reading.reply({"IDS": inputs.padded_ids()})
            return
        inputs.make_rows(self._serving.max_request_tokens)
        reading.dims = dims = parameters.get("dimensions") or self._model.dimensions
        if not (rows := inputs.rows):
            reading.reply(reading.computed(np.empty((0, dims), np.float32), np.empty(0, np.int32)))
            return
        timeout = parameters.get("timeout_ms")
        deadline = math.inf if timeout is None else reading.began + timeout / 1_000
        self._scheduler.submit(Job(rows, self._model.dimensions if inputs.averaged else dims, reading, deadline))

    def _describe(self) -> dict[str, Any]:
        model, serving = self._model, self._serving
        return {
            "name": serving.name,
            "family": model.model_type,
            "checkpoint": None if serving.checkpoint.startswith("/") else serving.checkpoint,
            "dimensions": model.dimensions,
            "max_model_len": model.max_tokens,
            "vocab_size": model.vocab_size,
            "pooling": model.pooling,
            "modalities": list(self._reader.modalities),
            "matryoshka": model.matryoshka,
            "instructions": self.prompt is not None,
            "prompt_names": self._reader.prompt_names,
            "default_prompt_name": model.default_prompt,
            "batch_tokens": self._embedder.budget.whole,
            "small_tokens": self._embedder.budget.small,
            "max_request_tokens": serving.max_request_tokens,
            "dtype": self._embedder.computes_in,
            "device": self._embedder.device,
            "kernels": self._embedder.kernels,
        }


class _Reading:
    """One request on its way in, and the reply on its way out."""

    def __init__(self, request: Any) -> None:
        self.request = request
        self.sender = request.get_response_sender()
        self.outputs = set(request.requested_output_names())
        self.began = time.monotonic()
        self.parameters: dict[str, Any] = {}
        self.inputs: Inputs
        self.dims = 0
        self.answer: Callable[[], None] | None = None  # what needs no compute, to be sent

    @property
    def reports(self) -> bool:
        """Whether a bad row is told in ERROR."""
        return self.parameters.get("on_error") == "report"

    @property
    def lists_ids(self) -> bool:
        """Whether IDS are asked for, and nothing that must be computed. Who names no outputs asks for all."""
        return "IDS" in self.outputs and self.outputs <= {"IDS", "ERROR"}

    def tensor(self, name: str) -> npt.NDArray[Any] | None:
        found = pb_utils.get_input_tensor_by_name(self.request, name)
        return None if found is None else found.as_numpy()

    def inform(self, info: bytes) -> None:
        """Answer INFO, one row for each row sent."""
        found = next((x for x in map(self.tensor, ("TEXT", "IMAGE", "INPUT_IDS")) if x is not None), None)
        rows = np.full((1 if found is None else len(found), 1), info, dtype=np.object_)
        self.reply({"INFO": rows})

    def reply(self, outputs: Mapping[str, npt.NDArray[Any]]) -> None:
        """Answer what took no compute."""
        tensors = self._tensors(outputs)
        self.answer = lambda: self._send(tensors)

    def refuse(self, message: str, code: Any) -> None:
        """Answer with an error."""
        self.answer = lambda: self._send([], pb_utils.TritonError(message, code))

    # The scheduler's Reply: all but `cancelled` are called on the delivery thread.

    def cancelled(self) -> bool:
        return bool(self.sender.is_cancelled())

    def done(self, vectors: npt.NDArray[np.float32], reused: npt.NDArray[np.int32]) -> None:
        self._send(self._tensors(self.computed(vectors, reused)))

    def failed(self, reason: str) -> None:
        self._send([], pb_utils.TritonError(reason, pb_utils.TritonError.INTERNAL))

    def dropped(self, reason: str) -> None:
        self._send([], pb_utils.TritonError(reason, pb_utils.TritonError.CANCELLED))

    def computed(self, vectors: npt.NDArray[np.float32], reused: npt.NDArray[np.int32]) -> dict[str, npt.NDArray[Any]]:
        """The outputs, from the vectors of the rows and where they came from."""
        return {
            "EMBEDDING": self.inputs.embeddings(vectors, self.dims),
            "TOKENS": self.inputs.tokens(),
            "DROPPED": self.inputs.dropped(),
            "REUSED": self.inputs.reused(reused),
        }

    def _tensors(self, outputs: Mapping[str, npt.NDArray[Any]]) -> list[Any]:
        """Those asked for, with ERROR where rows are reported."""
        found = {**outputs, "ERROR": self.inputs.errors()} if self.reports else outputs
        return [pb_utils.Tensor(name, value) for name, value in found.items() if name in self.outputs]

    def _send(self, tensors: list[Any], error: Any = None) -> None:
        response = pb_utils.InferenceResponse(output_tensors=tensors, error=error)
        self.sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


class _TritonLog(logging.Handler):
    """Python's logging into Triton's log."""

    def emit(self, record: logging.LogRecord) -> None:
        write = {logging.WARNING: pb_utils.Logger.log_warn, logging.ERROR: pb_utils.Logger.log_error}
        write.get(record.levelno, pb_utils.Logger.log_info)(self.format(record))
