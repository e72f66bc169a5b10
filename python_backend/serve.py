"""EmbeddingServer: a family as Triton sees it. The only file that talks to Triton's Python backend.

Inputs TEXT (BYTES [n,1]) or INPUT_IDS (INT32 [n,L], rows padded with -1); outputs EMBEDDING (FP32 [n,d]),
TOKENS and DROPPED (INT32 [n,1]), and INFO (BYTES [n,1]: JSON about the model) when it alone is asked for.
Everything else is a request parameter. Every request ends in exactly one response.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from triton_embed.python_backend import checkpoint
from triton_embed.python_backend.config import ServingConfig
from triton_embed.python_backend.delivery import Delivery
from triton_embed.python_backend.errors import BadRequest
from triton_embed.python_backend.request import check_dimensions, decode_text, parse_parameters, unpad_ids
from triton_embed.python_backend.spec import EncoderSpec


class EmbeddingServer:
    """What every family's `1/model.py` derives from, stating only what its weights demand."""

    spec: ClassVar[EncoderSpec | None] = None  # None: the network of this family is not written yet
    prompt: ClassVar[str | None] = None  # with {instruction} and {text}; None: an instruction is refused

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the checkpoint. Without one, serve a clear UNAVAILABLE instead: a raise would stop the server."""
        self._serving = serving = ServingConfig.from_triton(args)
        logging.basicConfig(handlers=[_TritonLog()], level=logging.INFO, format="%(message)s", force=True)
        self._delivery = Delivery()
        self._unavailable = None
        directory = checkpoint.locate(serving)
        if self.spec is None:
            self._unavailable = f"Model '{serving.name}' is not implemented in this version"
        elif directory is None:
            looked = checkpoint.directory_of(serving.checkpoint, serving.checkpoint_root)
            self._unavailable = (
                f"Model '{serving.name}' has no checkpoint. Fetch it with: "
                f"triton-embed download {serving.checkpoint}\nLooked in {looked}"
            )
        if self._unavailable or self.spec is None or directory is None:
            logging.warning(self._unavailable)
            return

        # Only now: a family without a checkpoint must not pay for torch.
        from triton_embed.python_backend.embedder import Embedder
        from triton_embed.python_backend.scheduler import Scheduler

        self._engine = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._embedder = self._engine.submit(Embedder, self.spec, directory, serving).result()
        self._model = self._embedder.model
        self._scheduler = Scheduler(self._embedder.embed, serving.batch_tokens, self._delivery, self._engine)
        self._info = json.dumps(self._describe()).encode()
        logging.info(
            "%s: serving %s in %s on %s, kernels %s, %d tokens a forward pass",
            serving.name,
            directory,
            self._embedder.dtype,
            serving.device,
            self._embedder.kernels,
            serving.batch_tokens,
        )

    def is_ready(self) -> bool:
        """Asked by Triton 26.03 and later; 2.51 never asks."""
        return self._unavailable is None

    def execute(self, requests: Sequence[Any]) -> None:
        """Read, tokenise in one call, admit. Responses follow from the delivery thread."""
        readings = [_Reading(request, self._delivery) for request in requests]
        self._guard(readings, self._read)
        self._guard(readings, self._tokenise(readings))
        self._guard(readings, self._admit)

    def finalize(self) -> None:
        """Drain: everything admitted is answered."""
        if self._unavailable is None:
            self._scheduler.close()
            self._engine.shutdown()
        self._delivery.close()

    def _guard(self, readings: Sequence["_Reading"], step: Callable[["_Reading"], None]) -> None:
        """Run one step for each open request; an error ends that request alone."""
        for reading in readings:
            if reading.answered:
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
        reading.parameters = parse_parameters(reading.request.parameters())
        check_dimensions(reading.parameters.get("dimensions"), self._serving.name, self._model)
        text, ids = reading.tensor("TEXT"), reading.tensor("INPUT_IDS")
        if (text is None) == (ids is None):
            raise BadRequest("Send either TEXT or INPUT_IDS")
        if text is not None:
            template = self._template(reading.parameters)
            reading.texts = [template(decode_text(row, i)) for i, row in enumerate(text.reshape(len(text), -1))]
        elif ids is not None:
            if {"instruction", "prompt_name"} & reading.parameters.keys():
                raise BadRequest("instruction and prompt_name need TEXT: token ids are used as they are")
            reading.ids = [unpad_ids(row, i) for i, row in enumerate(ids)]

    def _tokenise(self, readings: Sequence["_Reading"]) -> Callable[["_Reading"], None]:
        """Encode the texts of all requests at once, on every core; the step hands each request its own."""
        encoded = self._encode([text for reading in readings for text in reading.texts])

        def hand_out(reading: "_Reading") -> None:
            if reading.texts:
                reading.ids = [next(encoded) for _ in reading.texts]

        return hand_out

    def _encode(self, texts: list[str]) -> Iterator[npt.NDArray[np.int32]]:
        """A generator, so that what goes wrong does so inside a step, where requests are answered for it."""
        yield from self._embedder.tokenizer.encode(texts)

    def _template(self, parameters: Mapping[str, Any]) -> Callable[[str], str]:
        """How instruction or prompt_name go around a text."""
        if "prompt_name" in parameters:
            name = parameters["prompt_name"]
            if "instruction" in parameters:
                raise BadRequest("Send either instruction or prompt_name")
            if name not in self._model.prompts:
                known = ", ".join(self._model.prompts) or "none"
                raise BadRequest(f"Model '{self._serving.name}' has no prompt_name '{name}'; it has: {known}")
            prompt = self._model.prompts[name]
            return lambda text: prompt + text
        instruction = parameters.get("instruction")
        if not instruction:
            return lambda text: text
        if self.prompt is None:
            raise BadRequest(f"Model '{self._serving.name}' takes no instruction: it was trained without one")
        before, after = self.prompt.split("{text}")
        return lambda text: before.replace("{instruction}", instruction) + text + after

    def _admit(self, reading: "_Reading") -> None:
        from triton_embed.python_backend.scheduler import Job

        tokenizer = self._embedder.tokenizer
        fit = tokenizer.cut_text if reading.texts else tokenizer.check_ids
        truncate = reading.parameters.get("truncate", "end")
        rows = [fit(ids, truncate, i) for i, ids in enumerate(reading.ids)]
        total, limit = sum(len(row.ids) for row in rows), self._serving.max_request_tokens
        if total > limit:
            raise BadRequest(f"The request has {total} tokens, more than the {limit} a request may have")
        reading.tokens = [len(row.ids) for row in rows]
        reading.dropped = [row.dropped for row in rows]
        dims = reading.parameters.get("dimensions") or self._model.hidden_size
        self._scheduler.submit(Job([row.ids for row in rows], dims, reading))

    def _describe(self) -> dict[str, Any]:
        model, serving = self._model, self._serving
        return {
            "name": serving.name,
            "family": model.model_type,
            "checkpoint": None if serving.checkpoint.startswith("/") else serving.checkpoint,
            "dimensions": model.hidden_size,
            "max_model_len": model.max_tokens,
            "vocab_size": model.vocab_size,
            "pooling": model.pooling,
            "modalities": ["text"],
            "matryoshka": model.matryoshka,
            "instructions": self.prompt is not None,
            "prompt_names": list(model.prompts),
            "dtype": str(self._embedder.dtype).removeprefix("torch."),
            "device": self._embedder.device,
            "kernels": self._embedder.kernels,
        }


class _Reading:
    """One request on its way in, and the reply on its way out."""

    def __init__(self, request: Any, delivery: Delivery) -> None:
        self.request = request
        self.delivery = delivery
        self.sender = request.get_response_sender()
        self.outputs = set(request.requested_output_names())
        self.parameters: dict[str, Any] = {}
        self.texts: list[str] = []
        self.ids: list[npt.NDArray[np.int32]] = []
        self.tokens: list[int] = []
        self.dropped: list[int] = []
        self.answered = False

    def tensor(self, name: str) -> npt.NDArray[Any] | None:
        found = pb_utils.get_input_tensor_by_name(self.request, name)
        return None if found is None else found.as_numpy()

    def inform(self, info: bytes) -> None:
        """Answer INFO, one row for each row sent."""
        found = self.tensor("TEXT")
        found = self.tensor("INPUT_IDS") if found is None else found
        rows = np.full((1 if found is None else len(found), 1), info, dtype=np.object_)
        self.answered = True
        self.delivery.put(lambda: self._send([pb_utils.Tensor("INFO", rows)]))

    def refuse(self, message: str, code: Any) -> None:
        """Answer with an error."""
        self.answered = True
        self.delivery.put(lambda: self._send([], pb_utils.TritonError(message, code)))

    # The scheduler's Reply: `done` and `failed` are called on the delivery thread.

    def cancelled(self) -> bool:
        return bool(self.sender.is_cancelled())

    def done(self, vectors: npt.NDArray[np.float32]) -> None:
        outputs = {
            "EMBEDDING": vectors,
            "TOKENS": np.array(self.tokens, dtype=np.int32)[:, None],
            "DROPPED": np.array(self.dropped, dtype=np.int32)[:, None],
        }
        self._send([pb_utils.Tensor(name, value) for name, value in outputs.items() if name in self.outputs])

    def failed(self, reason: str) -> None:
        self._send([], pb_utils.TritonError(reason, pb_utils.TritonError.INTERNAL))

    def _send(self, tensors: list[Any], error: Any = None) -> None:
        response = pb_utils.InferenceResponse(output_tensors=tensors, error=error)
        self.sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


class _TritonLog(logging.Handler):
    """Python's logging into Triton's log."""

    def emit(self, record: logging.LogRecord) -> None:
        write = {logging.WARNING: pb_utils.Logger.log_warn, logging.ERROR: pb_utils.Logger.log_error}
        write.get(record.levelno, pb_utils.Logger.log_info)(self.format(record))
