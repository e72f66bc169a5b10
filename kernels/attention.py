"""Attention over packed sequences: a tile of neighbouring tokens a program, or one query a sequence.

The query heads that share a key head are rows of one block (row = token * group + head), because they read the same
keys. Statistics are fp32; exp2 runs on scores that were scaled by log2(e) as well.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_embed.kernels import blocks
from triton_embed.kernels.blocks import Config
from triton_embed.kernels.launch import launch
from triton_embed.kernels.packed import Packed

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SMALLEST_DOT = 16  # rows and columns of the smallest block that `tl.dot` multiplies
LARGEST_HEAD = 256
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # below every score, yet no infinity: a difference is no NaN


@triton.jit
def _load_part(
    x, offsets, mask, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr
):
    """Columns FIRST.. of the rows that begin at `offsets` [n]: [n,WIDTH], 0 where not `mask` [n] and past HEAD_DIM."""
    columns = FIRST + tl.arange(0, WIDTH)[None, :]
    pointers = x + offsets[:, None] + columns
    if MASKED and FIRST + WIDTH > HEAD_DIM:
        values = tl.load(pointers, mask=mask[:, None] & (columns < HEAD_DIM), other=0.0)
    elif MASKED:
        values = tl.load(pointers, mask=mask[:, None], other=0.0)
    elif FIRST + WIDTH > HEAD_DIM:
        values = tl.load(pointers, mask=columns < HEAD_DIM, other=0.0)
    else:
        values = tl.load(pointers)
    return values


@triton.jit
def _offsets(ROWS: tl.constexpr, STRIDE: tl.constexpr):
    """Where each of a block's rows begins, in 64 bits where 32 are too few."""
    rows = tl.arange(0, ROWS)
    return rows.to(tl.int64) * STRIDE if ROWS * STRIDE >= 2**31 else rows * STRIDE


@triton.jit
def _without_spoiled(scores, v):
    """NaN scores for the keys whose values v [n,D] are not finite, and 0 for such values.

    A row that does not see a key multiplies its values by 0, which would not make them vanish.
    """
    finite = tl.abs(v.to(tl.float32)) < float("inf")
    spoiled = tl.max(tl.where(finite, 0, 1), axis=1)
    return tl.where(spoiled[None, :] > 0, float("nan"), scores), tl.where(finite, v, 0.0)


