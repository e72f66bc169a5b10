"""Packed: where each sequence of a packed batch lies, against numpy, for any lengths."""

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
def test_offsets_are_the_running_sum_of_the_lengths(lengths: list[int]) -> None:
    packed = Packed.from_lengths(lengths)
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.cu_seqlens.numpy().tolist() == [0, *np.cumsum(lengths)]
    assert packed.lengths == tuple(lengths)
    assert packed.tokens == packed.cu_seqlens[-1]


@settings(deadline=None)
@given(LENGTHS)
def test_runs_lay_out_every_sequence_once_and_are_as_long_as_they_can_be(lengths: list[int]) -> None:
    packed = Packed.from_lengths(lengths)
    starts = [start + i * length for start, count, length in packed.runs for i in range(count)]
    assert starts == packed.cu_seqlens[:-1].tolist()
    assert [length for _, count, length in packed.runs for _ in range(count)] == lengths
    assert np.diff([length for _, _, length in packed.runs]).all()


@settings(deadline=None)
@given(LENGTHS)
def test_each_token_knows_where_its_sequence_starts_and_ends(lengths: list[int]) -> None:
    packed = Packed.from_lengths(lengths)
    spans = [span for span in np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1]) for _ in span]
    assert packed.bounds.tolist() == [[span[0] for span in spans], [span[-1] + 1 for span in spans]]
    assert bounds(lengths).dtype == np.int32


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 130))
def test_tiles_cover_each_token_once_and_see_all_its_keys(lengths: list[int], size: int) -> None:
    found = tiles(lengths, size)
    queries = np.concatenate([np.arange(first, last) for first, last, _, _ in found])
    assert sorted(queries) == list(range(sum(lengths)))
    starts, ends = bounds(lengths)
    for first, last, from_key, to_key in found:
        assert 1 <= last - first <= size
        assert (from_key, to_key) == (starts[first], ends[last - 1])
    widths = found[:, 3] - found[:, 2]
    assert (np.diff(widths) <= 0).all()


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 130))
def test_tiles_are_few(lengths: list[int], size: int) -> None:
    """Two neighbours that would fit into one tile are in one; a long sequence has no tile that it could do without."""
    found = sorted(tiles(lengths, size).tolist())
    starts = set(bounds(lengths)[0].tolist())
    for (first, _, from_key, to_key), (_, last, next_from, next_to) in pairwise(found):
        if from_key != next_from and first in starts and to_key - from_key <= size and next_to - next_from <= size:
            assert last - first > size
    assert len(found) <= 4 * sum(lengths) // size + 2
    assert tiles([1000], 64).shape == (16, 4)


@pytest.mark.parametrize("lengths", [[], [0], [3, 0, 2], [3, -1]])
def test_a_sequence_without_tokens_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        Packed.from_lengths(lengths)


def test_the_offsets_are_made_on_the_device_asked_for() -> None:
    assert Packed.from_lengths([2, 3], "meta").cu_seqlens.device.type == "meta"


def test_a_batch_in_flight_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Packed.from_lengths([2]).lengths = (3,)  # type: ignore[misc]
