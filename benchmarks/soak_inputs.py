"""What the soak sends, each input with the vector that it must come back as, asked of `soak_expected` beforehand."""

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
from benchmarks.soak_models import GME, QUERY, QWEN3
from benchmarks.worker import Worker

Vector = npt.NDArray[np.float64]
PICTURES = 10
INSTRUCTIONS = (
    "Given a question, retrieve passages that answer it",
    "Identify the topic of the given text",
    "Find a picture that shows what the text says",
)


@dataclass(frozen=True)
class Input:
    """One input and what it must become: a unit vector, so many tokens computed, so many cut off."""

    vector: Vector  # [E]
    tokens: int
    dropped: int = 0
    text: str = ""
    ids: Sequence[int] = ()
    images: tuple[str, ...] = ()  # names of pictures
    keys: Mapping[str, str] = field(default_factory=dict)  # how it has to be prompted


class Inputs:
    """Pools of inputs by model and kind."""

    def __init__(self, reference: Worker, folder: Path, pools: Mapping[str, Sequence[str]]) -> None:
        self._reference = reference
        self.pictures = dict(_pictures(folder))
        mixed, short, long = pools["mixed"], pools["short"], pools["long"]
        longer = [" ".join(long[i : i + 2 + i % 3]) for i in range(0, 48, 2)]
        self.pools: dict[tuple[str, str], list[Input]] = {}
        for model in (MODEL, QWEN3):
            self._add(model, "texts", [{"text": text} for text in (*mixed, *short)])
            for fit in ("end", "start", "mean"):
                self._add(model, fit, [{"text": text, "fit": fit} for text in longer])
        for model, texts in ((QWEN3, mixed[:80]), (GME, short[:40])):
            for instruction in INSTRUCTIONS:
                some = [{"text": text, "instruction": instruction} for text in texts]
                self._add(model, "instructed", some, instruction=instruction)
        self._add(QWEN3, "queries", [{"text": text, "instruction": QUERY} for text in mixed[:80]], input_type="query")
        some = [{"text": text, "fit": "mean", "instruction": INSTRUCTIONS[0]} for text in longer]
        self._add(QWEN3, "instructed mean", some, instruction=INSTRUCTIONS[0])
        names = list(self.pictures)
        rng = random.Random(0)
        self._add(GME, "texts", [{"text": text} for text in short])
        self._add(GME, "pictures", [{"images": [name]} for name in names])
        fused = [{"images": [name], "text": rng.choice(short)} for name in names]
        several = [{"images": rng.sample(names, 1 + i % 3), "text": rng.choice(("", *short[:5]))} for i in range(10)]
        self._add(GME, "fused", fused + several)
        some = [{**item, "instruction": INSTRUCTIONS[2]} for item in fused]
        self._add(GME, "instructed", some, instruction=INSTRUCTIONS[2])
        for model, kind in ((MODEL, "texts"), (QWEN3, "texts")):  # neither cut nor averaged
            self.pools[model, kind] = [one for one in self.pools[model, kind] if not one.dropped]

    def draw(self, rng: random.Random, model: str, kind: str, most: int = 16) -> list[Input]:
        """One to `most` of a pool, few more often than many."""
        pool = self.pools[model, kind]
        return rng.choices(pool, k=rng.choice([n for n in (1, 1, 2, 2, 4, 8, 16) if n <= most]))

    def _add(self, model: str, kind: str, items: Sequence[Mapping[str, Any]], **keys: str) -> None:
        known = {name: str(path) for name, (path, _) in self.pictures.items()}
        asked = [{**item, "images": [known[name] for name in item.get("images", ())]} for item in items]
        found = self._reference.ask(model=model, items=asked)["found"]
        pool = self.pools.setdefault((model, kind), [])
        for item, one in zip(items, found, strict=True):
            if one is not None:
                vector = np.array(one.pop("vector"))
                pool.append(
                    Input(vector, text=item.get("text", ""), images=tuple(item.get("images", ())), keys=keys, **one)
                )

    def count(self) -> dict[str, int]:
        return {f"{model}, {kind}": len(pool) for (model, kind), pool in self.pools.items()}


def data_uri(stored: bytes) -> str:
    kind = "png" if stored.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stored).decode()}"


def _pictures(folder: Path) -> Iterator[tuple[str, tuple[Path, bytes]]]:
    """Name -> the file and its bytes; PNG and JPEG of several sizes and shapes."""
    rng = np.random.default_rng(0)
    for i in range(PICTURES):
        width, height = (int(side) for side in rng.integers(40, 200, 2))
        coarse = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        stored = io.BytesIO()
        kind = ("PNG", "JPEG")[i % 2]
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(stored, kind)
        path = folder / f"{i}.{kind.lower()}"
        path.write_bytes(stored.getvalue())
        yield path.name, (path, stored.getvalue())
