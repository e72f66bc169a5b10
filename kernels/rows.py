"""Rows on a CPU: embeddings, norms, rotary positions, gates and pooling as loops, under the names and signatures of
`reference.py`."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from triton_embed.kernels.loops import Loop, add, fraction, pointer, read, scratch, share, thread, whole, write
from triton_embed.kernels.packed import Packed
from triton_embed.kernels.simd import COUNT, exp2, first, helper, load, maximum, splat, store, total


@helper
def _normalise(x, weight, bias, width, eps, centred):
    """RMSNorm of one row, or LayerNorm where centred, in place; all fp32 and whole numbers of registers."""
    if centred:
        sums = splat(np.float32(0))
        for i in range(0, width, COUNT):
            sums = sums + load(x + i * 4, 4)
        mean = splat(total(sums) / np.float32(width))
        for i in range(0, width, COUNT):
            store(first(load(x + i * 4, 4) - mean, width - i, np.float32(0)), x + i * 4, 4)
    sums = splat(np.float32(0))
    for i in range(0, width, COUNT):
        y = load(x + i * 4, 4)
        sums = sums + y * y
    scale = splat(np.float32(1) / np.sqrt(total(sums) / np.float32(width) + eps))
    for i in range(0, width, COUNT):
        y = load(x + i * 4, 4) * scale * load(weight + i * 4, 4)
        if centred:
            y = y + load(bias + i * 4, 4)
        store(y, x + i * 4, 4)


@Loop
def _add_norm(a):
    given, given_size, given_stride = a[0], a[1], a[2]
    residual, residual_size, residual_stride, rows = a[3], a[4], a[5], a[6]
    y, sums, normed, kept_size = a[7], a[8], a[9], a[10]  # the last: of `sums` and `normed`
    centred, count, width, room = a[12] != 0, a[13], a[14], a[17]
    eps = np.float32(fraction(a[15]))
    x = a[16] + thread() * 3 * room * 4
    weight, bias = x + room * 4, x + 2 * room * 4
    read(a[11], 4, weight, width)
    if centred:
        read(a[12], 4, bias, width)
    begin, end = share(count)
    for row in range(begin, end):
        read(given + row * given_stride * given_size, given_size, x, width)
        if residual:
            source = pointer(rows, np.int64)[row] if rows else row
            add(residual + source * residual_stride * residual_size, residual_size, x, width)
        if sums:
            write(x, sums + row * width * kept_size, kept_size, width)
            if kept_size == 2:  # what the next layer adds to is what this norm sees
                read(sums + row * width * kept_size, kept_size, x, width)
        _normalise(x, weight, bias, width, eps, centred)
        write(x, y + row * width * given_size, given_size, width)
        if normed:
            write(x, normed + row * width * kept_size, kept_size, width)


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
    (count, width), room = x.shape, whole(x.shape[1])
    y = x.new_empty(x.shape)
    _add_norm(
        count * width,
        *(x, x.itemsize, x.stride(0)),
        *((None, 0, 0) if residual is None else (residual, residual.itemsize, residual.stride(0))),
        None if rows is None else rows.long(),
        *(y, total, normed, 0 if residual is None else residual.itemsize),
        weight.float(),
        None if bias is None else bias.float(),
        *(count, width, float(eps), scratch(3 * room), room),
    )
    return y


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `ops.add_rms_norm`."""
    total = x if residual is None else residual.new_empty(x.shape)
    return _call_add_norm(x, residual, rows, weight, None, None if residual is None else total, None, eps), total


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `ops.add_layer_norm`."""
    total = x if residual is None else residual.new_empty(x.shape)
    return _call_add_norm(x, residual, rows, weight, bias, None if residual is None else total, None, eps), total


def post_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `ops.post_layer_norm`."""
    if residual is None or residual.dtype == x.dtype:
        y = _call_add_norm(x, residual, rows, weight, bias, None, None, eps)
        return y, y
    normed = residual.new_empty(x.shape)
    return _call_add_norm(x, residual, rows, weight, bias, None, normed, eps), normed


