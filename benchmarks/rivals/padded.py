"""An engine that takes padded batches, at its best: texts sorted by length and padded by a few at a time.

How many tokens a batch should have depends on engine, machine and workload, so each is tried and the best kept.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from benchmarks.calls import Encode, Pools
from benchmarks.worker import Vectors

BUDGETS = (256, 512, 1024, 2048, 4096)  # tokens of a batch, padding included; at least one text
TRIED = 4096  # tokens of the texts that budgets are tried on, about
BLOCK = 128  # texts, which is a whole mix of lengths

Integers = npt.NDArray[np.int64]


class Batch(NamedTuple):
    rows: list[int]  # which of the texts
    ids: Integers  # [rows, tokens]
    mask: Integers  # [rows, tokens]: 1 for a token, 0 for padding


# Runs batches and hands the states [rows, tokens, dimensions] of each to the second argument, in any order.
Infer = Callable[[Iterable[Batch], Callable[[Batch, Vectors], None]], None]


class Texts:
    def __init__(self, tokenizer: Path, most_tokens: int) -> None:
        self.tokenizer = Tokenizer.from_file(str(tokenizer))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(most_tokens)

    def batches(self, texts: list[str], budget: int) -> Iterator[Batch]:
        encoded = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts)]
        rows: list[int] = []
        for row in sorted(range(len(encoded)), key=lambda row: len(encoded[row])):
            if rows and (len(rows) + 1) * len(encoded[row]) > budget:
                yield _padded(rows, encoded)
                rows = []
            rows.append(row)
        if rows:
            yield _padded(rows, encoded)


def _padded(rows: list[int], encoded: list[list[int]]) -> Batch:
    ids = np.zeros((len(rows), max(len(encoded[row]) for row in rows)), np.int64)
    mask = np.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(encoded[row])] = encoded[row]
        mask[place, : len(encoded[row])] = 1
    return Batch(rows, ids, mask)


def feed(batch: Batch) -> dict[str, Integers]:
    """A batch under the names that the exported network has."""
    return {"input_ids": batch.ids, "attention_mask": batch.mask, "token_type_ids": np.zeros_like(batch.ids)}


class Padded:
    """Ways to run batches by name, the first of them the one for a single text; see `benchmarks.calls.Engine`."""

    def __init__(self, texts: Texts, ways: dict[str, Infer], pools: Pools) -> None:
        self.texts, self.ways, self.pools = texts, ways, pools
        self.best: dict[str, tuple[Encode, str]] = {}

    def __call__(self, workload: str, inputs: int) -> tuple[Encode, str]:
        if inputs == 1:
            name = next(iter(self.ways))
            return self.encode(name, BUDGETS[0]), name
        if workload not in self.best:
            self.best[workload] = self._best(self.pools[workload])
        return self.best[workload]

    def encode(self, way: str, budget: int) -> Encode:
        def encode(texts: list[str]) -> Vectors:
            found: dict[int, Vectors] = {}

            def take(batch: Batch, states: Vectors) -> None:
                sums = np.matmul(batch.mask[:, None].astype(np.float32), states)[:, 0]
                vectors = sums / np.linalg.norm(sums, axis=1, keepdims=True)  # sums, for the length cancels out
                found.update(zip(batch.rows, vectors, strict=True))

            self.ways[way](self.texts.batches(texts, budget), take)
            return np.stack([found[row] for row in range(len(texts))])

        return encode

    def _best(self, pool: list[str]) -> tuple[Encode, str]:
        """First the best budget of the first way, then the best way with it."""
        few = self._sample(pool)
        first = next(iter(self.ways))
        _, budget = min((self._seconds(first, budget, few), budget) for budget in BUDGETS)
        way = min(self.ways, key=lambda way: self._seconds(way, budget, few))
        return self.encode(way, budget), f"{way}, {budget} tokens a batch"

    def _sample(self, pool: list[str]) -> list[str]:
        """Texts of `TRIED` tokens or more, a whole number of which make a block."""
        block = pool[:BLOCK]
        tokens = sum(len(encoding.ids) for encoding in self.texts.tokenizer.encode_batch_fast(block))
        return block[: max(1, BLOCK * TRIED // tokens)]

    def _seconds(self, way: str, budget: int, texts: list[str]) -> float:
        """Of the second call: engines compile for a shape when they meet it."""
        encode = self.encode(way, budget)
        encode(texts)
        begin = time.perf_counter()
        encode(texts)
        return time.perf_counter() - begin
