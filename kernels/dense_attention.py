"""Attention on a CPU as one loop over sequences and heads, whose scores stay in a core's own cache.

Keys and values are laid out in panels, as `panels.py` has them.
"""

import math

import numpy as np
import torch
from torch import Tensor

from triton_embed.kernels.loops import Loop, fraction, pointer, scratch, thread, threads, write
from triton_embed.kernels.packed import Packed
from triton_embed.kernels.panels import PANEL, WORD, copy, turn
from triton_embed.kernels.simd import (
    COUNT,
    exp2,
    first,
    helper,
    interleave,
    larger,
    largest,
    load,
    splat,
    store,
    tile,
    total,
)

# Queries at a time: their sums should stay in registers, of which AVX2 has half as many, half as wide.
ROWS = 8 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 2


def attention(
    q: Tensor, k: Tensor, v: Tensor, packed: Packed, causal: bool, scale: float, rows: Tensor | None = None
) -> Tensor:
    """q [T,H,D], k and v [T,G,D] -> [T,H,D], as `ops.varlen_attention` without window and prefix; or of the queries
    `rows` alone, one of each sequence, [B,H,D], as `ops.pooled_attention`. In bf16 D is even."""
    q, k, v = (x if x.stride(1) == x.shape[2] else x.contiguous() for x in (q, k, v))
    heads, kv_heads, size = q.shape[1], k.shape[1], q.shape[2]
    members, longest = len(packed.lengths), max(packed.lengths)
    out = q.new_empty(q.shape if rows is None else (members, heads, size))
    width, wide = -(-longest // PANEL) * PANEL, -(-size // PANEL) * PANEL
    room = 2 * width * wide + 2 * ROWS * (width + wide)
    _attend(
        members * heads * longest * (longest if rows is None else 1) * size // 8,
        *(q, q.stride(0), k, k.stride(0), v, v.stride(0), out, packed.cu_seqlens, members),
        *(None if rows is None else rows.long(), heads, kv_heads, size, int(causal), scale * math.log2(math.e)),
        *(scratch(room), room, q.itemsize),
    )
    return out


@helper
def _clear(into, words):
    y = pointer(into, np.uint32)
    for i in range(words):
        y[i] = np.uint32(0)


@helper
def _softmax(x, seen, width, scale, into, size):
    """2^(scale (x - largest)) of the first `seen` of `width` numbers, 0 for the others. Returns their sum."""
    most = splat(np.float32(-np.inf))
    for i in range(0, width, COUNT):
        most = larger(most, first(load(x + i * 4, 4), seen - i, np.float32(-np.inf)))
    top, factor, sums = splat(largest(most)), splat(scale), splat(np.float32(0))
    for i in range(0, width, COUNT):
        y = first(exp2((load(x + i * 4, 4) - top) * factor), seen - i, np.float32(0))
        sums = sums + y
        store(y, into + i * size, size)
    return total(sums)


@helper
def _lay_out(source, stride, item, tokens, size, width, into):
    """Values [tokens,size] to panels of rows of words, which are 0 where there is no token."""
    each, whole = WORD // item, size // COUNT * COUNT
    pitch = width // each * PANEL * WORD
    for row in range(width // each):
        token = row * each
        one, other = source + token * stride, source + (token + 1) * stride
        for i in range(0, size, PANEL):
            to = into + i // PANEL * pitch + row * PANEL * WORD
            rest = i
            if token + each <= tokens:
                for c in range(i, min(i + PANEL, whole), COUNT):
                    if each == 2:
                        store(interleave(one + c * item, other + c * item), to + (c - i) * WORD, 4)
                    else:
                        store(load(one + c * item, 4), to + (c - i) * WORD, 4)
                rest = max(i, whole)
            else:
                _clear(to, PANEL)
            for c in range(rest, min(i + PANEL, size)):
                if each == 2:
                    y = pointer(to + (c - i) * WORD, np.uint16)
                    y[0] = pointer(one + c * item, np.uint16)[0] if token < tokens else np.uint16(0)
                    y[1] = pointer(other + c * item, np.uint16)[0] if token + 1 < tokens else np.uint16(0)
                elif token < tokens:
                    copy(one + c * item, to + (c - i) * WORD, 1)


_product, _product_pairs = (tile(ROWS, PANEL // COUNT, pairs) for pairs in (False, True))


@helper
def _multiply(x, stride, item, y, inner, into, pitch):
    """ROWS rows of words, `stride` bytes apart, times one panel -> fp32, `pitch` bytes apart."""
    if item == 2:
        _product_pairs(x, stride, y, PANEL * WORD, inner, into, pitch)
    else:
        _product(x, stride, y, PANEL * WORD, inner, into, pitch)


@Loop
def _attend(a):
    starts, members, rows = pointer(a[7], np.int32), a[8], pointer(a[9], np.int64)
    heads, kv_heads, size, causal, scale = a[10], a[11], a[12], a[13], np.float32(fraction(a[14]))
    item = a[17]
    each = WORD // item
    base, words = a[15] + thread() * a[16] * 4, size // each
    wide = (size + PANEL - 1) // PANEL * PANEL
    for unit in range(thread(), members * heads, threads()):
        n, head = unit // heads, unit % heads
        begin = np.int64(starts[n])
        tokens = np.int64(starts[n + 1]) - begin
        kv_head = head // (heads // kv_heads)
        width = (tokens + PANEL - 1) // PANEL * PANEL
        keys = base
        values = keys + words * width * WORD
        scores = values + width // each * wide * WORD  # [ROWS,width]
        weights = scores + ROWS * width * 4  # [ROWS,width]
        found = weights + ROWS * width * item  # [ROWS,wide]
        spare = found + ROWS * wide * 4  # [ROWS,size]
        turn(a[2] + (begin * a[3] + kv_head * size) * item, a[3] * item, tokens, words, keys)
        _lay_out(a[4] + (begin * a[5] + kv_head * size) * item, a[5] * item, item, tokens, size, width, values)
        from_, to = 0, tokens
        if a[9]:
            from_ = rows[n] - begin
            to = from_ + 1
        for start in range(from_, to, ROWS):
            some = min(ROWS, to - start)
            x, stride = a[0] + ((begin + start) * a[1] + head * size) * item, a[1] * item
            if some < ROWS:  # there may be nothing behind them
                for row in range(some):
                    copy(x + row * stride, spare + row * words * WORD, words)
                x, stride = spare, words * WORD
            used = (start + some + PANEL - 1) // PANEL * PANEL if causal else width
            for j in range(0, used, PANEL):
                _multiply(x, stride, item, keys + j * words * WORD, words, scores + j * 4, width * 4)
            for row in range(some):
                seen = start + row + 1 if causal else tokens
                at = scores + row * width * 4
                sums = _softmax(at, seen, used, scale, weights + row * width * item, item)
                pointer(at, np.float32)[0] = np.float32(1) / sums
            for i in range(0, wide, PANEL):
                panel = values + i // PANEL * (width // each) * PANEL * WORD
                _multiply(weights, width * item, item, panel, used // each, found + i * 4, wide * 4)
            for row in range(some):
                factor = splat(pointer(scores + row * width * 4, np.float32)[0])
                place = n if a[9] else begin + start + row
                into, y = a[6] + (place * heads + head) * size * item, found + row * wide * 4
                for i in range(0, wide, COUNT):
                    store(load(y + i * 4, 4) * factor, y + i * 4, 4)
                write(y, into, item, size)
