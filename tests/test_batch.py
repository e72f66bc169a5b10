"""Rows packed end to end, against transformers' own flattening collator."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening

from triton_embed.python_backend.batch import Batch

ROWS = st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=30), min_size=1, max_size=12)


def pack(rows: list[list[int]], device: str = "cpu") -> Batch:
    return Batch.pack([np.array(row, dtype=np.int32) for row in rows], range(1, len(rows) + 1), device)


@settings(deadline=None)
@given(ROWS)
def test_rows_lie_as_transformers_flattens_them(rows: list[list[int]]) -> None:
    found = pack(rows)
    collate = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True)
    theirs = collate([{"input_ids": row} for row in rows])
    assert torch.equal(found.ids, theirs["input_ids"][0])
    assert torch.equal(found.positions, theirs["position_ids"][0])
    assert torch.equal(found.packed.cu_seqlens, theirs["cu_seq_lens_q"])
    assert found.packed.lengths == tuple(map(len, rows))
    assert found.dims == tuple(range(1, len(rows) + 1))
    assert (found.ids.dtype, found.positions.dtype) == (torch.int64, torch.int64)


def test_everything_the_network_reads_is_on_its_device() -> None:
    found = pack([[1, 2], [3]], "meta")
    assert {x.device.type for x in (found.ids, found.positions, found.packed.cu_seqlens)} == {"meta"}


@pytest.mark.parametrize("rows", [[[]], [[1], [], [2]]])
def test_a_row_without_ids_is_refused(rows: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        pack(rows)
