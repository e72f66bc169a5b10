"""Rows packed end to end, against transformers' own flattening collator."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening

from triton_embed.python_backend.batch import Batch, Layout, filler_count, one_each

ROWS = st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=30), min_size=1, max_size=12)
POOLINGS = ("cls", "last", "mean", "max")


def pack(rows: list[list[int]], pooling: str = "mean", device: str = "cpu") -> Batch:
    return Layout.of([np.array(row, dtype=np.int32) for row in rows], pooling, device).to(device)


def flattened(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """ids [1,T], positions [1,T] and the boundaries of the rows, by transformers."""
    collate = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True)
    found: dict[str, torch.Tensor] = collate([{"input_ids": row} for row in rows])
    return found


@settings(deadline=None)
@given(ROWS, st.sampled_from(POOLINGS))
def test_rows_lie_as_transformers_flattens_them(rows: list[list[int]], pooling: str) -> None:
    found, theirs = pack(rows, pooling), flattened(rows)
    tokens = theirs["input_ids"].shape[1]
    assert torch.equal(found.ids[:tokens].long(), theirs["input_ids"][0])
    assert torch.equal(found.positions[:, :tokens].long(), theirs["position_ids"])
    assert torch.equal(found.packed.cu_seqlens[: len(rows) + 1], theirs["cu_seq_lens_q"])
    assert found.packed.lengths[: len(rows)] == tuple(map(len, rows))
    assert (found.ids.dtype, found.positions.dtype) == (torch.int32, torch.int32)
    boundaries = theirs["cu_seq_lens_q"].tolist()
    first, last = boundaries[:-1], [end - 1 for end in boundaries[1:]]
    if pooling in ("cls", "last"):
        assert found.pooled is not None
        assert found.pooled[: len(rows)].tolist() == (first if pooling == "cls" else last)
        assert set(found.states.lengths) == {1}
        assert len(found.states.lengths) == len(found.pooled)
    else:
        assert found.pooled is None
        assert found.states is found.packed


@settings(deadline=None)
@given(ROWS)
def test_what_is_added_for_the_cpu_is_rows_of_one_known_token_behind_the_others(rows: list[list[int]]) -> None:
    found, tokens = pack(rows), sum(map(len, rows))
    added = found.packed.lengths[len(rows) :]
    assert set(added) <= {1}
    assert len(found.ids) == found.positions.shape[1] == tokens + len(added)
    assert not found.ids[tokens:].any()
    assert not found.positions[:, tokens:].any()
    assert len(found.ids) % 4 == 0
    assert found.packed.fillers == len(added)


def test_a_gpu_gets_nothing_added() -> None:
    assert pack([[1, 2], [3]], device="meta").packed.lengths == (2, 1)


def test_batches_have_few_sizes() -> None:
    """4, 8, … 32, then four an octave, and eight from 512 on."""
    added = [filler_count(tokens) for tokens in range(1, 16_385)]
    sizes = sorted({tokens + more for tokens, more in enumerate(added, start=1)})
    assert all(0 <= more <= max(3, tokens / (4 if tokens < 512 else 8)) for tokens, more in enumerate(added, start=1))
    assert len(sizes) == 8 + 4 * 4 + 8 * 5
    assert all(after / before <= (5 / 4 if before < 512 else 9 / 8) for before, after in pairwise(sizes[7:]))


def test_positions_of_ones_own() -> None:
    """Three axes, as Qwen2-VL counts them."""
    rows = [np.arange(5, dtype=np.int32), np.arange(2, dtype=np.int32)]
    placed = [np.arange(15).reshape(3, 5), np.arange(100, 106).reshape(3, 2)]
    found = Layout.of(rows, "last", "cpu", placed).to("cpu")
    assert found.positions[:, :7].tolist() == np.concatenate(placed, axis=1).tolist()
    assert found.positions.shape == (3, 8)
    assert not found.positions[:, 7:].any()


@settings(deadline=None)
@given(ROWS, st.sampled_from(POOLINGS), st.sampled_from([None, 1, 8]))
def test_a_batch_reaches_the_device_as_one_buffer(rows: list[list[int]], pooling: str, tile: int | None) -> None:
    """Every array of it starts at a multiple of 16 bytes, as Triton's kernels assume."""
    layout = Layout.of([np.array(row, dtype=np.int32) for row in rows], pooling, "cuda", tile=tile)
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
    layout = Layout.of(ids, pooling, "cuda", tile=tile)
    padded = layout.padded(tokens, count)
    again = Layout.of(other, pooling, "cuda", tile=tile).padded(tokens, count)
    assert padded.places == again.places
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
