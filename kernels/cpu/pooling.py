"""Pooling on a CPU, as a compiled loop over sequences."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from triton_embed.kernels.cpu.loops import (
    Address,
    add,
    loop,
    padded_count,
    pointer,
    read,
    scratch,
    thread_index,
    thread_range,
    write,
)
from triton_embed.kernels.cpu.simd import LANES, keep_first, load, maximum, reduce_sum, splat, store
from triton_embed.kernels.packed import Packed

_CLS, _LAST, _MEAN, _MAX = range(4)
_MODES = {"cls": _CLS, "last": _LAST, "mean": _MEAN, "max": _MAX}


@loop
def _pool(
    x: Address,
    itemsize: int,
    stride: int,
    cu_seqlens: Address,
    dims: Address,
    y: Address,
    count: int,
    width: int,
    mode: int,
    l2: int,
    memory: Address,
    padded_width: int,
) -> None:
    starts = pointer(cu_seqlens, np.int32)
    pooled = memory + thread_index() * 2 * padded_width * 4
    state = pooled + padded_width * 4
    begin, end = thread_range(count)
    for row in range(begin, end):
        first_token, next_token = np.int64(starts[row]), np.int64(starts[row + 1])
        if mode == _LAST:
            first_token = next_token - 1
        read(x + first_token * stride * itemsize, itemsize, pooled, width)
        if mode >= _MEAN:  # or _MAX: the row read is the first of several
            for token in range(first_token + 1, next_token):
                if mode == _MEAN:
                    add(x + token * stride * itemsize, itemsize, pooled, width)
                else:
                    read(x + token * stride * itemsize, itemsize, state, width)
                    for i in range(0, width, LANES):
                        store(maximum(load(pooled + i * 4, 4), load(state + i * 4, 4)), pooled + i * 4, 4)
        scale, dim_count = np.float32(1), pointer(dims, np.int64)[row]
        if mode == _MEAN:
            scale /= np.float32(next_token - first_token)
        squares = splat(np.float32(0))
        for i in range(0, width, LANES):
            value = keep_first(load(pooled + i * 4, 4) * splat(scale), dim_count - i, np.float32(0))
            squares = squares + value * value
            store(value, pooled + i * 4, 4)
        if l2:
            norm = np.sqrt(reduce_sum(squares))
            norm = np.float32(1e-12) if norm < np.float32(1e-12) else norm
            for i in range(0, width, LANES):
                store(load(pooled + i * 4, 4) / splat(norm), pooled + i * 4, 4)
        write(pooled, y + row * width * 4, 4, width)


def segment_pool(
    x: Tensor,
    packed: Packed,
    mode: str,
    dims: Sequence[int],
    l2: bool,
) -> Tensor:
    """Pool each sequence to one vector; see `Ops.segment_pool`. There is no `project`."""
    count, width = len(packed.lengths), x.shape[1]
    y, padded_width = x.new_empty(count, width, dtype=torch.float32), padded_count(width)
    _pool(
        x.numel(),
        x=x,
        itemsize=x.itemsize,
        stride=x.stride(0),
        cu_seqlens=packed.cu_seqlens,
        dims=torch.tensor(dims),
        y=y,
        count=count,
        width=width,
        mode=_MODES[mode],
        l2=int(l2),
        memory=scratch(2 * padded_width),
        padded_width=padded_width,
    )
    return y
