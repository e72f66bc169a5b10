"""Inputs of the soak, each with its expected vector, computed in advance by `expected`."""

import base64
import io
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.processes import MODEL
from benchmarks.soak.models import GME, QUERY, QWEN3
from benchmarks.worker import Worker

Vector = npt.NDArray[np.float64]
IMAGES = 10
INSTRUCTIONS = (
    "Given a question, retrieve passages that answer it",
    "Identify the topic of the given text",
    "Find a picture that shows what the text says",
)


@dataclass(frozen=True)
class Input:
    """One input and its expected result: unit vector, tokens computed, tokens cut off."""

    vector: Vector  # [E]
    tokens: int
    dropped: int = 0
    text: str = ""
    ids: Sequence[int] = ()
    images: tuple[str, ...] = ()  # keys of Inputs.image_files
    keys: Mapping[str, str] = field(default_factory=dict)  # request fields with the instruction or prompt


class Inputs:
    """Pools of inputs by model and kind."""

    def __init__(self, reference: Worker, folder: Path, pools: Mapping[str, Sequence[str]]) -> None:
        self._reference = reference
        self.image_files = dict(_write_images(folder))
        mixed, short, long = pools["mixed"], pools["short"], pools["long"]
        longer = [" ".join(long[i : i + 2 + i % 3]) for i in range(0, 48, 2)]
        self.pools: dict[tuple[str, str], list[Input]] = {}
        for model in (MODEL, QWEN3):
            self._add(model, "texts", [{"text": text} for text in (*mixed, *short)])
            for fit in ("end", "start", "mean"):
                self._add(model, fit, [{"text": text, "fit": fit} for text in longer])
        for model, texts in ((QWEN3, mixed[:80]), (GME, short[:40])):
            for instruction in INSTRUCTIONS:
                items = [{"text": text, "instruction": instruction} for text in texts]
                self._add(model, "instructed", items, instruction=instruction)
        self._add(QWEN3, "queries", [{"text": text, "instruction": QUERY} for text in mixed[:80]], input_type="query")
        items = [{"text": text, "fit": "mean", "instruction": INSTRUCTIONS[0]} for text in longer]
        self._add(QWEN3, "instructed mean", items, instruction=INSTRUCTIONS[0])
        names = list(self.image_files)
        rng = random.Random(0)
        self._add(GME, "texts", [{"text": text} for text in short])
        self._add(GME, "images", [{"images": [name]} for name in names])
        fused = [{"images": [name], "text": rng.choice(short)} for name in names]
        several = [{"images": rng.sample(names, 1 + i % 3), "text": rng.choice(("", *short[:5]))} for i in range(10)]
        self._add(GME, "fused", fused + several)
        items = [{**item, "instruction": INSTRUCTIONS[2]} for item in fused]
        self._add(GME, "instructed", items, instruction=INSTRUCTIONS[2])
        for model, kind in ((MODEL, "texts"), (QWEN3, "texts")):  # only texts that fit without truncation
            self.pools[model, kind] = [item for item in self.pools[model, kind] if not item.dropped]

    def draw(self, rng: random.Random, model: str, kind: str, max_count: int = 16) -> list[Input]:
        """Draw 1 to `max_count` inputs from a pool, small numbers more often than large ones."""
        pool = self.pools[model, kind]
        return rng.choices(pool, k=rng.choice([n for n in (1, 1, 2, 2, 4, 8, 16) if n <= max_count]))

    def _add(self, model: str, kind: str, items: Sequence[Mapping[str, Any]], **keys: str) -> None:
        """Compute the expected results of items and add the inputs to a pool."""
        paths = {name: str(path) for name, (path, _) in self.image_files.items()}
        requests = [{**item, "images": [paths[name] for name in item.get("images", ())]} for item in items]
        results = self._reference.call(model=model, items=requests)["found"]
        pool = self.pools.setdefault((model, kind), [])
        for item, result in zip(items, results, strict=True):
            if result is not None:
                vector = np.array(result.pop("vector"))
                pool.append(
                    Input(vector, text=item.get("text", ""), images=tuple(item.get("images", ())), keys=keys, **result)
                )

    def count(self) -> dict[str, int]:
        """Return the size of each pool."""
        return {f"{model}, {kind}": len(pool) for (model, kind), pool in self.pools.items()}


def data_uri(file_bytes: bytes) -> str:
    """Encode a PNG or JPEG file as a data URI."""
    kind = "png" if file_bytes.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file_bytes).decode()}"


def _write_images(folder: Path) -> Iterator[tuple[str, tuple[Path, bytes]]]:
    """Write PNG and JPEG files of several sizes; yield the name, path and bytes of each."""
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        width, height = (int(side) for side in rng.integers(40, 200, 2))
        coarse = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        file_bytes = io.BytesIO()
        kind = ("PNG", "JPEG")[i % 2]
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file_bytes, kind)
        path = folder / f"{i}.{kind.lower()}"
        path.write_bytes(file_bytes.getvalue())
        yield path.name, (path, file_bytes.getvalue())
