"""Packed: where each sequence of a packed batch lies, against numpy, for any lengths."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_embed.kernels.packed import Packed

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


@pytest.mark.parametrize("lengths", [[], [0], [3, 0, 2], [3, -1]])
def test_a_sequence_without_tokens_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        Packed.from_lengths(lengths)


def test_the_offsets_are_made_on_the_device_asked_for() -> None:
    assert Packed.from_lengths([2, 3], "meta").cu_seqlens.device.type == "meta"


def test_a_batch_in_flight_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Packed.from_lengths([2]).lengths = (3,)  # type: ignore[misc]