@Loop
def _embed(a):
    ids, pos, types = pointer(a[0], np.int32), pointer(a[1], np.int32), a[2]
    word, position, token_type, size, y = a[3], a[4], a[5], a[6], a[7]
    words, positions, kinds, count, width = a[8], a[9], a[10], a[11], a[12]
    eps, room = np.float32(fraction(a[15])), a[17]
    x = a[16] + thread() * 3 * room * 4
    weight, bias = x + room * 4, x + 2 * room * 4
    read(a[13], 4, weight, width)
    read(a[14], 4, bias, width)
    begin, end = share(count)
    for row in range(begin, end):
        one, other = np.int64(ids[row]), np.int64(pos[row])
        kind = np.int64(pointer(types, np.int32)[row]) if types else 0
        if 0 <= one < words and 0 <= other < positions and 0 <= kind < kinds:
            read(word + one * width * size, size, x, width)
            add(position + other * width * size, size, x, width)
            add(token_type + kind * width * size, size, x, width)
            _normalise(x, weight, bias, width, eps, True)
        else:  # there is no such row in memory
            for i in range(0, width, COUNT):
                store(splat(np.float32(np.nan)), x + i * 4, 4)
        write(x, y + row * width * size, size, width)


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
    """See `ops.embed_layer_norm`; a token of an id or position that no table has becomes NaN."""
    count, width = len(ids), word.shape[1]
    y, room = word.new_empty(count, width), whole(width)
    _embed(
        4 * count * width,
        *(ids.int(), pos.int(), None if types is None else types.int()),
        *(word.contiguous(), position.contiguous(), token_type.contiguous(), word.itemsize, y),
        *(len(word), len(position), len(token_type), count, width),
        *(weight.float(), bias.float(), float(eps), scratch(3 * room), room),
    )
    return y


@Loop
def _norm_rope(a):
    qkv, size, stride, count, width = a[0], a[1], a[2], a[3], a[4]
    query_heads, heads, room = a[5], a[6], a[13]  # heads of queries, of queries and keys
    eps, half, row = np.float32(fraction(a[11])), width // 2, room * 4
    x = a[12] + thread() * 7 * row
    # Halves are read up to a whole register: behind x and the weights there is more of this thread's.
    q_weight, k_weight, cos, sin, y, z = x + row, x + 2 * row, x + 3 * row, x + 4 * row, x + 5 * row, x + 6 * row
    for i in range(0, room, COUNT):  # where there is no weight
        store(splat(np.float32(1)), q_weight + i * 4, 4)
        store(splat(np.float32(1)), k_weight + i * 4, 4)
    if a[9]:
        read(a[9], 4, q_weight, width)
    if a[10]:
        read(a[10], 4, k_weight, width)
    begin, end = share(count)
    for token in range(begin, end):
        read(a[7] + token * half * 4, 4, cos, half)
        read(a[8] + token * half * 4, 4, sin, half)
        for head in range(heads):
            address = qkv + (token * stride + head * width) * size
            normed, weight = (a[9], q_weight) if head < query_heads else (a[10], k_weight)
            read(address, size, x, width)
            scale = splat(np.float32(1))
            if normed:
                sums = splat(np.float32(0))
                for i in range(0, width, COUNT):
                    value = load(x + i * 4, 4)
                    sums = sums + value * value
                scale = splat(np.float32(1) / np.sqrt(total(sums) / np.float32(width) + eps))
            for at in range(0, half * 4, COUNT * 4):
                one = load(x + at, 4) * scale * load(weight + at, 4)
                other = load(x + half * 4 + at, 4) * scale * load(weight + half * 4 + at, 4)
                c, s = load(cos + at, 4), load(sin + at, 4)
                store(one * c - other * s, y + at, 4)
                store(other * c + one * s, z + at, 4)
            write(y, address, size, half)
            write(z, address + half * size, size, half)


