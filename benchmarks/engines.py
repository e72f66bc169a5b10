"""One engine in a process of its own, with one checkpoint: rows of token ids or image files in, vectors out.

`python -m benchmarks.engines ours|transformers TASK.json` is a worker. Images begin as JPEG files for both engines:
decoding, resizing and normalising them is part of what is timed.
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

from benchmarks.record import ROOT
from benchmarks.worker import Vectors, answer

BATCH = 32  # rows


class Work(NamedTuple):
    """One cell's rows: of token ids, or else image files."""

    ids: list[list[int]]
    images: list[str]

    def files(self) -> list[bytes]:
        return [Path(image).read_bytes() for image in self.images]


Embed = Callable[[Work], Vectors]


def ours(family: str, arguments: dict[str, str], **_: Any) -> Embed:
    """The family's own model.py as Triton's Python backend runs it: same threads, budget and passes; only the way
    from and to tritonserver is left out."""
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
        return request.answer.result()

    return embed


class _Request:
    """A request as the backend hands it over, and the sender of its one response."""

    def __init__(self, inputs: dict[str, npt.NDArray[Any]]) -> None:
        self.inputs = inputs
        self.answer: Future[Vectors] = Future()

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
            self.answer.set_exception(RuntimeError(response.error))
        else:
            self.answer.set_result(response.output_tensors[0].as_numpy())


def _triton() -> SimpleNamespace:
    """What serve.py uses of the module that only exists inside tritonserver."""

    def tensor(_: str, values: npt.NDArray[Any]) -> SimpleNamespace:
        return SimpleNamespace(as_numpy=lambda: values)

    def given(request: _Request, name: str) -> SimpleNamespace | None:
        return tensor(name, request.inputs[name]) if name in request.inputs else None

    def error(message: str, _: str) -> str:
        return message

    for code in ("INVALID_ARG", "INTERNAL", "UNAVAILABLE"):
        setattr(error, code, code)
    return SimpleNamespace(
        Tensor=tensor,
        get_input_tensor_by_name=given,
        InferenceResponse=SimpleNamespace,
        TritonError=error,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
        Logger=SimpleNamespace(log_info=sys.stderr.write, log_warn=sys.stderr.write, log_error=sys.stderr.write),
    )


def transformers(family: str, directory: str, dtype: str, text: str, **_: Any) -> Embed:
    """Batches sorted by length and padded on the side the family's official code pads; sdpa attention."""
    import torch
    from transformers import AutoModel
    from transformers.utils import logging as noise

    noise.disable_progress_bar()
    options = {"add_pooling_layer": False} if family == "bge" else {}
    network = AutoModel.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation="sdpa", **options
    ).eval()
    embedder = {"bge": _first, "qwen3_embedding": _last, "clip": _clip, "gme_qwen2_vl": _gme}[family]
    pool = embedder(network, directory, text)

    @torch.inference_mode()
    def embed(work: Work) -> Vectors:
        rows: Sequence[Any] = work.ids or work.files()
        found: dict[int, Vectors] = {}
        for some in _batches([len(row) for row in work.ids] or [1] * len(rows)):
            pooled = torch.nn.functional.normalize(pool([rows[i] for i in some]).float(), dim=-1)
            found |= zip(some, pooled.numpy(), strict=True)
        return np.stack([found[i] for i in range(len(rows))])

    return embed


def _batches(lengths: list[int]) -> Iterator[list[int]]:
    """Of 32 rows, or a quarter of rows of different lengths: a few rows are then padded no more than 128 would be."""
    size = BATCH if len(set(lengths)) == 1 else max(1, min(BATCH, len(lengths) // 4))
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _padded(rows: Sequence[Sequence[int]], left: bool) -> dict[str, Any]:
    import torch

    size = max(map(len, rows))
    pads = [[0] * (size - len(row)) for row in rows]
    both = [
        (pad + list(row), pad + [1] * len(row)) if left else (list(row) + pad, [1] * len(row) + pad)
        for row, pad in zip(rows, pads, strict=True)
    ]
    return {key: torch.tensor([pair[i] for pair in both]) for i, key in enumerate(("input_ids", "attention_mask"))}


def _first(network: Any, *_: str) -> Callable[[Sequence[Any]], Any]:
    return lambda rows: network(**_padded(rows, left=False)).last_hidden_state[:, 0]


def _last(network: Any, *_: str) -> Callable[[Sequence[Any]], Any]:
    return lambda rows: network(**_padded(rows, left=True), use_cache=False).last_hidden_state[:, -1]


def _clip(network: Any, directory: str, _: str) -> Callable[[Sequence[Any]], Any]:
    from PIL import Image
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil.from_pretrained(directory)

    def pool(rows: Sequence[Any]) -> Any:
        if not isinstance(rows[0], bytes):
            return network.get_text_features(**_padded(rows, left=False)).pooler_output
        pictures = [Image.open(io.BytesIO(row)) for row in rows]
        pixels = processor(pictures, return_tensors="pt")["pixel_values"]
        return network.get_image_features(pixels.to(network.dtype)).pooler_output

    return pool


def _gme(network: Any, directory: str, text: str) -> Callable[[Sequence[Any]], Any]:
    """Put together as Qwen2VLProcessor does, which cannot be loaded without torchvision."""
    from PIL import Image
    from tokenizers import Tokenizer
    from transformers import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil.from_pretrained(directory)
    tokenizer = Tokenizer.from_file(f"{directory}/tokenizer.json")
    image = "<|image_pad|>"

    def pool(rows: Sequence[Any]) -> Any:
        inputs = processor([Image.open(io.BytesIO(row)) for row in rows], return_tensors="pt")
        counts = inputs["image_grid_thw"].prod(dim=1) // processor.merge_size**2
        prompts = [tokenizer.encode(text.replace(image, image * int(count))).ids for count in counts]
        padded = _padded(prompts, left=True)
        pictured = (padded["input_ids"] == tokenizer.token_to_id(image)).int()
        inputs["pixel_values"] = inputs["pixel_values"].to(network.dtype)
        states = network(**padded, **inputs, mm_token_type_ids=pictured, use_cache=False).last_hidden_state
        return states[:, -1]

    return pool


def main() -> None:
    task: dict[str, Any] = json.loads(Path(sys.argv[2]).read_text())
    with redirect_stdout(sys.stderr):
        embed = {"ours": ours, "transformers": transformers}[sys.argv[1]](**task)
    work = {name: Work(**rows) for name, rows in task["work"].items()}

    def handle(*, workload: str, seconds: float = 0, save: str = "") -> dict[str, Any]:
        """Calls with all rows of a workload, back to back, until `seconds` have passed; at least one."""
        begin, calls = time.perf_counter(), 0
        while not calls or time.perf_counter() - begin < seconds:
            vectors = embed(work[workload])
            calls += 1
        taken = (time.perf_counter() - begin) / calls
        if save:
            np.save(save, vectors)
        return {"seconds": taken}

    answer(handle)


if __name__ == "__main__":
    main()
