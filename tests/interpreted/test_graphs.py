"""Recorded passes without a GPU to record them: what is replayed is computed anew, from the recorded batch alone.

So a batch that is padded, copied into a buffer and read out of it again is proved here; that CUDA replays what it
recorded is left to a GPU, where a server compares the two before it starts.
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

from triton_embed.python_backend import graphs
from triton_embed.python_backend.batch import Batch, Layout
from triton_embed.python_backend.embedder import Embedder
from triton_embed.python_backend.graphs import Graphs, size_of


@given(st.integers(1, 5000), st.integers(1, 700))
def test_a_batch_is_padded_to_the_smallest_size_that_holds_it(tokens: int, rows: int) -> None:
    size = size_of(tokens, rows)
    fitting = [(t, r) for t in graphs.TOKENS for r in graphs.ROWS if t >= max(tokens, r) and r >= rows]
    if size is None:
        assert not fitting
        return
    assert size in fitting
    assert size[1] == min(r for _, r in fitting)
    assert size[0] == min(t for t, r in fitting if r == size[1])


class Recorder:
    """Stands for CUDA's graphs: `replay` computes again what was computed while it was being recorded."""

    def __init__(self, ours: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
        self._compute = ours._network.compute
        self._recording: Recorded | None = None
        self.replays = 0
        self.computed = 0
        monkeypatch.setattr(ours._network, "compute", self.compute)
        for name, stand_in in {
            "Stream": lambda _: self,
            "current_stream": lambda _: self,
            "stream": lambda _: self.nothing(),
            "graph_pool_handle": lambda: None,
            "CUDAGraph": lambda: Recorded(self),
            "graph": self.record,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)

    def wait_stream(self, _: object) -> None:
        """Nothing runs beside anything here."""

    @contextmanager
    def nothing(self) -> Iterator[None]:
        yield

    @contextmanager
    def record(self, graph: "Recorded", pool: None) -> Iterator[None]:
        self._recording = graph
        yield
        self._recording = None

    def compute(self, given: Batch, *prefix: None) -> Tensor:
        states = self._compute(given)
        self.computed += 1
        if self._recording is not None:
            self._recording.batch, self._recording.states = given, states
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
def test_a_replayed_batch_gives_transformers_vectors(
    family: Family,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, rows, wanted = family.ours, family.rows, family.vectors
    recorder = Recorder(ours, monkeypatch)
    monkeypatch.setattr(graphs, "TOKENS", (16, 48))
    monkeypatch.setattr(graphs, "ROWS", (1, 16))
    with torch.inference_mode():
        forward = Graphs(ours._network, ours._network, "cpu")
        recorded = recorder.computed
        texts = [i for i, row in enumerate(rows) if not row.pictures]
        for chosen in (texts, texts[1:2], texts[:2], texts[::-1], texts):
            found = ours._embed(forward, [rows[i] for i in chosen], [wanted.shape[1]] * len(chosen))
            assert np.abs(found - wanted[chosen]).max() < 2e-6
        assert (recorder.replays, recorder.computed) == (5, recorded)
        pictured = [i for i, row in enumerate(rows) if row.pictures]
        large = [rows[2]] * 4
        for other, expected in ((large, wanted[[2] * 4]), ([rows[i] for i in pictured], wanted[pictured])):
            if other:
                found = ours._embed(forward, other, [wanted.shape[1]] * len(other))
                assert np.abs(found - expected).max() < 2e-6
    assert recorder.replays == 5


def test_rows_of_a_padded_batch_that_are_nobodys_are_left_alone() -> None:
    """They have no tokens, and so no attention: whatever memory held before must reach no vector."""
    layout = Layout.of([np.arange(3, dtype=np.int32), np.arange(2, dtype=np.int32)], "last", tile=4)
    padded = layout.padded(16, 8)
    packed = padded.view(padded.buffer()).packed
    assert packed.cu_seqlens.diff().tolist() == [3, 2, *[0] * 6]
    tiles = packed.tiles(4)
    assert int((tiles[:, 1] - tiles[:, 0]).sum()) == 5