def qk_norm_rope_(
    qkv: Tensor,
    heads: tuple[int, int],
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> Tensor:
    """See `ops.qk_norm_rope_`."""
    count, (query, key) = len(qkv), heads
    width = qkv.shape[1] // (query + 2 * key)
    _norm_rope(
        count * width * (query + key),
        *(qkv, qkv.itemsize, qkv.stride(0), count, width, query, query + key),
        *(cos.contiguous(), sin.contiguous()),
        *(None if weight is None else weight.float() for weight in (q_weight, k_weight)),
        *(float(eps), scratch(7 * whole(width)), whole(width)),
    )
    return qkv


@Loop
def _gate(a):
    given, size, stride, y, count, width = a[0], a[1], a[2], a[3], a[4], a[5]
    gate = a[6] + thread() * 2 * a[7] * 4
    up = gate + a[7] * 4
    one, minus_log2_e = splat(np.float32(1)), splat(np.float32(-math.log2(math.e)))
    begin, end = share(count)
    for row in range(begin, end):
        address = given + row * stride * size
        read(address, size, gate, width)
        read(address + width * size, size, up, width)
        for i in range(0, width, COUNT):
            x = load(gate + i * 4, 4)
            store(x / (one + exp2(x * minus_log2_e)) * load(up + i * 4, 4), gate + i * 4, 4)
        write(gate, y + row * width * size, size, width)


def gated_activation(gate_up: Tensor) -> Tensor:
    """See `ops.gated_activation`."""
    count, width = len(gate_up), gate_up.shape[1] // 2
    y = gate_up.new_empty(count, width)
    room = whole(width)
    _gate(
        2 * count * width,
        *(gate_up, gate_up.itemsize, gate_up.stride(0), y, count, width, scratch(2 * room), room),
    )
    return y


_POOLING = {"cls": 0, "last": 1, "mean": 2, "max": 3}


@Loop
def _pool(a):
    x, size, stride, starts, dims = a[0], a[1], a[2], pointer(a[3], np.int32), pointer(a[4], np.int64)
    y, count, width, mode, unit = a[5], a[6], a[7], a[8], a[9]
    pooled = a[10] + thread() * 2 * a[11] * 4
    state = pooled + a[11] * 4
    begin, end = share(count)
    for row in range(begin, end):
        first_token, behind = np.int64(starts[row]), np.int64(starts[row + 1])
        if mode == 1:
            first_token = behind - 1
        read(x + first_token * stride * size, size, pooled, width)
        if mode >= 2:
            for token in range(first_token + 1, behind):
                if mode == 2:
                    add(x + token * stride * size, size, pooled, width)
                else:
                    read(x + token * stride * size, size, state, width)
                    for i in range(0, width, COUNT):
                        store(maximum(load(pooled + i * 4, 4), load(state + i * 4, 4)), pooled + i * 4, 4)
        scale, kept = np.float32(1), dims[row]
        if mode == 2:
            scale /= np.float32(behind - first_token)
        squares = splat(np.float32(0))
        for i in range(0, width, COUNT):
            value = first(load(pooled + i * 4, 4) * splat(scale), kept - i, np.float32(0))
            squares = squares + value * value
            store(value, pooled + i * 4, 4)
        if unit:
            norm = np.sqrt(total(squares))
            norm = np.float32(1e-12) if norm < np.float32(1e-12) else norm
            for i in range(0, width, COUNT):
                store(load(pooled + i * 4, 4) / splat(norm), pooled + i * 4, 4)
        write(pooled, y + row * width * 4, 4, width)


def segment_pool(
    x: Tensor,
    packed: Packed,
    mode: str,
    dims: Sequence[int],
    l2: bool,
) -> Tensor:
    """See `ops.segment_pool`, without `norm`."""
    count, width = len(packed.lengths), x.shape[1]
    y, room = x.new_empty(count, width, dtype=torch.float32), whole(width)
    _pool(
        x.numel(),
        *(x, x.itemsize, x.stride(0), packed.cu_seqlens, torch.tensor(dims), y, count, width),
        *(_POOLING[mode], int(l2), scratch(2 * room), room),
    )
    return y
