"""Packed batches against transformers' flattening collator."""

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
    """Return ids [1,T], positions [1,T] and row boundaries as transformers packs them."""
    collate = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True)
    batch: dict[str, torch.Tensor] = collate([{"input_ids": row} for row in rows])
    return batch


@settings(deadline=None)
@given(ROWS, st.sampled_from(POOLINGS))
def test_batch_matches_transformers_flattening(rows: list[list[int]], pooling: str) -> None:
    batch, reference = pack(rows, pooling), flattened(rows)
    assert torch.equal(batch.ids.long(), reference["input_ids"][0])
    assert torch.equal(batch.positions.long(), reference["position_ids"])
    assert torch.equal(batch.packed.cu_seqlens, reference["cu_seq_lens_q"])
    assert batch.packed.lengths == tuple(map(len, rows))
    assert (batch.ids.dtype, batch.positions.dtype) == (torch.int32, torch.int32)
    boundaries = reference["cu_seq_lens_q"].tolist()
    first, last = boundaries[:-1], [end - 1 for end in boundaries[1:]]
    if pooling in ("cls", "last"):
        assert batch.pooled is not None
        assert batch.pooled.tolist() == (first if pooling == "cls" else last)
        assert batch.states.lengths == (1,) * len(rows)
    else:
        assert batch.pooled is None
        assert batch.states is batch.packed


def test_explicit_positions_are_packed() -> None:
    """Test positions on three axes, as in Qwen2-VL."""
    rows = [np.arange(5, dtype=np.int32), np.arange(2, dtype=np.int32)]
    positions = [np.arange(15).reshape(3, 5), np.arange(100, 106).reshape(3, 2)]
    batch = Layout.of(rows, "last", positions).to("cpu")
    assert batch.positions.tolist() == np.concatenate(positions, axis=1).tolist()


@settings(deadline=None)
@given(ROWS, st.sampled_from(POOLINGS), st.sampled_from([None, 1, 8]))
def test_batch_is_one_buffer_on_the_device(rows: list[list[int]], pooling: str, tile: int | None) -> None:
    """Check that every array starts at a multiple of 16 bytes, as Triton's kernels assume."""
    layout = Layout.of([np.array(row, dtype=np.int32) for row in rows], pooling, tile=tile)
    buffer = layout.buffer()
    batch = layout.view(buffer)
    tensors = [batch.ids, batch.positions, batch.packed.cu_seqlens]
    if tile is not None:
        tensors += [batch.packed.bounds, batch.packed.tiles(tile)]
    assert {x.untyped_storage().data_ptr() for x in tensors} == {buffer.untyped_storage().data_ptr()}
    assert not any(x.storage_offset() % 4 for x in tensors)
    assert all(
        torch.equal(x, torch.from_numpy(layout.arrays[name]))
        for x, name in zip(tensors, layout.arrays, strict=False)
        if name in ("ids", "positions", "cu_seqlens")
    )


@settings(deadline=None)
@given(ROWS, st.sampled_from(POOLINGS), st.integers(1, 40), st.integers(0, 50), st.integers(0, 5))
def test_padded_batch_has_a_layout_independent_of_its_rows(
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
    batch, plain = padded.view(padded.buffer()), layout.view(layout.buffer())
    assert torch.equal(batch.ids[: len(plain.ids)], plain.ids)
    assert torch.equal(batch.packed.cu_seqlens[: len(rows) + 1], plain.packed.cu_seqlens)
    assert set(batch.packed.cu_seqlens[len(rows) :].tolist()) == {len(plain.ids)}
    tiles = plain.packed.tiles(tile)
    assert torch.equal(batch.packed.tiles(tile)[: len(tiles)], tiles)
    assert not batch.packed.tiles(tile)[len(tiles) :].any()
    assert batch.packed.tokens == len(batch.ids) == tokens
    assert len(batch.states.lengths) == (count if pooling in ("cls", "last") else len(batch.packed.lengths))


def test_one_each_has_one_state_per_row() -> None:
    assert one_each(3, "cpu").cu_seqlens.tolist() == [0, 1, 2, 3]


def test_every_tensor_is_on_the_device() -> None:
    batch = pack([[1, 2], [3]], "last", "meta")
    assert batch.pooled is not None
    tensors = (batch.ids, batch.positions, batch.packed.cu_seqlens, batch.pooled, batch.states.cu_seqlens)
    assert {x.device.type for x in tensors} == {"meta"}


@pytest.mark.parametrize("rows", [[[]], [[1], [], [2]]])
def test_row_without_ids_is_rejected(rows: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        pack(rows)
