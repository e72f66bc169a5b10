"""Compiled loops over rows on a CPU: embeddings, norms, rotary positions, gates and pooling.

Names and signatures are those of `reference.py`.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from triton_embed.kernels.cpu.loops import (
    Loop,
    add,
    float_argument,
    padded_count,
    pointer,
    read,
    scratch,
    thread_index,
    thread_range,
    write,
)
from triton_embed.kernels.cpu.simd import LANES, exp2, inline, keep_first, load, maximum, reduce_sum, splat, store
from triton_embed.kernels.packed import Packed


@inline
def _normalize(x, weight, bias, width, eps, centered):
    """Normalize one fp32 row in place: LayerNorm if `centered`, else RMSNorm. All rows fill whole registers."""
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


@Loop
def _add_norm(a):
    inputs, input_itemsize, input_stride = a[0], a[1], a[2]
    residual, residual_itemsize, residual_stride, rows = a[3], a[4], a[5], a[6]
    y, sums, normed, sum_itemsize = a[7], a[8], a[9], a[10]  # the item size is that of `sums` and `normed`
    centered, count, width, padded_width = a[12] != 0, a[13], a[14], a[17]
    eps = np.float32(float_argument(a[15]))
    x = a[16] + thread_index() * 3 * padded_width * 4
    weight, bias = x + padded_width * 4, x + 2 * padded_width * 4
    read(a[11], 4, weight, width)
    if centered:
        read(a[12], 4, bias, width)
    begin, end = thread_range(count)
    for row in range(begin, end):
        read(inputs + row * input_stride * input_itemsize, input_itemsize, x, width)
        if residual:
            source = pointer(rows, np.int64)[row] if rows else row
            add(residual + source * residual_stride * residual_itemsize, residual_itemsize, x, width)
        if sums:
            write(x, sums + row * width * sum_itemsize, sum_itemsize, width)
            if sum_itemsize == 2:  # the norm sees the rounded sum, which the next layer adds to
                read(sums + row * width * sum_itemsize, sum_itemsize, x, width)
        _normalize(x, weight, bias, width, eps, centered)
        write(x, y + row * width * input_itemsize, input_itemsize, width)
        if normed:
            write(x, normed + row * width * sum_itemsize, sum_itemsize, width)


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
        *(x, x.itemsize, x.stride(0)),
        *((None, 0, 0) if residual is None else (residual, residual.itemsize, residual.stride(0))),
        None if rows is None else rows.long(),
        *(y, total, normed, 0 if residual is None else residual.itemsize),
        weight.float(),
        None if bias is None else bias.float(),
        *(count, width, float(eps), scratch(3 * padded_width), padded_width),
    )
    return y


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Add and normalize rows; see `ops.add_rms_norm`."""
    total = x if residual is None else residual.new_empty(x.shape)
    return _call_add_norm(x, residual, rows, weight, None, None if residual is None else total, None, eps), total


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Add and normalize rows; see `ops.add_layer_norm`."""
    total = x if residual is None else residual.new_empty(x.shape)
    return _call_add_norm(x, residual, rows, weight, bias, None if residual is None else total, None, eps), total


def post_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Add and normalize rows; see `ops.post_layer_norm`."""
    if residual is None or residual.dtype == x.dtype:
        y = _call_add_norm(x, residual, rows, weight, bias, None, None, eps)
        return y, y
    normed = residual.new_empty(x.shape)
    return _call_add_norm(x, residual, rows, weight, bias, None, normed, eps), normed


@Loop
def _embed(a):
    ids, pos, types = pointer(a[0], np.int32), pointer(a[1], np.int32), a[2]
    word, position, token_type, itemsize, y = a[3], a[4], a[5], a[6], a[7]
    word_count, position_count, type_count, count, width = a[8], a[9], a[10], a[11], a[12]
    eps, padded_width = np.float32(float_argument(a[15])), a[17]
    x = a[16] + thread_index() * 3 * padded_width * 4
    weight, bias = x + padded_width * 4, x + 2 * padded_width * 4
    read(a[13], 4, weight, width)
    read(a[14], 4, bias, width)
    begin, end = thread_range(count)
    for row in range(begin, end):
        word_id, position_id = np.int64(ids[row]), np.int64(pos[row])
        type_id = np.int64(pointer(types, np.int32)[row]) if types else 0
        if 0 <= word_id < word_count and 0 <= position_id < position_count and 0 <= type_id < type_count:
            read(word + word_id * width * itemsize, itemsize, x, width)
            add(position + position_id * width * itemsize, itemsize, x, width)
            add(token_type + type_id * width * itemsize, itemsize, x, width)
            _normalize(x, weight, bias, width, eps, True)
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
    """Sum embeddings and normalize them; see `ops.embed_layer_norm`. Ids and positions outside their table give NaN."""
    count, width = len(ids), word.shape[1]
    y, padded_width = word.new_empty(count, width), padded_count(width)
    _embed(
        4 * count * width,
        *(ids.int(), pos.int(), None if types is None else types.int()),
        *(word.contiguous(), position.contiguous(), token_type.contiguous(), word.itemsize, y),
        *(len(word), len(position), len(token_type), count, width),
        *(weight.float(), bias.float(), float(eps), scratch(3 * padded_width), padded_width),
    )
    return y


