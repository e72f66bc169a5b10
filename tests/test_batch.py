"""Rows packed end to end, against transformers' own flattening collator."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening

from triton_embed.python_backend.networks.batch import Batch, Layout, one_each

ROWS = st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=30), min_size=1, max_size=12)
POOLINGS = ("cls", "last", "mean", "max")


def pack(rows: list[list[int]], pooling: str = "mean", device: str = "cpu") -> Batch:
    return Layout.of([np.array(row, dtype=np.int32) for row in rows], pooling).to(device)


def flattened(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """ids [1,T], positions [1,T] and the boundaries of the rows, by transformers."""
    collate = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True)
    found: dict[str, torch.Tensor] = collate([{"input_ids": row} for row in rows])
    return found


@settings(deadline=None)
@given(ROWS, st.sampled_from(POOLINGS))
def test_rows_lie_as_transformers_flattens_them(rows: list[list[int]], pooling: str) -> None:
    found, theirs = pack(rows, pooling), flattened(rows)
    assert torch.equal(found.ids.long(), theirs["input_ids"][0])
    assert torch.equal(found.positions.long(), theirs["position_ids"])
    assert torch.equal(found.packed.cu_seqlens, theirs["cu_seq_lens_q"])
    assert found.packed.lengths == tuple(map(len, rows))
    assert (found.ids.dtype, found.positions.dtype) == (torch.int32, torch.int32)
    boundaries = theirs["cu_seq_lens_q"].tolist()
    first, last = boundaries[:-1], [end - 1 for end in boundaries[1:]]
    if pooling in ("cls", "last"):
        assert found.pooled is not None
        assert found.pooled.tolist() == (first if pooling == "cls" else last)
        assert found.states.lengths == (1,) * len(rows)
    else:
        assert found.pooled is None
        assert found.states is found.packed


def test_positions_of_ones_own() -> None:
    """Three axes, as Qwen2-VL counts them."""
    rows = [np.arange(5, dtype=np.int32), np.arange(2, dtype=np.int32)]
    placed = [np.arange(15).reshape(3, 5), np.arange(100, 106).reshape(3, 2)]
    found = Layout.of(rows, "last", placed).to("cpu")
    assert found.positions.tolist() == np.concatenate(placed, axis=1).tolist()


@settings(deadline=None)
@given(ROWS, st.sampled_from(POOLINGS), st.sampled_from([None, 1, 8]))
def test_a_batch_reaches_the_device_as_one_buffer(rows: list[list[int]], pooling: str, tile: int | None) -> None:
    """Every array of it starts at a multiple of 16 bytes, as Triton's kernels assume."""
    layout = Layout.of([np.array(row, dtype=np.int32) for row in rows], pooling, tile=tile)
    buffer = layout.buffer()
    found = layout.view(buffer)
    tensors = [found.ids, found.positions, found.packed.cu_seqlens]
    if tile is not None:
        tensors += [found.packed.bounds, found.packed.tiles(tile)]
    assert {x.untyped_storage().data_ptr() for x in tensors} == {buffer.untyped_storage().data_ptr()}
    assert not any(x.storage_offset() % 4 for x in tensors)
    assert all(
        torch.equal(x, torch.from_numpy(layout.arrays[name]))
        for x, name in zip(tensors, layout.arrays, strict=False)
        if name in ("ids", "positions", "cu_seqlens")
    )


@settings(deadline=None)
@given(ROWS, st.sampled_from(POOLINGS), st.integers(1, 40), st.integers(0, 50), st.integers(0, 5))
def test_a_padded_batch_has_sizes_that_its_rows_have_no_part_in(
    rows: list[list[int]], pooling: str, tile: int, more_tokens: int, more_rows: int
) -> None:
    ids = [np.array(row, dtype=np.int32) for row in rows]
    tokens, count = sum(map(len, rows)) + more_tokens + more_rows, len(rows) + more_rows
    other = [np.zeros(tokens - count + 1, dtype=np.int32), *[np.zeros(1, dtype=np.int32)] * (count - 1)]
    layout = Layout.of(ids, pooling, tile=tile)
    padded = layout.padded(tokens, count)
    again = Layout.of(other, pooling, tile=tile).padded(tokens, count)
    assert padded.offsets == again.offsets
    assert padded.lengths == again.lengths
    found, plain = padded.view(padded.buffer()), layout.view(layout.buffer())
    assert torch.equal(found.ids[: len(plain.ids)], plain.ids)
    assert torch.equal(found.packed.cu_seqlens[: len(rows) + 1], plain.packed.cu_seqlens)
    assert set(found.packed.cu_seqlens[len(rows) :].tolist()) == {len(plain.ids)}
    tiles = plain.packed.tiles(tile)
    assert torch.equal(found.packed.tiles(tile)[: len(tiles)], tiles)
    assert not found.packed.tiles(tile)[len(tiles) :].any()
    assert found.packed.tokens == len(found.ids) == tokens
    assert len(found.states.lengths) == (count if pooling in ("cls", "last") else len(found.packed.lengths))


def test_one_state_a_row() -> None:
    assert one_each(3, "cpu").cu_seqlens.tolist() == [0, 1, 2, 3]


def test_everything_the_network_reads_is_on_its_device() -> None:
    found = pack([[1, 2], [3]], "last", "meta")
    assert found.pooled is not None
    read = (found.ids, found.positions, found.packed.cu_seqlens, found.pooled, found.states.cu_seqlens)
    assert {x.device.type for x in read} == {"meta"}


@pytest.mark.parametrize("rows", [[[]], [[1], [], [2]]])
def test_a_row_without_ids_is_refused(rows: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        pack(rows)
