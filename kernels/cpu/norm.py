"""Embeddings and norms on a CPU, as compiled loops over rows."""

import numpy as np
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
from triton_embed.kernels.cpu.simd import LANES, inline, keep_first, load, reduce_sum, splat, store


@inline
def _normalize(x, weight, bias, width, eps, centered):
    """Normalize one fp32 row in place: LayerNorm if `centered`, else RMSNorm.

    x, `weight` and `bias` are padded with zeros to whole registers.
    """
    if centered:
        sums = splat(np.float32(0))
        for i in range(0, width, LANES):
            sums = sums + load(x + i * 4, 4)
        mean = splat(reduce_sum(sums) / np.float32(width))
        for i in range(0, width, LANES):
            store(keep_first(load(x + i * 4, 4) - mean, width - i, np.float32(0)), x + i * 4, 4)
    sums = splat(np.float32(0))
    for i in range(0, width, LANES):
        y = load(x + i * 4, 4)
        sums = sums + y * y
    scale = splat(np.float32(1) / np.sqrt(reduce_sum(sums) / np.float32(width) + eps))
    for i in range(0, width, LANES):
        y = load(x + i * 4, 4) * scale * load(weight + i * 4, 4)
        if centered:
            y = y + load(bias + i * 4, 4)
        store(y, x + i * 4, 4)


@loop
def _add_norm(
    x: Address,
    x_itemsize: int,
    x_stride: int,
    residual: Address,
    residual_itemsize: int,
    residual_stride: int,
    rows: Address,
    y: Address,  # the norm in the dtype of x
    total: Address,  # x + residual in the dtype of the residual
    normed: Address,  # the norm in the dtype of the residual
    weight: Address,
    bias: Address,
    count: int,
    width: int,
    eps: float,
    memory: Address,
    padded_width: int,
) -> None:
    values = memory + thread_index() * 3 * padded_width * 4
    padded_weight, padded_bias = values + padded_width * 4, values + 2 * padded_width * 4
    centered = bias != 0
    read(weight, 4, padded_weight, width)
    if centered:
        read(bias, 4, padded_bias, width)
    begin, end = thread_range(count)
    for row in range(begin, end):
        read(x + row * x_stride * x_itemsize, x_itemsize, values, width)
        if residual:
            source = pointer(rows, np.int64)[row] if rows else row
            add(residual + source * residual_stride * residual_itemsize, residual_itemsize, values, width)
        if total:
            write(values, total + row * width * residual_itemsize, residual_itemsize, width)
            if residual_itemsize == 2:  # the norm sees the rounded sum, which the next layer adds to
                read(total + row * width * residual_itemsize, residual_itemsize, values, width)
        _normalize(values, padded_weight, padded_bias, width, np.float32(eps), centered)
        write(values, y + row * width * x_itemsize, x_itemsize, width)
        if normed:
            write(values, normed + row * width * residual_itemsize, residual_itemsize, width)


def _call_add_norm(
    x: Tensor,
    residual: Tensor | None,
    rows: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    total: Tensor | None,
    normed: Tensor | None,
    eps: float,
) -> Tensor:
    (count, width), padded_width = x.shape, padded_count(x.shape[1])
    y = x.new_empty(x.shape)
    _add_norm(
        count * width,
        x=x,
        x_itemsize=x.itemsize,
        x_stride=x.stride(0),
        residual=residual,
        residual_itemsize=0 if residual is None else residual.itemsize,
        residual_stride=0 if residual is None else residual.stride(0),
        rows=None if rows is None else rows.long(),
        y=y,
        total=total,
        normed=normed,
        weight=weight.float(),
        bias=None if bias is None else bias.float(),
        count=count,
        width=width,
        eps=eps,
        memory=scratch(3 * padded_width),
        padded_width=padded_width,
    )
    return y


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Add and normalize rows; see `Ops.add_rms_norm`."""
    total = x if residual is None else residual.new_empty(x.shape)
    return _call_add_norm(x, residual, rows, weight, None, None if residual is None else total, None, eps), total


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Add and normalize rows; see `Ops.add_layer_norm`."""
    total = x if residual is None else residual.new_empty(x.shape)
    return _call_add_norm(x, residual, rows, weight, bias, None if residual is None else total, None, eps), total


def post_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Add and normalize rows; see `Ops.post_layer_norm`."""
    if residual is None or residual.dtype == x.dtype:
        y = _call_add_norm(x, residual, rows, weight, bias, None, None, eps)
        return y, y
    normed = residual.new_empty(x.shape)
    return _call_add_norm(x, residual, rows, weight, bias, None, normed, eps), normed


@loop
def _embed(
    ids: Address,
    positions: Address,
    types: Address,
    word: Address,
    position: Address,
    token_type: Address,
    itemsize: int,
    y: Address,
    word_count: int,
    position_count: int,
    type_count: int,
    count: int,
    width: int,
    weight: Address,
    bias: Address,
    eps: float,
    memory: Address,
    padded_width: int,
) -> None:
    x = memory + thread_index() * 3 * padded_width * 4
    padded_weight, padded_bias = x + padded_width * 4, x + 2 * padded_width * 4
    read(weight, 4, padded_weight, width)
    read(bias, 4, padded_bias, width)
    begin, end = thread_range(count)
    for row in range(begin, end):
        word_id, position_id = np.int64(pointer(ids, np.int32)[row]), np.int64(pointer(positions, np.int32)[row])
        type_id = np.int64(pointer(types, np.int32)[row]) if types else 0
        if 0 <= word_id < word_count and 0 <= position_id < position_count and 0 <= type_id < type_count:
            read(word + word_id * width * itemsize, itemsize, x, width)
            add(position + position_id * width * itemsize, itemsize, x, width)
            add(token_type + type_id * width * itemsize, itemsize, x, width)
            _normalize(x, padded_weight, padded_bias, width, np.float32(eps), True)
        else:  # outside a table, so there is nothing to read
            for i in range(0, width, LANES):
                store(splat(np.float32(np.nan)), x + i * 4, 4)
        write(x, y + row * width * itemsize, itemsize, width)


def embed_layer_norm(
    ids: Tensor,
    pos: Tensor,
    types: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    """Sum embeddings and normalize them; see `Ops.embed_layer_norm`. Ids and positions outside their table give NaN."""
    count, width = len(ids), word.shape[1]
    y, padded_width = word.new_empty(count, width), padded_count(width)
    _embed(
        4 * count * width,
        ids=ids.int(),
        positions=pos.int(),
        types=None if types is None else types.int(),
        word=word.contiguous(),
        position=position.contiguous(),
        token_type=token_type.contiguous(),
        itemsize=word.itemsize,
        y=y,
        word_count=len(word),
        position_count=len(position),
        type_count=len(token_type),
        count=count,
        width=width,
        weight=weight.float(),
        bias=bias.float(),
        eps=eps,
        memory=scratch(3 * padded_width),
        padded_width=padded_width,
    )
    return y
