"""One in-process engine with one checkpoint: rows of token ids or image files in, vectors out.

`python -m benchmarks.families.engines ours|transformers TASK.json` is a worker. Images are JPEG files for both engines:
decoding, resizing and normalization are part of the measured time.
"""

import io
import json
import runpy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.report import ROOT
from benchmarks.worker import Vectors, serve_requests

BATCH = 32  # rows


class Work(NamedTuple):
    """The rows of one cell: token ids or image files."""

    ids: list[list[int]]
    images: list[str]

    def files(self) -> list[bytes]:
        """Read the image files."""
        return [Path(image).read_bytes() for image in self.images]


Embed = Callable[[Work], Vectors]


def ours(family: str, arguments: dict[str, str], **_: Any) -> Embed:
    """Load the family's model.py as Triton's Python backend does: same threads, token budget and forward passes.

    Only the transport to and from tritonserver is missing.
    """
    sys.modules["triton_python_backend_utils"] = _triton()  # type: ignore[assignment]
    model = runpy.run_path(str(ROOT / "model_repository" / family / "1" / "model.py"))["TritonPythonModel"]()
    model.initialize(arguments)

    def embed(work: Work) -> Vectors:
        inputs: dict[str, npt.NDArray[Any]] = {}
        if work.images:
            inputs["IMAGE"] = np.array([[file] for file in work.files()], dtype=np.object_)
        else:
            inputs["INPUT_IDS"] = np.full((len(work.ids), max(map(len, work.ids))), -1, dtype=np.int32)
            for row, ids in zip(inputs["INPUT_IDS"], work.ids, strict=True):
                row[: len(ids)] = ids
        request = _Request(inputs)
        model.execute([request])
        return request.result.result()

    return embed


class _Request:
    """A request as Triton's Python backend passes it, and the sender of its single response."""

    def __init__(self, inputs: dict[str, npt.NDArray[Any]]) -> None:
        self.inputs = inputs
        self.result: Future[Vectors] = Future()

    def parameters(self) -> str:
        return ""

    def requested_output_names(self) -> list[str]:
        return ["EMBEDDING"]

    def get_response_sender(self) -> "_Request":
        return self

    def is_cancelled(self) -> bool:
        return False

    def send(self, response: SimpleNamespace, flags: int) -> None:
        if response.error:
            self.result.set_exception(RuntimeError(response.error))
        else:
            self.result.set_result(response.output_tensors[0].as_numpy())


def _triton() -> SimpleNamespace:
    """Return a stand-in for triton_python_backend_utils, which exists only inside tritonserver."""

    def tensor(_: str, values: npt.NDArray[Any]) -> SimpleNamespace:
        return SimpleNamespace(as_numpy=lambda: values)

    def input_tensor(request: _Request, name: str) -> SimpleNamespace | None:
        return tensor(name, request.inputs[name]) if name in request.inputs else None

    def error(message: str, _: str) -> str:
        return message

    for code in ("INVALID_ARG", "INTERNAL", "UNAVAILABLE"):
        setattr(error, code, code)
    return SimpleNamespace(
        Tensor=tensor,
        get_input_tensor_by_name=input_tensor,
        InferenceResponse=SimpleNamespace,
        TritonError=error,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
        Logger=SimpleNamespace(log_info=sys.stderr.write, log_warn=sys.stderr.write, log_error=sys.stderr.write),
    )


def transformers(family: str, directory: str, dtype: str, text: str, **_: Any) -> Embed:
    """Load transformers with sdpa attention; batches are sorted by length and padded on the family's official side."""
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = {"add_pooling_layer": False} if family == "bge" else {}
    network = AutoModel.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation="sdpa", **options
    ).eval()
    embedder = {"bge": _pool_first, "qwen3_embedding": _pool_last, "clip": _clip, "gme_qwen2_vl": _gme}[family]
    pool = embedder(network, directory, text)

    @torch.inference_mode()
    def embed(work: Work) -> Vectors:
        rows: Sequence[Any] = work.ids or work.files()
        vectors: dict[int, Vectors] = {}
        for batch in _batches([len(row) for row in work.ids] or [1] * len(rows)):
            pooled = torch.nn.functional.normalize(pool([rows[i] for i in batch]).float(), dim=-1)
            vectors |= zip(batch, pooled.numpy(), strict=True)
        return np.stack([vectors[i] for i in range(len(rows))])

    return embed


