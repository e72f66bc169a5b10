"""Graphs: small batches recorded once for each size and replayed as one launch.

Below about 2,000 tokens a GPU ends a kernel sooner than Python starts the next one. A CUDA graph starts them all, but
does exactly what was recorded: on the same addresses, with the same grids. So batches are padded to a few sizes, and
what differs between two of a size is in the one buffer that is copied in before.
"""

import logging
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from triton_embed.kernels.packed import Packed
from triton_embed.python_backend.batch import Batch, Layout
from triton_embed.python_backend.row import Row

log = logging.getLogger(__name__)

TOKENS = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048)
ROWS = (1, 8, 64, 512)

Forward = Callable[[Sequence[Row]], tuple[Tensor, Packed]]


class RecordableNetwork(Protocol):
    """A network whose forward pass over texts is `compute` of what `lay_out` lays out, one state a row."""

    def lay_out(self, rows: Sequence[Row]) -> Layout: ...
    def compute(self, batch: Batch) -> Tensor: ...


def size_of(tokens: int, rows: int) -> tuple[int, int] | None:
    """The recorded size (tokens, rows) that a batch is padded to; None: it is too large for any."""
    of_rows = next((size for size in ROWS if size >= rows), None)
    # Every row of a size has a token, those that are nobody's included.
    of_tokens = next((size for size in TOKENS if size >= tokens and of_rows is not None and size >= of_rows), None)
    return None if of_rows is None or of_tokens is None else (of_tokens, of_rows)


class Recording:
    """One size: the buffer its batches are copied into, and the states that a replay leaves."""

    def __init__(self, network: RecordableNetwork, layout: Layout, device: str, pool: Any) -> None:
        self._buffer = layout.buffer().to(device)
        self._batch = batch = layout.view(self._buffer)
        # On a stream of its own, as torch asks for: libraries set themselves up and kernels are compiled.
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            network.compute(batch)
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._states = network.compute(batch)

    def replay(self, padded: Layout, lengths: Sequence[int]) -> tuple[Tensor, Packed]:
        """The states of a batch of this size, of rows of these lengths; the next replay overwrites them."""
        self._buffer.copy_(padded.buffer().pin_memory(), non_blocking=True)
        self._graph.replay()
        rows = len(lengths)
        states = Packed(
            self._batch.states.cu_seqlens[: rows + 1], tuple(lengths) if self._batch.pooled is None else (1,) * rows
        )
        return self._states[: states.tokens], states


class Graphs:
    """A network's forward: small batches of texts by a recording, all others by `otherwise`.

    Every size is recorded at once: a request must not wait for one.
    """

    def __init__(self, network: RecordableNetwork, otherwise: Forward, device: str) -> None:
        self._network, self._otherwise = network, otherwise
        self._recordings: dict[tuple[int, int], Recording] = {}
        pool = torch.cuda.graph_pool_handle()
        sizes = [size for size in product(TOKENS, ROWS) if size == size_of(*size)]
        one = network.lay_out([Row(np.zeros(1, dtype=np.int32))])
        # The largest first: smaller ones then live in the memory it took.
        for done, size in enumerate(reversed(sizes), start=1):
            self._recordings[size] = Recording(network, one.padded(*size), device, pool)
            if done % 10 == 0 or done == len(sizes):
                log.info("recorded %d of %d sizes of small batches", done, len(sizes))

    def __call__(self, rows: Sequence[Row]) -> tuple[Tensor, Packed]:
        size = size_of(sum(len(row.ids) for row in rows), len(rows))
        if size is None or any(row.pictures for row in rows):
            return self._otherwise(rows)
        layout = self._network.lay_out(rows)
        return self._recordings[size].replay(layout.padded(*size), layout.lengths)