@triton.jit
def _store_part(out, offsets, sums, total, mask, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Write sums / total to columns FIRST.. of the rows that begin at `offsets` [n], where `mask` [n]."""
    columns = FIRST + tl.arange(0, WIDTH)[None, :]
    means = (sums / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + offsets[:, None] + columns, means, mask=mask[:, None] & (columns < HEAD_DIM))


@triton.jit
def _attend(
    out0,
    out1,
    top,
    total,
    q0,
    q1,
    k,
    v,
    first,
    low,
    high,
    end,
    K_ROW: tl.constexpr,
    V_ROW: tl.constexpr,
    WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    ISOLATED: tl.constexpr,
):
    """Take the keys `first`.. of one head into account: out0 [M,WIDTH0] and out1 [M,WIDTH1] are sums of values
    weighted by exp2(score - top), `total` [M] the sum of the weights, `top` [M] the largest score so far.

    MASKED: row m sees the keys low[m] <= key < high[m] alone, and none from `end` on are read.
    """
    keys = first + tl.arange(0, BLOCK_N)
    inside = keys < end
    k, v = k + first.to(tl.int64) * K_ROW, v + first.to(tl.int64) * V_ROW
    k_offsets, v_offsets = _offsets(BLOCK_N, K_ROW), _offsets(BLOCK_N, V_ROW)
    k0 = _load_part(k, k_offsets, inside, 0, WIDTH0, HEAD_DIM, MASKED)
    v0 = _load_part(v, v_offsets, inside, 0, WIDTH0, HEAD_DIM, MASKED)
    scores = tl.dot(q0, tl.trans(k0), input_precision="ieee")
    if WIDTH1 > 0:
        k1 = _load_part(k, k_offsets, inside, WIDTH0, WIDTH1, HEAD_DIM, MASKED)
        v1 = _load_part(v, v_offsets, inside, WIDTH0, WIDTH1, HEAD_DIM, MASKED)
        scores = tl.dot(q1, tl.trans(k1), scores, input_precision="ieee")
    if ISOLATED:
        scores, v0 = _without_spoiled(scores, v0)
        if WIDTH1 > 0:
            scores, v1 = _without_spoiled(scores, v1)
    if MASKED:
        scores = tl.where((keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None]), scores, float("-inf"))

    higher = tl.maximum(top, tl.max(scores, axis=1) * SCALE)
    weights = tl.math.exp2(scores * SCALE - higher[:, None])
    fade = tl.math.exp2(top - higher)
    total = total * fade + tl.sum(weights, axis=1)
    weights = weights.to(v0.dtype)
    out0 = tl.dot(weights, v0, out0 * fade[:, None], input_precision="ieee")
    if WIDTH1 > 0:
        out1 = tl.dot(weights, v1, out1 * fade[:, None], input_precision="ieee")
    return out0, out1, higher, total


@triton.jit
def _attend_all(
    out0,
    out1,
    top,
    total,
    q0,
    q1,
    k,
    v,
    low,
    high,
    start,
    all_low,
    all_high,
    end,
    K_ROW: tl.constexpr,
    V_ROW: tl.constexpr,
    WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ISOLATED: tl.constexpr,
):
    """Take the keys `start`..`end` into account, which every row sees from `all_low` to `all_high`: no mask there."""
    blocks = tl.cdiv(end - start, BLOCK_N)
    whole_from = tl.minimum(tl.cdiv(all_low - start, BLOCK_N), blocks)
    whole = tl.maximum((all_high - start) // BLOCK_N - whole_from, 0)
    for i in tl.range(blocks - whole, num_stages=1):  # few blocks: registers are worth more than a pipeline
        first = start + tl.where(i < whole_from, i, i + whole) * BLOCK_N
        out0, out1, top, total = _attend(
            out0, out1, top, total, q0, q1, k, v, first, low, high, end,
            K_ROW, V_ROW, WIDTH0, WIDTH1, HEAD_DIM, SCALE, BLOCK_N, True, ISOLATED,
        )  # fmt: skip
    for i in range(whole_from, whole_from + whole):
        out0, out1, top, total = _attend(
            out0, out1, top, total, q0, q1, k, v, start + i * BLOCK_N, low, high, end,
            K_ROW, V_ROW, WIDTH0, WIDTH1, HEAD_DIM, SCALE, BLOCK_N, False, False,
        )  # fmt: skip
    return out0, out1, top, total


@triton.jit(do_not_specialize=["tokens", "shared"])
def _varlen_attention_kernel(
    q,
    k,
    v,
    out,
    tiles,
    bounds,
    prefix_k,
    prefix_v,
    tokens,
    shared,
    Q_ROW: tl.constexpr,
    Q_HEAD: tl.constexpr,
    K_ROW: tl.constexpr,
    K_HEAD: tl.constexpr,
    V_ROW: tl.constexpr,
    V_HEAD: tl.constexpr,
    OUT_ROW: tl.constexpr,
    OUT_HEAD: tl.constexpr,
    PREFIX_K_ROW: tl.constexpr,
    PREFIX_K_HEAD: tl.constexpr,
    PREFIX_V_ROW: tl.constexpr,
    PREFIX_V_HEAD: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[T,H,D] for one tile of tokens and one key head; `tokens` is the row length of bounds [2,T].

    `shared` keys and values lie before every sequence. WINDOW 0: none.
    """
    kv_head = tl.program_id(0) % KV_HEADS
    tile = tiles + 4 * (tl.program_id(0) // KV_HEADS)
    q_first, q_last, k_first, k_last = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    if q_first == q_last:
        return

    rows = tl.arange(0, BLOCK_M)
    token, head = q_first + rows // GROUP, kv_head * GROUP + rows % GROUP
    valid = token < q_last

    q_offsets = token.to(tl.int64) * Q_ROW + head * Q_HEAD
    q0 = _load_part(q, q_offsets, valid, 0, WIDTH0, HEAD_DIM, True)
    q1 = _load_part(q, q_offsets, valid, WIDTH0, WIDTH1, HEAD_DIM, True) if WIDTH1 > 0 else q0
    out0 = tl.zeros([BLOCK_M, WIDTH0], tl.float32)
    out1 = tl.zeros([BLOCK_M, WIDTH1 if WIDTH1 > 0 else 1], tl.float32)
    top, total = tl.full([BLOCK_M], LOWEST, tl.float32), tl.zeros([BLOCK_M], tl.float32)

    if prefix_k is not None:
        # A query counts its distance to a shared key over the tokens between them.
        begin = tl.load(bounds + token, mask=valid, other=0)
        from_shared = tl.maximum(token - begin + shared - WINDOW + 1, 0) if WINDOW > 0 else tl.zeros_like(token)
        to_shared = tl.zeros_like(token) + shared
        start = tl.min(tl.where(valid, from_shared, shared), axis=0)
        for i in tl.range(tl.cdiv(shared - start, BLOCK_N), num_stages=1):
            out0, out1, top, total = _attend(
                out0, out1, top, total, q0, q1, prefix_k + kv_head * PREFIX_K_HEAD, prefix_v + kv_head * PREFIX_V_HEAD,
                start + i * BLOCK_N, from_shared, to_shared, shared,
                PREFIX_K_ROW, PREFIX_V_ROW, WIDTH0, WIDTH1, HEAD_DIM, SCALE, BLOCK_N, True, False,
            )  # fmt: skip

    begin = tl.load(bounds + token, mask=valid, other=0)
    high = token + 1 if CAUSAL else tl.load(bounds + tokens + token, mask=valid, other=0)
    low = tl.maximum(begin, token - WINDOW + 1) if WINDOW > 0 else begin
    high = tl.where(valid, high, low)  # a row that is none sees nothing
    start = tl.maximum(k_first, q_first - WINDOW + 1) if WINDOW > 0 else k_first
    end = tl.minimum(k_last, q_last) if CAUSAL else k_last
    all_low = tl.max(tl.where(valid, low, 0), axis=0)
    all_high = tl.min(tl.where(valid, high, end), axis=0)
    out0, out1, top, total = _attend_all(
        out0, out1, top, total, q0, q1, k + kv_head * K_HEAD, v + kv_head * V_HEAD,
        low, high, start, all_low, all_high, end,
        K_ROW, V_ROW, WIDTH0, WIDTH1, HEAD_DIM, SCALE, BLOCK_N, True,
    )  # fmt: skip

    token = tl.load(tile) + rows // GROUP  # read again: kept through the loops, it would cost registers there
    valid = token < tl.load(tile + 1)
    out_offsets = token.to(tl.int64) * OUT_ROW + head * OUT_HEAD
    _store_part(out, out_offsets, out0, total, valid, 0, WIDTH0, HEAD_DIM)
    if WIDTH1 > 0:
        _store_part(out, out_offsets, out1, total, valid, WIDTH0, WIDTH1, HEAD_DIM)


@triton.jit(do_not_specialize=["shared"])
def _pooled_attention_kernel(
    q,
    k,
    v,
    out,
    cu_seqlens,
    query_rows,
    prefix_k,
    prefix_v,
    shared,
    Q_ROW: tl.constexpr,
    Q_HEAD: tl.constexpr,
    K_ROW: tl.constexpr,
    K_HEAD: tl.constexpr,
    V_ROW: tl.constexpr,
    V_HEAD: tl.constexpr,
    OUT_ROW: tl.constexpr,
    OUT_HEAD: tl.constexpr,
    PREFIX_K_ROW: tl.constexpr,
    PREFIX_K_HEAD: tl.constexpr,
    PREFIX_V_ROW: tl.constexpr,
    PREFIX_V_HEAD: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[B,H,D] for the query q[query_rows[b]] of one sequence and one key head. A sequence of no tokens gives 0."""
    kv_head, sequence = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS
    begin, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    present = tl.minimum(end - begin, 1)
    rows = tl.arange(0, BLOCK_M)
    valid, head = rows < GROUP, kv_head * GROUP + rows % GROUP

    query = tl.load(query_rows + sequence).to(tl.int64)
    q_offsets = query * Q_ROW + head * Q_HEAD
    asked = rows < present * GROUP
    q0 = _load_part(q, q_offsets, asked, 0, WIDTH0, HEAD_DIM, True)
    q1 = _load_part(q, q_offsets, asked, WIDTH0, WIDTH1, HEAD_DIM, True) if WIDTH1 > 0 else q0
    out0 = tl.zeros([BLOCK_M, WIDTH0], tl.float32)
    out1 = tl.zeros([BLOCK_M, WIDTH1 if WIDTH1 > 0 else 1], tl.float32)
    top, total = tl.full([BLOCK_M], LOWEST, tl.float32), tl.zeros([BLOCK_M], tl.float32)

    if prefix_k is not None:
        start = tl.minimum(tl.maximum(end - begin + shared - WINDOW, 0), shared) if WINDOW > 0 else 0
        stop = start + present * (shared - start)
        out0, out1, top, total = _attend_all(
            out0, out1, top, total, q0, q1, prefix_k + kv_head * PREFIX_K_HEAD, prefix_v + kv_head * PREFIX_V_HEAD,
            tl.zeros_like(rows) + start, tl.zeros_like(rows) + stop, start, start, stop, stop,
            PREFIX_K_ROW, PREFIX_V_ROW, WIDTH0, WIDTH1, HEAD_DIM, SCALE, BLOCK_N, False,
        )  # fmt: skip
    start = tl.maximum(begin, end - WINDOW) if WINDOW > 0 else begin
    out0, out1, top, total = _attend_all(
        out0, out1, top, total, q0, q1, k + kv_head * K_HEAD, v + kv_head * V_HEAD,
        tl.zeros_like(rows) + start, tl.zeros_like(rows) + end, start, start, end, end,
        K_ROW, V_ROW, WIDTH0, WIDTH1, HEAD_DIM, SCALE, BLOCK_N, False,
    )  # fmt: skip

    total = tl.where(asked, total, 1.0)
    out_offsets = sequence.to(tl.int64) * OUT_ROW + head * OUT_HEAD
    _store_part(out, out_offsets, out0, total, valid, 0, WIDTH0, HEAD_DIM)
    if WIDTH1 > 0:
        _store_part(out, out_offsets, out1, total, valid, WIDTH0, WIDTH1, HEAD_DIM)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: Packed,
    causal: bool,
    window: int | None,
    scale: float,
    prefix: tuple[Tensor, Tensor] | None = None,
    config: Config | None = None,
) -> Tensor:
    """See `ops.varlen_attention`. Rows that no tile of `packed` covers are left as they were allocated."""
    group = q.shape[1] // k.shape[1]
    config = config or _config("attention", q.shape[2], q.dtype, q.device)
    tiles, bounds = packed.tiles(_tile_tokens(config, group)), packed.bounds
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launch(
        _varlen_attention_kernel,
        (len(tiles) * k.shape[1],),
        (
            q,
            k,
            v,
            out,
            tiles,
            bounds,
            *(prefix or (None, None)),
            bounds.stride(0),
            0 if prefix is None else len(prefix[0]),
        ),
        {
            **_layout(q, k, v, out, prefix),
            "CAUSAL": causal,
            "WINDOW": window or 0,
            "SCALE": _exp2_scale(scale),
            "BLOCK_M": _block_m(config, group),
            "BLOCK_N": config.block_n,
        },
        config.num_warps,
        config.num_stages,
    )
    return out


def pooled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: Packed,
    rows: Tensor,
    window: int | None,
    scale: float,
    prefix: tuple[Tensor, Tensor] | None = None,
    config: Config | None = None,
) -> Tensor:
    """See `ops.pooled_attention`. A sequence without tokens, where `packed` was padded with such, gives zeros."""
    config = config or _config("pooled_attention", q.shape[2], q.dtype, q.device)
    out = torch.empty((len(rows), *q.shape[1:]), dtype=q.dtype, device=q.device)
    launch(
        _pooled_attention_kernel,
        (len(rows) * k.shape[1],),
        (q, k, v, out, packed.cu_seqlens, rows, *(prefix or (None, None)), 0 if prefix is None else len(prefix[0])),
        {
            **_layout(q, k, v, out, prefix),
            "WINDOW": window or 0,
            "SCALE": _exp2_scale(scale),
            "BLOCK_M": max(SMALLEST_DOT, triton.next_power_of_2(q.shape[1] // k.shape[1])),
            "BLOCK_N": config.block_n,
        },
        config.num_warps,
        config.num_stages,
    )
    return out


def tile_tokens(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> int:
    """The most tokens a tile of `varlen_attention` holds: `packed.tiles` of this size is what it reads."""
    return _tile_tokens(_config("attention", head_dim, dtype, device), heads // kv_heads)


def check(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """ValueError: no attention kernel for such heads, in a sentence."""
    if dtype not in DTYPES:
        raise ValueError(f"the attention kernels take float16, bfloat16 or float32, not {str(dtype).split('.')[-1]}")
    if not SMALLEST_DOT <= head_dim <= LARGEST_HEAD or head_dim % SMALLEST_DOT:
        raise ValueError(
            f"the attention kernels take head sizes that are multiples of {SMALLEST_DOT} up to {LARGEST_HEAD},"
            f" not {head_dim}"
        )
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key heads evenly")


def _widths(head_dim: int) -> tuple[int, int]:
    """A head as two blocks, both powers of two: 80 = 64 + 16; the second may reach past its end, 112 = 64 + 64."""
    first = 1 << head_dim.bit_length() - 1
    return first, max(SMALLEST_DOT, triton.next_power_of_2(head_dim - first)) if head_dim > first else 0


def _config(kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> Config:
    return blocks.of(device).config(kernel, itemsize=dtype.itemsize, head_dim=head_dim)


def _block_m(config: Config, group: int) -> int:
    return max(config.block_m, triton.next_power_of_2(group))


def _tile_tokens(config: Config, group: int) -> int:
    return _block_m(config, group) // group


def _exp2_scale(scale: float) -> float:
    if not scale > 0:
        raise ValueError(f"attention scores scaled by {scale}")
    return scale * math.log2(math.e)


def _layout(q: Tensor, k: Tensor, v: Tensor, out: Tensor, prefix: tuple[Tensor, Tensor] | None) -> dict[str, int]:
    """What both kernels know of their tensors when they are compiled. ValueError: see `check`."""
    check(q.shape[1], k.shape[1], q.shape[2], q.dtype)
    given = {"q": q, "k": k, "v": v, **dict(zip(("prefix_k", "prefix_v"), prefix or (), strict=False))}
    for name, tensor in given.items():
        if tensor.stride(-1) != 1 or tensor.dtype != q.dtype:
            raise ValueError(f"attention over {name} of {tensor.dtype} with strides {tensor.stride()}, q of {q.dtype}")
    prefix_k, prefix_v = prefix or (k[:0], v[:0])
    strides = {"Q": q, "K": k, "V": v, "OUT": out, "PREFIX_K": prefix_k, "PREFIX_V": prefix_v}
    width0, width1 = _widths(q.shape[2])
    return {
        **{
            f"{name}_{axis}": tensor.stride(i)
            for name, tensor in strides.items()
            for i, axis in enumerate(("ROW", "HEAD"))
        },
        "KV_HEADS": k.shape[1],
        "GROUP": q.shape[1] // k.shape[1],
        "WIDTH0": width0,
        "WIDTH1": width1,
        "HEAD_DIM": q.shape[2],
    }