def _batches(lengths: list[int]) -> Iterator[list[int]]:
    """Yield the row indices of batches of 32, longest first.

    If lengths differ, a batch holds at most a quarter of the rows: few rows are then padded no more than 128 would be.
    """
    size = BATCH if len(set(lengths)) == 1 else max(1, min(BATCH, len(lengths) // 4))
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _padded(rows: Sequence[Sequence[int]], pad_left: bool) -> dict[str, Any]:
    import torch

    size = max(map(len, rows))
    pads = [[0] * (size - len(row)) for row in rows]
    ids_and_masks = [
        (pad + list(row), pad + [1] * len(row)) if pad_left else (list(row) + pad, [1] * len(row) + pad)
        for row, pad in zip(rows, pads, strict=True)
    ]
    return {
        key: torch.tensor([pair[i] for pair in ids_and_masks]) for i, key in enumerate(("input_ids", "attention_mask"))
    }


def _pool_first(network: Any, *_: str) -> Callable[[Sequence[Any]], Any]:
    return lambda rows: network(**_padded(rows, pad_left=False)).last_hidden_state[:, 0]


def _pool_last(network: Any, *_: str) -> Callable[[Sequence[Any]], Any]:
    return lambda rows: network(**_padded(rows, pad_left=True), use_cache=False).last_hidden_state[:, -1]


def _clip(network: Any, directory: str, _: str) -> Callable[[Sequence[Any]], Any]:
    from PIL import Image
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil.from_pretrained(directory)

    def pool(rows: Sequence[Any]) -> Any:
        if not isinstance(rows[0], bytes):
            return network.get_text_features(**_padded(rows, pad_left=False)).pooler_output
        images = [Image.open(io.BytesIO(row)) for row in rows]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        return network.get_image_features(pixels.to(network.dtype)).pooler_output

    return pool


def _gme(network: Any, directory: str, text: str) -> Callable[[Sequence[Any]], Any]:
    """Build the inputs as Qwen2VLProcessor does, which cannot be imported without torchvision."""
    from PIL import Image
    from tokenizers import Tokenizer
    from transformers import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil.from_pretrained(directory)
    tokenizer = Tokenizer.from_file(f"{directory}/tokenizer.json")
    image_pad = "<|image_pad|>"

    def pool(rows: Sequence[Any]) -> Any:
        inputs = processor([Image.open(io.BytesIO(row)) for row in rows], return_tensors="pt")
        counts = inputs["image_grid_thw"].prod(dim=1) // processor.merge_size**2
        prompts = [tokenizer.encode(text.replace(image_pad, image_pad * int(count))).ids for count in counts]
        padded = _padded(prompts, pad_left=True)
        image_mask = (padded["input_ids"] == tokenizer.token_to_id(image_pad)).int()
        inputs["pixel_values"] = inputs["pixel_values"].to(network.dtype)
        states = network(**padded, **inputs, mm_token_type_ids=image_mask, use_cache=False).last_hidden_state
        return states[:, -1]

    return pool


def main() -> None:
    task: dict[str, Any] = json.loads(Path(sys.argv[2]).read_text())
    with redirect_stdout(sys.stderr):
        embed = {"ours": ours, "transformers": transformers}[sys.argv[1]](**task)
    work = {name: Work(**rows) for name, rows in task["work"].items()}

    def handle(*, workload: str, seconds: float = 0, save: str = "") -> dict[str, Any]:
        """Embed all rows of a workload until `seconds` have passed, at least once; return the seconds per call."""
        begin, calls = time.perf_counter(), 0
        while not calls or time.perf_counter() - begin < seconds:
            vectors = embed(work[workload])
            calls += 1
        seconds_per_call = (time.perf_counter() - begin) / calls
        if save:
            np.save(save, vectors)
        return {"seconds": seconds_per_call}

    serve_requests(handle)


if __name__ == "__main__":
    main()