@Loop
def _norm_rope(a):
    qkv, itemsize, stride, count, width = a[0], a[1], a[2], a[3], a[4]
    query_heads, heads, padded_width = a[5], a[6], a[13]  # query heads, and query and key heads together
    eps, half, row_bytes = np.float32(float_argument(a[11])), width // 2, padded_width * 4
    x = a[12] + thread_index() * 7 * row_bytes
    # Halves are read in whole registers. What follows x and the weights is this thread's scratch memory too.
    q_weight, k_weight, cos, sin, rotated_first, rotated_second = (
        x + row_bytes,
        x + 2 * row_bytes,
        x + 3 * row_bytes,
        x + 4 * row_bytes,
        x + 5 * row_bytes,
        x + 6 * row_bytes,
    )
    for i in range(0, padded_width, LANES):  # the default without weights
        store(splat(np.float32(1)), q_weight + i * 4, 4)
        store(splat(np.float32(1)), k_weight + i * 4, 4)
    if a[9]:
        read(a[9], 4, q_weight, width)
    if a[10]:
        read(a[10], 4, k_weight, width)
    begin, end = thread_range(count)
    for token in range(begin, end):
        read(a[7] + token * half * 4, 4, cos, half)
        read(a[8] + token * half * 4, 4, sin, half)
        for head in range(heads):
            address = qkv + (token * stride + head * width) * itemsize
            norm_weight, weight = (a[9], q_weight) if head < query_heads else (a[10], k_weight)
            read(address, itemsize, x, width)
            scale = splat(np.float32(1))
            if norm_weight:
                sums = splat(np.float32(0))
                for i in range(0, width, LANES):
                    value = load(x + i * 4, 4)
                    sums = sums + value * value
                scale = splat(np.float32(1) / np.sqrt(reduce_sum(sums) / np.float32(width) + eps))
            for offset in range(0, half * 4, LANES * 4):
                first_half = load(x + offset, 4) * scale * load(weight + offset, 4)
                second_half = load(x + half * 4 + offset, 4) * scale * load(weight + half * 4 + offset, 4)
                cosine, sine = load(cos + offset, 4), load(sin + offset, 4)
                store(first_half * cosine - second_half * sine, rotated_first + offset, 4)
                store(second_half * cosine + first_half * sine, rotated_second + offset, 4)
            write(rotated_first, address, itemsize, half)
            write(rotated_second, address + half * itemsize, itemsize, half)


def qk_norm_rope_(
    qkv: Tensor,
    heads: tuple[int, int],
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> Tensor:
    """Normalize and rotate q and k in place; see `ops.qk_norm_rope_`."""
    count, (query, key) = len(qkv), heads
    width = qkv.shape[1] // (query + 2 * key)
    _norm_rope(
        count * width * (query + key),
        *(qkv, qkv.itemsize, qkv.stride(0), count, width, query, query + key),
        *(cos.contiguous(), sin.contiguous()),
        *(None if weight is None else weight.float() for weight in (q_weight, k_weight)),
        *(float(eps), scratch(7 * padded_count(width)), padded_count(width)),
    )
    return qkv


@Loop
def _gate(a):
    inputs, itemsize, stride, y, count, width = a[0], a[1], a[2], a[3], a[4], a[5]
    gate = a[6] + thread_index() * 2 * a[7] * 4
    up = gate + a[7] * 4
    unit, minus_log2_e = splat(np.float32(1)), splat(np.float32(-math.log2(math.e)))
    begin, end = thread_range(count)
    for row in range(begin, end):
        address = inputs + row * stride * itemsize
        read(address, itemsize, gate, width)
        read(address + width * itemsize, itemsize, up, width)
        for i in range(0, width, LANES):
            x = load(gate + i * 4, 4)
            store(x / (unit + exp2(x * minus_log2_e)) * load(up + i * 4, 4), gate + i * 4, 4)
        write(gate, y + row * width * itemsize, itemsize, width)


def gated_activation(gate_up: Tensor) -> Tensor:
    """Compute silu(gate) * up; see `ops.gated_activation`."""
    count, width = len(gate_up), gate_up.shape[1] // 2
    y = gate_up.new_empty(count, width)
    padded_width = padded_count(width)
    _gate(
        2 * count * width,
        *(gate_up, gate_up.itemsize, gate_up.stride(0), y, count, width, scratch(2 * padded_width), padded_width),
    )
    return y


_POOLING = {"cls": 0, "last": 1, "mean": 2, "max": 3}


@Loop
def _pool(a):
    x, itemsize, stride, starts, dims = a[0], a[1], a[2], pointer(a[3], np.int32), pointer(a[4], np.int64)
    y, count, width, mode, l2 = a[5], a[6], a[7], a[8], a[9]
    pooled = a[10] + thread_index() * 2 * a[11] * 4
    state = pooled + a[11] * 4
    begin, end = thread_range(count)
    for row in range(begin, end):
        first_token, next_token = np.int64(starts[row]), np.int64(starts[row + 1])
        if mode == 1:
            first_token = next_token - 1
        read(x + first_token * stride * itemsize, itemsize, pooled, width)
        if mode >= 2:
            for token in range(first_token + 1, next_token):
                if mode == 2:
                    add(x + token * stride * itemsize, itemsize, pooled, width)
                else:
                    read(x + token * stride * itemsize, itemsize, state, width)
                    for i in range(0, width, LANES):
                        store(maximum(load(pooled + i * 4, 4), load(state + i * 4, 4)), pooled + i * 4, 4)
        scale, dim_count = np.float32(1), dims[row]
        if mode == 2:
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
    """Pool each sequence to one vector; see `ops.segment_pool`. `norm` is unsupported."""
    count, width = len(packed.lengths), x.shape[1]
    y, padded_width = x.new_empty(count, width, dtype=torch.float32), padded_count(width)
    _pool(
        x.numel(),
        *(x, x.itemsize, x.stride(0), packed.cu_seqlens, torch.tensor(dims), y, count, width),
        *(_POOLING[mode], int(l2), scratch(2 * padded_width), padded_width),
    )
    return y
