"""CUDA graphs without a GPU: a replay is simulated by computing the recorded batch again.

This tests that a batch is padded, copied into its buffer and read back correctly. On a GPU, a server compares replays
with uncaptured passes before it starts.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_networks import Family, family  # noqa: F401 - the latter is a fixture
from torch import Tensor

from triton_embed.python_backend.execution import cuda_graphs as graphs
from triton_embed.python_backend.execution.cuda_graphs import CudaGraphs, size_of
from triton_embed.python_backend.execution.embedder import Embedder
from triton_embed.python_backend.networks.batch import Batch, Layout


@given(st.integers(1, 5000), st.integers(1, 700))
def test_batch_is_padded_to_the_smallest_fitting_size(tokens: int, rows: int) -> None:
    size = size_of(tokens, rows)
    fitting = [(t, r) for t in graphs.TOKENS for r in graphs.ROWS if t >= max(tokens, r) and r >= rows]
    if size is None:
        assert not fitting
        return
    assert size in fitting
    assert size[1] == min(r for _, r in fitting)
    assert size[0] == min(t for t, r in fitting if r == size[1])


class Recorder:
    """A fake for CUDA graphs: `replay` repeats the computation that was recorded."""

    def __init__(self, embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
        self._compute = embedder._network.compute
        self._recording: Recorded | None = None
        self.replays = 0
        self.computed = 0
        monkeypatch.setattr(embedder._network, "compute", self.compute)
        for name, fake in {
            "Stream": lambda _: self,
            "current_stream": lambda _: self,
            "stream": lambda _: self.no_op(),
            "graph_pool_handle": lambda: None,
            "CUDAGraph": lambda: Recorded(self),
            "graph": self.record,
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)

    def wait_stream(self, _: object) -> None:
        """Wait for nothing, because nothing runs concurrently here."""

    @contextmanager
    def no_op(self) -> Iterator[None]:
        yield

    @contextmanager
    def record(self, graph: "Recorded", pool: None, stream: "Recorder") -> Iterator[None]:
        self._recording = graph
        yield
        self._recording = None

    def compute(self, batch: Batch, *prefix: None) -> Tensor:
        states = self._compute(batch)
        self.computed += 1
        if self._recording is not None:
            self._recording.batch, self._recording.states = batch, states
        return states


class Recorded:
    batch: Batch
    states: Tensor

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def replay(self) -> None:
        self._recorder.replays += 1
        self.states.copy_(self._recorder._compute(self.batch))


@pytest.mark.parametrize("family", ["bge-mean", "qwen3_embedding", "clip"], indirect=True)
def test_replayed_batch_gives_the_vectors_of_transformers(
    family: Family,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    embedder, rows, vectors = family.embedder, family.rows, family.vectors
    recorder = Recorder(embedder, monkeypatch)
    monkeypatch.setattr(graphs, "TOKENS", (8, 32, 64))
    monkeypatch.setattr(graphs, "ROWS", (1, 5))
    with torch.inference_mode():
        forward = CudaGraphs(embedder._network, embedder._network, "cpu", max_tokens=32)
        recorded = recorder.computed
        texts = [i for i, row in enumerate(rows) if not row.images]
        for selected in (texts[::-1], texts[1:2], texts[:2], texts):
            result = embedder._embed(
                forward, embedder._head, [rows[i] for i in selected], [vectors.shape[1]] * len(selected)
            )
            assert np.abs(result - vectors[selected]).max() < 2e-6
        assert (recorder.replays, recorder.computed) == (4, recorded)
        image_rows = [i for i, row in enumerate(rows) if row.images]
        large_batch = [rows[2]] * 4
        for batch, expected in ((large_batch, vectors[[2] * 4]), ([rows[i] for i in image_rows], vectors[image_rows])):
            if batch:
                result = embedder._embed(forward, embedder._head, batch, [vectors.shape[1]] * len(batch))
                assert np.abs(result - expected).max() < 2e-6
    assert recorder.replays == 4


@pytest.mark.parametrize(
    ("linears", "weights", "largest"),
    [
        (96, 302_000_000, 2_048),  # bge-large
        (112, 440_401_920, 2_048),  # Qwen3-0.6B
        (112, 1_310_195_712, 768),  # gte-Qwen2-1.5B
        (128, 6_979_321_856, 256),  # e5-mistral-7b
    ],
)
def test_recorded_sizes_take_less_time_than_their_launches(linears: int, weights: int, largest: int) -> None:
    """Compare with the sizes below which an H200 is faster than its host (790 TFLOP/s in a large product)."""
    tokens = graphs.graph_tokens(linears, weights, 790e12)
    assert max(size for size in graphs.TOKENS if size <= tokens) == largest


def test_padding_rows_have_no_tokens_and_no_tiles() -> None:
    """Check that padding rows have no tokens and no attention tiles, so stale memory reaches no vector."""
    layout = Layout.of([np.arange(3, dtype=np.int32), np.arange(2, dtype=np.int32)], "last", tile=4)
    padded = layout.padded(16, 8)
    packed = padded.view(padded.buffer()).packed
    assert packed.cu_seqlens.diff().tolist() == [3, 2, *[0] * 6]
    tiles = packed.tiles(4)
    assert int((tiles[:, 1] - tiles[:, 0]).sum()) == 5
