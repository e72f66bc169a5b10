"""CUDA graphs: small batches are recorded once per size and replayed as one launch.

Below about 2,000 tokens a GPU finishes a kernel sooner than Python launches the next one. A CUDA graph launches all of
them, but repeats exactly what was recorded: the same addresses and grids. Batches are therefore padded to a few sizes,
and everything that differs between batches of one size is in one buffer, which is filled before each replay.
"""

import logging
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from triton_embed.kernels.packed import Packed
from triton_embed.python_backend.execution.budget import GPU_UTILIZATION
from triton_embed.python_backend.inputs.row import Row
from triton_embed.python_backend.networks.batch import Batch, Layout

log = logging.getLogger(__name__)

# Recorded sizes: every combination in which each row can have a token
TOKENS = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048)
ROWS = (1, 8, 64, 512)

# Seconds that Python takes to launch a linear layer and its share of the other kernels: a quarter of the 150 us of a
# layer that were measured without a driver. Up to LEAST_TOKENS a GPU waits for the weights, not for products.
LAUNCH_SECONDS = 40e-6
LEAST_TOKENS = 256

Forward = Callable[[Sequence[Row]], tuple[Tensor, Packed]]


class RecordableNetwork(Protocol):
    """A network whose forward pass over texts is `compute(lay_out(rows))`."""

    def lay_out(self, rows: Sequence[Row]) -> Layout: ...
    def compute(self, batch: Batch) -> Tensor: ...


def graph_tokens(linears: int, weights: int, flops: float) -> int:
    """Return the tokens up to which a GPU computes faster than Python launches.

    Args:
        linears: The linear layers of the network.
        weights: Their weights.
        flops: Floating-point operations per second of a large product.
    """
    return max(LEAST_TOKENS, int(LAUNCH_SECONDS * linears * GPU_UTILIZATION * flops / (2 * weights)))


def size_of(tokens: int, rows: int) -> tuple[int, int] | None:
    """Return the recorded size (tokens, rows) that a batch is padded to, or None if it is too large."""
    padded_rows = next((size for size in ROWS if size >= rows), None)
    # Every row has at least one token, padding rows included.
    padded_tokens = next(
        (size for size in TOKENS if size >= tokens and padded_rows is not None and size >= padded_rows), None
    )
    return None if padded_rows is None or padded_tokens is None else (padded_tokens, padded_rows)


class Recording:
    """The CUDA graph of one size, with its input buffer and its output states."""

    def __init__(self, network: RecordableNetwork, layout: Layout, device: str, pool: Any, stream: Any) -> None:
        self._buffer = layout.buffer().to(device)
        self._batch = batch = layout.view(self._buffer)
        # A first run on a separate stream, as torch requires: it initializes libraries and compiles kernels. It is the
        # same for all recordings, because cuBLAS keeps 32 MiB of memory for each stream.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            network.compute(batch)
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, stream=stream):
            self._states = network.compute(batch)

    def replay(self, padded: Layout, lengths: Sequence[int]) -> tuple[Tensor, Packed]:
        """Return the hidden states of a batch padded to this size. The next replay overwrites them.

        Args:
            lengths: The lengths of the rows without padding.
        """
        self._buffer.copy_(padded.buffer().pin_memory(), non_blocking=True)
        self._graph.replay()
        rows = len(lengths)
        states = Packed(
            self._batch.states.cu_seqlens[: rows + 1], tuple(lengths) if self._batch.pooled is None else (1,) * rows
        )
        return self._states[: states.tokens], states


class CudaGraphs:
    """A network's forward pass that replays small batches of texts, and calls `fallback` for all others.

    Every size is recorded at load, so that no request waits for a recording.

    Args:
        max_tokens: The largest size. A larger batch takes longer on the device than its launches take here, and padding
            would cost more than a recording saves.
    """

    def __init__(self, network: RecordableNetwork, fallback: Forward, device: str, max_tokens: int) -> None:
        self._network, self._fallback = network, fallback
        self._recordings: dict[tuple[int, int], Recording] = {}
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        sizes = [size for size in product(TOKENS, ROWS) if size == size_of(*size) and size[0] <= max_tokens]
        layout = network.lay_out([Row(np.zeros(1, dtype=np.int32))])
        # The largest first, so that smaller ones reuse its memory.
        for done, size in enumerate(reversed(sizes), start=1):
            self._recordings[size] = Recording(network, layout.padded(*size), device, pool, stream)
            if done % 10 == 0 or done == len(sizes):
                log.info("Recorded %d of %d batch sizes", done, len(sizes))

    def __call__(self, rows: Sequence[Row]) -> tuple[Tensor, Packed]:
        size = size_of(sum(len(row.ids) for row in rows), len(rows))
        if size not in self._recordings or any(row.images for row in rows):
            return self._fallback(rows)
        layout = self._network.lay_out(rows)
        return self._recordings[size].replay(layout.padded(*size), layout.lengths)
