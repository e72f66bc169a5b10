"""Engines that need padded batches, tuned for throughput: texts are sorted by length and padded in small batches.

The best number of tokens per batch depends on engine, machine and workload, so all candidates are measured.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from benchmarks.cpu.calls import Encode, Pools
from benchmarks.worker import Vectors

BUDGETS = (256, 512, 1024, 2048, 4096)  # tokens per batch including padding; a batch holds at least one text
TUNING_TOKENS = 4096  # approximate tokens of the texts used to select a budget
BLOCK = 128  # texts with the complete mix of lengths of a workload

Integers = npt.NDArray[np.int64]


class Batch(NamedTuple):
    """A padded batch."""

    rows: list[int]  # indices of the texts
    ids: Integers  # [rows, tokens]
    mask: Integers  # [rows, tokens]: 1 for a token, 0 for padding


# Runs batches and passes the states [rows, tokens, dimensions] of each to the second argument, in any order.
Infer = Callable[[Iterable[Batch], Callable[[Batch, Vectors], None]], None]


class Texts:
    """Tokenizes texts and groups them into padded batches."""

    def __init__(self, tokenizer: Path, max_tokens: int) -> None:
        self.tokenizer = Tokenizer.from_file(str(tokenizer))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_tokens)

    def batches(self, texts: list[str], budget: int) -> Iterator[Batch]:
        """Yield batches of at most `budget` tokens including padding, shortest texts first."""
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
    for index, row in enumerate(rows):
        ids[index, : len(encoded[row])] = encoded[row]
        mask[index, : len(encoded[row])] = 1
    return Batch(rows, ids, mask)


def feed(batch: Batch) -> dict[str, Integers]:
    """Return the inputs of the exported network by name."""
    return {"input_ids": batch.ids, "attention_mask": batch.mask, "token_type_ids": np.zeros_like(batch.ids)}


class Padded:
    """Selects execution mode and token budget (a `benchmarks.cpu.calls.SelectEncode`).

    `modes`: functions that run batches, by name. The first one is used for single texts.
    """

    def __init__(self, texts: Texts, modes: dict[str, Infer], pools: Pools) -> None:
        self.texts, self.modes, self.pools = texts, modes, pools
        self.best: dict[str, tuple[Encode, str]] = {}

    def __call__(self, workload: str, inputs: int) -> tuple[Encode, str]:
        if inputs == 1:
            name = next(iter(self.modes))
            return self.encode(name, BUDGETS[0]), name
        if workload not in self.best:
            self.best[workload] = self._select(self.pools[workload])
        return self.best[workload]

    def encode(self, mode: str, budget: int) -> Encode:
        """Return the function that embeds texts in a mode with a token budget."""

        def encode(texts: list[str]) -> Vectors:
            vectors_by_row: dict[int, Vectors] = {}

            def deliver(batch: Batch, states: Vectors) -> None:
                sums = np.matmul(batch.mask[:, None].astype(np.float32), states)[:, 0]
                vectors = sums / np.linalg.norm(
                    sums, axis=1, keepdims=True
                )  # sums suffice: normalization cancels the length
                vectors_by_row.update(zip(batch.rows, vectors, strict=True))

            self.modes[mode](self.texts.batches(texts, budget), deliver)
            return np.stack([vectors_by_row[row] for row in range(len(texts))])

        return encode

    def _select(self, pool: list[str]) -> tuple[Encode, str]:
        """Select the fastest budget in the first mode, then the fastest mode with that budget."""
        texts = self._tuning_texts(pool)
        first = next(iter(self.modes))
        _, budget = min((self._seconds(first, budget, texts), budget) for budget in BUDGETS)
        mode = min(self.modes, key=lambda mode: self._seconds(mode, budget, texts))
        return self.encode(mode, budget), f"{mode}, {budget} tokens per batch"

    def _tuning_texts(self, pool: list[str]) -> list[str]:
        """Return the first texts of a block with about TUNING_TOKENS tokens in total."""
        block = pool[:BLOCK]
        tokens = sum(len(encoding.ids) for encoding in self.texts.tokenizer.encode_batch_fast(block))
        return block[: max(1, BLOCK * TUNING_TOKENS // tokens)]

    def _seconds(self, mode: str, budget: int, texts: list[str]) -> float:
        """Measure the second call: engines compile for a new shape in the first."""
        encode = self.encode(mode, budget)
        encode(texts)
        begin = time.perf_counter()
        encode(texts)
        return time.perf_counter() - begin
