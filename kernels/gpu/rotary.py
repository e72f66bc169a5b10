"""Per-head norms and rotary positions of q and k, in one pass and in place."""

import triton
import triton.language as tl
from torch import Tensor

from triton_embed.kernels.gpu import blocks
from triton_embed.kernels.gpu.blocks import Config
from triton_embed.kernels.gpu.functions import row_stride
from triton_embed.kernels.gpu.launch import launch


@triton.jit(do_not_specialize=["count"])
def _qk_norm_rope_kernel(
    qkv,  # [T, ..]: QUERY_HEADS heads of 2 * HALF values, the key heads, then values that stay unchanged
    cos,  # fp32 [T, HALF]
    sin,  # fp32 [T, HALF]
    q_weight,  # [2 * HALF] or None
    k_weight,  # [2 * HALF] or None
    count,  # heads in all tokens
    STRIDE: tl.constexpr,
    COS_STRIDE: tl.constexpr,
    SIN_STRIDE: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # one head of one token
    column = tl.arange(0, BLOCK_N)
    mask = (row < count)[:, None] & (column < HALF)[None, :]
    token, head = (row // HEADS).to(tl.int64)[:, None], (row % HEADS)[:, None]
    pointers = qkv + token * STRIDE + head * (2 * HALF) + column[None, :]
    first = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(pointers + HALF, mask=mask, other=0.0).to(tl.float32)
    if q_weight is not None or k_weight is not None:
        scale = tl.rsqrt(tl.sum(first * first + second * second, axis=1) / (2 * HALF) + EPS)[:, None]
        is_query = head < QUERY_HEADS
        first *= _factor(q_weight, k_weight, is_query, scale, column, HALF)
        second *= _factor(q_weight, k_weight, is_query, scale, column + HALF, 2 * HALF)
    cosine = tl.load(cos + token * COS_STRIDE + column[None, :], mask=mask, other=0.0)
    sine = tl.load(sin + token * SIN_STRIDE + column[None, :], mask=mask, other=0.0)
    tl.store(pointers, (first * cosine - second * sine).to(qkv.dtype.element_ty), mask=mask)
    tl.store(pointers + HALF, (second * cosine + first * sine).to(qkv.dtype.element_ty), mask=mask)


@triton.jit
def _factor(q_weight, k_weight, is_query, scale, column, END: tl.constexpr):
    """Return the factors of the values at `column` of each head: [M,N], or 1 for heads without a weight."""
    if q_weight is None:
        query = 1.0
    else:
        query = scale * tl.load(q_weight + column, mask=column < END, other=0.0).to(tl.float32)[None, :]
    if k_weight is None:
        key = 1.0
    else:
        key = scale * tl.load(k_weight + column, mask=column < END, other=0.0).to(tl.float32)[None, :]
    return tl.where(is_query, query, key)


def qk_norm_rope_(
    qkv: Tensor,
    heads: tuple[int, int],
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    config: Config | None = None,
) -> Tensor:
    """Normalize and rotate q and k in place; see `Ops.qk_norm_rope_`."""
    for weight in (q_weight, k_weight):
        if weight is not None:
            row_stride(weight)
    query_heads, kv_heads = heads
    half = qkv.shape[1] // (query_heads + 2 * kv_heads) // 2
    count = len(qkv) * (query_heads + kv_heads)
    config = config or blocks.table_for(qkv.device).config("rotary", half=half)
    launch(
        _qk_norm_rope_kernel,
        (triton.cdiv(count, config.block_m),),
        (qkv, cos, sin, q_weight, k_weight, count),
        {
            "STRIDE": row_stride(qkv),
            "COS_STRIDE": row_stride(cos),
            "SIN_STRIDE": row_stride(sin),
            "QUERY_HEADS": query_heads,
            "HEADS": query_heads + kv_heads,
            "HALF": half,
            "EPS": eps,
            "BLOCK_M": config.block_m,
            "BLOCK_N": triton.next_power_of_2(half),
        },
        config.num_warps,
    )
    return qkv
