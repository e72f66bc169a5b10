"""Attention on a CPU as one compiled loop over sequences and heads, with scores that stay in a core's own cache.

Keys and values are copied to panels of words; see `linear_bf16.py`.
"""

import math

import numpy as np
import torch
from torch import Tensor

from triton_embed.kernels.cpu.linear_bf16 import PANEL, WORD_BYTES, copy_words, transpose_to_panels
from triton_embed.kernels.cpu.loops import Address, loop, pointer, scratch, thread_count, thread_index, write
from triton_embed.kernels.cpu.simd import (
    LANES,
    exp2,
    inline,
    interleave,
    keep_first,
    larger,
    load,
    reduce_max,
    reduce_sum,
    splat,
    store,
    tile_product,
)
from triton_embed.kernels.packed import Packed

# Queries per tile. Their sums should stay in registers; AVX2 has half as many as AVX-512, each half as wide.
TILE_ROWS = 8 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 2


def attention(
    q: Tensor, k: Tensor, v: Tensor, packed: Packed, causal: bool, scale: float, rows: Tensor | None = None
) -> Tensor:
    """Attend within each sequence, without window and prefix: q [T,H,D], k and v [T,G,D] -> [T,H,D].

    With `rows`, compute only these queries, one per sequence: [B,H,D]. The rules are those of `Ops.varlen_attention`
    and `Ops.pooled_attention`. In bf16, D must be even.
    """
    q, k, v = (x if x.stride(1) == x.shape[2] else x.contiguous() for x in (q, k, v))
    heads, kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
    sequences, max_length = len(packed.lengths), max(packed.lengths)
    out = q.new_empty(q.shape if rows is None else (sequences, heads, head_dim))
    padded_length, padded_dim = -(-max_length // PANEL) * PANEL, -(-head_dim // PANEL) * PANEL
    scratch_floats = 2 * padded_length * padded_dim + 2 * TILE_ROWS * (padded_length + padded_dim)
    _attend(
        sequences * heads * max_length * (max_length if rows is None else 1) * head_dim // 8,
        q=q,
        q_stride=q.stride(0),
        k=k,
        k_stride=k.stride(0),
        v=v,
        v_stride=v.stride(0),
        out=out,
        cu_seqlens=packed.cu_seqlens,
        sequences=sequences,
        rows=None if rows is None else rows.long(),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        causal=int(causal),
        scale=scale * math.log2(math.e),
        memory=scratch(scratch_floats),
        thread_floats=scratch_floats,
        itemsize=q.itemsize,
    )
    return out


@inline
def _zero_words(target, words):
    y = pointer(target, np.uint32)
    for i in range(words):
        y[i] = np.uint32(0)


@inline
def _softmax(scores, visible, width, scale, weights, itemsize):
    """Write 2^(scale * (score - max)) for the first `visible` of `width` scores and 0 for the rest; return the sum."""
    maxima = splat(np.float32(-np.inf))
    for i in range(0, width, LANES):
        maxima = larger(maxima, keep_first(load(scores + i * 4, 4), visible - i, np.float32(-np.inf)))
    top, factor, sums = splat(reduce_max(maxima)), splat(scale), splat(np.float32(0))
    for i in range(0, width, LANES):
        y = keep_first(exp2((load(scores + i * 4, 4) - top) * factor), visible - i, np.float32(0))
        sums = sums + y
        store(y, weights + i * itemsize, itemsize)
    return reduce_sum(sums)


@inline
def _pack_values(source, stride, itemsize, tokens, size, width, target):
    """Pack values [tokens,size] into panels: a word has a value of one token (fp32) or of two neighbors (bf16).

    Panels cover `width` tokens; those past the last are 0.
    """
    per_word, full = WORD_BYTES // itemsize, size // LANES * LANES
    panel_bytes = width // per_word * PANEL * WORD_BYTES
    for row in range(width // per_word):
        token = row * per_word
        even, odd = source + token * stride, source + (token + 1) * stride
        for i in range(0, size, PANEL):
            panel = target + i // PANEL * panel_bytes + row * PANEL * WORD_BYTES
            tail = i
            if token + per_word <= tokens:
                for c in range(i, min(i + PANEL, full), LANES):
                    if per_word == 2:
                        store(
                            interleave(even + c * itemsize, odd + c * itemsize),
                            panel + (c - i) * WORD_BYTES,
                            4,
                        )
                    else:
                        store(load(even + c * itemsize, 4), panel + (c - i) * WORD_BYTES, 4)
                tail = max(i, full)
            else:
                _zero_words(panel, PANEL)
            for c in range(tail, min(i + PANEL, size)):
                if per_word == 2:
                    y = pointer(panel + (c - i) * WORD_BYTES, np.uint16)
                    y[0] = pointer(even + c * itemsize, np.uint16)[0] if token < tokens else np.uint16(0)
                    y[1] = pointer(odd + c * itemsize, np.uint16)[0] if token + 1 < tokens else np.uint16(0)
                elif token < tokens:
                    copy_words(even + c * itemsize, panel + (c - i) * WORD_BYTES, 1)


_product, _product_pairs = (tile_product(TILE_ROWS, PANEL // LANES, pairs) for pairs in (False, True))


@inline
def _multiply(x, stride, itemsize, y, inner, z, pitch):
    """Multiply TILE_ROWS rows x, `stride` bytes apart, by the panel y; write fp32 rows z, `pitch` bytes apart.

    `inner` is the number of words in a row of x.
    """
    if itemsize == 2:
        _product_pairs(x, stride, y, PANEL * WORD_BYTES, inner, z, pitch)
    else:
        _product(x, stride, y, PANEL * WORD_BYTES, inner, z, pitch)


@loop
def _attend(
    q: Address,
    q_stride: int,
    k: Address,
    k_stride: int,
    v: Address,
    v_stride: int,
    out: Address,
    cu_seqlens: Address,
    sequences: int,
    rows: Address,
    heads: int,
    kv_heads: int,
    head_dim: int,
    causal: int,
    scale: float,  # times log2(e), so that exp2 replaces exp
    memory: Address,
    thread_floats: int,
    itemsize: int,
) -> None:
    starts = pointer(cu_seqlens, np.int32)
    per_word = WORD_BYTES // itemsize
    base, words = memory + thread_index() * thread_floats * 4, head_dim // per_word
    padded_dim = (head_dim + PANEL - 1) // PANEL * PANEL
    for task in range(thread_index(), sequences * heads, thread_count()):
        sequence, head = task // heads, task % heads
        begin = int(starts[sequence])
        tokens = int(starts[sequence + 1]) - begin
        kv_head = head // (heads // kv_heads)
        width = (tokens + PANEL - 1) // PANEL * PANEL
        keys = base
        values = keys + words * width * WORD_BYTES
        scores = values + width // per_word * padded_dim * WORD_BYTES  # [TILE_ROWS,width]
        weights = scores + TILE_ROWS * width * 4  # [TILE_ROWS,width]
        sums = weights + TILE_ROWS * width * itemsize  # [TILE_ROWS,padded_dim]
        tail_queries = sums + TILE_ROWS * padded_dim * 4  # [TILE_ROWS,head_dim]
        transpose_to_panels(
            k + (begin * k_stride + kv_head * head_dim) * itemsize, k_stride * itemsize, tokens, words, keys
        )
        _pack_values(
            v + (begin * v_stride + kv_head * head_dim) * itemsize,
            v_stride * itemsize,
            itemsize,
            tokens,
            head_dim,
            width,
            values,
        )
        first_query, end_query = 0, tokens
        if rows:
            first_query = pointer(rows, np.int64)[sequence] - begin
            end_query = first_query + 1
        for start in range(first_query, end_query, TILE_ROWS):
            count = min(TILE_ROWS, end_query - start)
            x, stride = q + ((begin + start) * q_stride + head * head_dim) * itemsize, q_stride * itemsize
            if count < TILE_ROWS:  # memory past the last query may be unmapped
                for row in range(count):
                    copy_words(x + row * stride, tail_queries + row * words * WORD_BYTES, words)
                x, stride = tail_queries, words * WORD_BYTES
            used_keys = (start + count + PANEL - 1) // PANEL * PANEL if causal else width
            for j in range(0, used_keys, PANEL):
                _multiply(x, stride, itemsize, keys + j * words * WORD_BYTES, words, scores + j * 4, width * 4)
            for row in range(count):
                visible = start + row + 1 if causal else tokens
                row_scores = scores + row * width * 4
                weight_sum = _softmax(
                    row_scores, visible, used_keys, np.float32(scale), weights + row * width * itemsize, itemsize
                )
                # The scores are not needed any more: the first of a row is replaced by the factor of its sums.
                pointer(row_scores, np.float32)[0] = np.float32(1) / weight_sum
            for i in range(0, padded_dim, PANEL):
                panel = values + i // PANEL * (width // per_word) * PANEL * WORD_BYTES
                _multiply(
                    weights, width * itemsize, itemsize, panel, used_keys // per_word, sums + i * 4, padded_dim * 4
                )
            for row in range(count):
                factor = splat(pointer(scores + row * width * 4, np.float32)[0])
                out_row = sequence if rows else begin + start + row
                target, row_sums = (
                    out + (out_row * heads + head) * head_dim * itemsize,
                    sums + row * padded_dim * 4,
                )
                for i in range(0, padded_dim, LANES):
                    store(load(row_sums + i * 4, 4) * factor, row_sums + i * 4, 4)
                write(row_sums, target, itemsize, head_dim)
