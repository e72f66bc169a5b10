"""Packed: offsets, runs, bounds and tiles of a packed batch against numpy, for any lengths."""

from dataclasses import FrozenInstanceError
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_embed.kernels.packed import Packed, bounds, tiles

LENGTHS = st.lists(st.integers(1, 300) | st.sampled_from([1, 7]), min_size=1, max_size=60)


@settings(deadline=None)
@given(LENGTHS)
def test_cu_seqlens_is_the_cumulative_sum_of_lengths(lengths: list[int]) -> None:
    packed = Packed.from_lengths(lengths)
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.cu_seqlens.numpy().tolist() == [0, *np.cumsum(lengths)]
    assert packed.lengths == tuple(lengths)
    assert packed.tokens == packed.cu_seqlens[-1]


@settings(deadline=None)
@given(LENGTHS)
def test_runs_cover_every_sequence_once_and_are_maximal(lengths: list[int]) -> None:
    packed = Packed.from_lengths(lengths)
    starts = [start + i * length for start, count, length in packed.runs for i in range(count)]
    assert starts == packed.cu_seqlens[:-1].tolist()
    assert [length for _, count, length in packed.runs for _ in range(count)] == lengths
    assert np.diff([length for _, _, length in packed.runs]).all()


@settings(deadline=None)
@given(LENGTHS)
def test_bounds_give_start_and_end_of_each_tokens_sequence(lengths: list[int]) -> None:
    packed = Packed.from_lengths(lengths)
    spans = [span for span in np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1]) for _ in span]
    assert packed.bounds.tolist() == [[span[0] for span in spans], [span[-1] + 1 for span in spans]]
    assert bounds(lengths).dtype == np.int32


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 130))
def test_tiles_cover_each_token_once_with_all_its_keys(lengths: list[int], size: int) -> None:
    rows = tiles(lengths, size)
    queries = np.concatenate([np.arange(first, last) for first, last, _, _ in rows])
    assert sorted(queries) == list(range(sum(lengths)))
    starts, ends = bounds(lengths)
    for first, last, from_key, to_key in rows:
        assert 1 <= last - first <= size
        assert (from_key, to_key) == (starts[first], ends[last - 1])
    widths = rows[:, 3] - rows[:, 2]
    assert (np.diff(widths) <= 0).all()


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 130))
def test_tile_count_is_minimal(lengths: list[int], size: int) -> None:
    """Check that neighbors which fit into one tile share it, and that a long sequence has no superfluous tile."""
    rows = sorted(tiles(lengths, size).tolist())
    starts = set(bounds(lengths)[0].tolist())
    for (first, _, from_key, to_key), (_, last, next_from, next_to) in pairwise(rows):
        if from_key != next_from and first in starts and to_key - from_key <= size and next_to - next_from <= size:
            assert last - first > size
    assert len(rows) <= 4 * sum(lengths) // size + 2
    assert tiles([1000], 64).shape == (16, 4)


@pytest.mark.parametrize("lengths", [[], [0], [3, 0, 2], [3, -1]])
def test_sequence_without_tokens_is_rejected(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        Packed.from_lengths(lengths)


def test_cu_seqlens_is_created_on_the_requested_device() -> None:
    assert Packed.from_lengths([2, 3], "meta").cu_seqlens.device.type == "meta"


def test_packed_is_immutable() -> None:
    with pytest.raises(FrozenInstanceError):
        Packed.from_lengths([2]).lengths = (3,)  # type: ignore[misc]
