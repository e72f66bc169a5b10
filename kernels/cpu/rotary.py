"""Norms of heads and rotary positions on a CPU, as a compiled loop over tokens."""

import numpy as np
from torch import Tensor

from triton_embed.kernels.cpu.loops import (
    Address,
    loop,
    padded_count,
    read,
    scratch,
    thread_index,
    thread_range,
    write,
)
from triton_embed.kernels.cpu.simd import LANES, load, reduce_sum, splat, store


@loop
def _norm_rope(
    qkv: Address,
    itemsize: int,
    stride: int,
    count: int,
    width: int,
    query_heads: int,
    heads: int,  # of queries and keys
    cos: Address,
    sin: Address,
    q_weight: Address,
    k_weight: Address,
    eps: float,
    memory: Address,
    padded_width: int,
) -> None:
    half, row_bytes = width // 2, padded_width * 4
    x = memory + thread_index() * 7 * row_bytes
    # Halves are read in whole registers. What follows x and the weights is this thread's scratch memory too.
    padded_q_weight, padded_k_weight, padded_cos, padded_sin, rotated_first, rotated_second = (
        x + row_bytes,
        x + 2 * row_bytes,
        x + 3 * row_bytes,
        x + 4 * row_bytes,
        x + 5 * row_bytes,
        x + 6 * row_bytes,
    )
    for i in range(0, padded_width, LANES):  # the default without weights
        store(splat(np.float32(1)), padded_q_weight + i * 4, 4)
        store(splat(np.float32(1)), padded_k_weight + i * 4, 4)
    if q_weight:
        read(q_weight, 4, padded_q_weight, width)
    if k_weight:
        read(k_weight, 4, padded_k_weight, width)
    begin, end = thread_range(count)
    for token in range(begin, end):
        read(cos + token * half * 4, 4, padded_cos, half)
        read(sin + token * half * 4, 4, padded_sin, half)
        for head in range(heads):
            address = qkv + (token * stride + head * width) * itemsize
            is_query = head < query_heads
            weight = padded_q_weight if is_query else padded_k_weight
            read(address, itemsize, x, width)
            scale = splat(np.float32(1))
            if q_weight if is_query else k_weight:
                sums = splat(np.float32(0))
                for i in range(0, width, LANES):
                    value = load(x + i * 4, 4)
                    sums = sums + value * value
                scale = splat(np.float32(1) / np.sqrt(reduce_sum(sums) / np.float32(width) + np.float32(eps)))
            for offset in range(0, half * 4, LANES * 4):
                first_half = load(x + offset, 4) * scale * load(weight + offset, 4)
                second_half = load(x + half * 4 + offset, 4) * scale * load(weight + half * 4 + offset, 4)
                cosine, sine = load(padded_cos + offset, 4), load(padded_sin + offset, 4)
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
    """Normalize and rotate q and k in place; see `Ops.qk_norm_rope_`."""
    count, (query, key) = len(qkv), heads
    width = qkv.shape[1] // (query + 2 * key)
    padded_width = padded_count(width)
    _norm_rope(
        count * width * (query + key),
        qkv=qkv,
        itemsize=qkv.itemsize,
        stride=qkv.stride(0),
        count=count,
        width=width,
        query_heads=query,
        heads=query + key,
        cos=cos.contiguous(),
        sin=sin.contiguous(),
        q_weight=None if q_weight is None else q_weight.float(),
        k_weight=None if k_weight is None else k_weight.float(),
        eps=eps,
        memory=scratch(7 * padded_width),
        padded_width=padded_width,
    )
    return qkv
