"""Attention over packed sequences: one tile of neighboring tokens per program, or one query per sequence.

The query heads that share a key head are rows of one block (row = token * group + head), because they read the same
keys. Softmax statistics are fp32. Scores are also scaled by log2(e), so that exp2 replaces exp. X_ROW and X_HEAD are
the strides of a tensor x in elements. A head is computed in two parts of WIDTH0 and WIDTH1 columns; see `_split_head`.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_embed.kernels.gpu import blocks
from triton_embed.kernels.gpu.blocks import Config
from triton_embed.kernels.gpu.launch import launch
from triton_embed.kernels.packed import Packed

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_DOT_SIZE = 16  # `tl.dot` needs blocks of at least this many rows and columns
MAX_HEAD_DIM = 256
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # below every score but finite, so differences are not NaN


@triton.jit
def _load_part(
    x, offsets, mask, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr
):
    """Load columns FIRST.. of the rows starting at `offsets` [n]: [n,WIDTH], 0 outside `mask` [n] and past HEAD_DIM."""
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
def _row_offsets(ROWS: tl.constexpr, STRIDE: tl.constexpr):
    """Return the offset of each row of a block, in 64 bits where 32 would overflow."""
    rows = tl.arange(0, ROWS)
    return rows.to(tl.int64) * STRIDE if ROWS * STRIDE >= 2**31 else rows * STRIDE


@triton.jit
def _isolate_nonfinite(scores, v):
    """Set scores to NaN for the keys whose values v [n,D] are not finite, and set such values to 0.

    A row that does not see a key multiplies the key's values by 0, and 0 times a non-finite value is NaN.
    """
    finite = tl.abs(v.to(tl.float32)) < float("inf")
    nonfinite = tl.max(tl.where(finite, 0, 1), axis=1)
    return tl.where(nonfinite[None, :] > 0, float("nan"), scores), tl.where(finite, v, 0.0)


@triton.jit
def _store_part(out, offsets, sums, total, mask, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Write sums / total to columns FIRST.. of the rows starting at `offsets` [n], inside `mask` [n]."""
    columns = FIRST + tl.arange(0, WIDTH)[None, :]
    means = (sums / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + offsets[:, None] + columns, means, mask=mask[:, None] & (columns < HEAD_DIM))


@triton.jit
def _attend_block(
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
    """Add one block of a head's keys, starting at `first`, to the running softmax.

    out0 [M,WIDTH0] and out1 [M,WIDTH1] are sums of values weighted by exp2(score - top), `total` [M] is the sum of the
    weights, and `top` [M] is the largest score so far.

    MASKED: row m sees only the keys low[m] <= key < high[m]; keys from `end` on are not read.
    ISOLATED: keys with non-finite values do not affect the rows that do not see them.
    """
    keys = first + tl.arange(0, BLOCK_N)
    mask = keys < end
    k, v = k + first.to(tl.int64) * K_ROW, v + first.to(tl.int64) * V_ROW
    k_offsets, v_offsets = _row_offsets(BLOCK_N, K_ROW), _row_offsets(BLOCK_N, V_ROW)
    k0 = _load_part(k, k_offsets, mask, 0, WIDTH0, HEAD_DIM, MASKED)
    v0 = _load_part(v, v_offsets, mask, 0, WIDTH0, HEAD_DIM, MASKED)
    scores = tl.dot(q0, tl.trans(k0), input_precision="ieee")
    if WIDTH1 > 0:
        k1 = _load_part(k, k_offsets, mask, WIDTH0, WIDTH1, HEAD_DIM, MASKED)
        v1 = _load_part(v, v_offsets, mask, WIDTH0, WIDTH1, HEAD_DIM, MASKED)
        scores = tl.dot(q1, tl.trans(k1), scores, input_precision="ieee")
    if ISOLATED:
        scores, v0 = _isolate_nonfinite(scores, v0)
        if WIDTH1 > 0:
            scores, v1 = _isolate_nonfinite(scores, v1)
    if MASKED:
        scores = tl.where((keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None]), scores, float("-inf"))

    new_top = tl.maximum(top, tl.max(scores, axis=1) * SCALE)
    weights = tl.math.exp2(scores * SCALE - new_top[:, None])
    rescale = tl.math.exp2(top - new_top)
    total = total * rescale + tl.sum(weights, axis=1)
    weights = weights.to(v0.dtype)
    out0 = tl.dot(weights, v0, out0 * rescale[:, None], input_precision="ieee")
    if WIDTH1 > 0:
        out1 = tl.dot(weights, v1, out1 * rescale[:, None], input_precision="ieee")
    return out0, out1, new_top, total


@triton.jit
def _attend_range(
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
    """Add the keys `start`..`end` to the running softmax.

    Row m sees the keys `low[m]`..`high[m]`. Every row sees the keys `all_low`..`all_high`, so blocks within that range
    are computed without a mask. They come first: a loop before theirs changes the accumulators in other instructions,
    and ptxas then lets every tensor core instruction of theirs wait for the one before (its warning C7515).
    """
    block_count = tl.cdiv(end - start, BLOCK_N)
    unmasked_from = tl.minimum(tl.cdiv(all_low - start, BLOCK_N), block_count)
    unmasked = tl.maximum((all_high - start) // BLOCK_N - unmasked_from, 0)
    for i in range(unmasked_from, unmasked_from + unmasked):
        out0, out1, top, total = _attend_block(
            out0, out1, top, total, q0, q1, k, v, start + i * BLOCK_N, low, high, end,
            K_ROW, V_ROW, WIDTH0, WIDTH1, HEAD_DIM, SCALE, BLOCK_N, False, False,
        )  # fmt: skip
    for i in tl.range(block_count - unmasked, num_stages=1):  # few blocks: saving registers beats pipelining
        first = start + tl.where(i < unmasked_from, i, i + unmasked) * BLOCK_N
        out0, out1, top, total = _attend_block(
            out0, out1, top, total, q0, q1, k, v, first, low, high, end,
            K_ROW, V_ROW, WIDTH0, WIDTH1, HEAD_DIM, SCALE, BLOCK_N, True, ISOLATED,
        )  # fmt: skip
    return out0, out1, top, total


@triton.jit(do_not_specialize=["tokens", "prefix_tokens"])
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
    prefix_tokens,
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
    """Compute out [T,H,D] for one tile of tokens and one key head.

    `tokens` is the row length of bounds [2,T]. `prefix_tokens` keys and values precede every sequence. WINDOW is 0 if
    there is none.
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

    begin = tl.load(bounds + token, mask=valid, other=0)
    high = token + 1 if CAUSAL else tl.load(bounds + tokens + token, mask=valid, other=0)
    low = tl.maximum(begin, token - WINDOW + 1) if WINDOW > 0 else begin
    high = tl.where(valid, high, low)  # rows past the end of the tile see no keys
    start = tl.maximum(k_first, q_first - WINDOW + 1) if WINDOW > 0 else k_first
    end = tl.minimum(k_last, q_last) if CAUSAL else k_last
    all_low = tl.max(tl.where(valid, low, 0), axis=0)
    all_high = tl.min(tl.where(valid, high, end), axis=0)
    out0, out1, top, total = _attend_range(
        out0, out1, top, total, q0, q1, k + kv_head * K_HEAD, v + kv_head * V_HEAD,
        low, high, start, all_low, all_high, end,
        K_ROW, V_ROW, WIDTH0, WIDTH1, HEAD_DIM, SCALE, BLOCK_N, True,
    )  # fmt: skip

    token = tl.load(tile) + rows // GROUP  # reloaded: kept across the loops, it would use registers
    valid = token < tl.load(tile + 1)
    if prefix_k is not None:  # after the other keys, for the same reason
        # The distance from a query to a prefix key counts the tokens between them, prefix tokens included.
        begin = tl.load(bounds + token, mask=valid, other=0)
        prefix_low = tl.maximum(token - begin + prefix_tokens - WINDOW + 1, 0) if WINDOW > 0 else tl.zeros_like(token)
        prefix_high = tl.zeros_like(token) + prefix_tokens
        start = tl.min(tl.where(valid, prefix_low, prefix_tokens), axis=0)
        for i in tl.range(tl.cdiv(prefix_tokens - start, BLOCK_N), num_stages=1):
            out0, out1, top, total = _attend_block(
                out0, out1, top, total, q0, q1, prefix_k + kv_head * PREFIX_K_HEAD, prefix_v + kv_head * PREFIX_V_HEAD,
                start + i * BLOCK_N, prefix_low, prefix_high, prefix_tokens,
                PREFIX_K_ROW, PREFIX_V_ROW, WIDTH0, WIDTH1, HEAD_DIM, SCALE, BLOCK_N, True, False,
            )  # fmt: skip

    out_offsets = token.to(tl.int64) * OUT_ROW + head * OUT_HEAD
    _store_part(out, out_offsets, out0, total, valid, 0, WIDTH0, HEAD_DIM)
    if WIDTH1 > 0:
        _store_part(out, out_offsets, out1, total, valid, WIDTH0, WIDTH1, HEAD_DIM)


@triton.jit(do_not_specialize=["prefix_tokens"])
def _pooled_attention_kernel(
    q,
    k,
    v,
    out,
    cu_seqlens,
    query_rows,
    prefix_k,
    prefix_v,
    prefix_tokens,
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
    """Compute out [B,H,D] for the query q[query_rows[b]] of one sequence and one key head. Empty sequences give 0."""
    kv_head, sequence = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS
    begin, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    present = tl.minimum(end - begin, 1)
    rows = tl.arange(0, BLOCK_M)
    valid, head = rows < GROUP, kv_head * GROUP + rows % GROUP

    query = tl.load(query_rows + sequence).to(tl.int64)
    q_offsets = query * Q_ROW + head * Q_HEAD
    query_mask = rows < present * GROUP
    q0 = _load_part(q, q_offsets, query_mask, 0, WIDTH0, HEAD_DIM, True)
    q1 = _load_part(q, q_offsets, query_mask, WIDTH0, WIDTH1, HEAD_DIM, True) if WIDTH1 > 0 else q0
    out0 = tl.zeros([BLOCK_M, WIDTH0], tl.float32)
    out1 = tl.zeros([BLOCK_M, WIDTH1 if WIDTH1 > 0 else 1], tl.float32)
    top, total = tl.full([BLOCK_M], LOWEST, tl.float32), tl.zeros([BLOCK_M], tl.float32)

    if prefix_k is not None:
        start = tl.minimum(tl.maximum(end - begin + prefix_tokens - WINDOW, 0), prefix_tokens) if WINDOW > 0 else 0
        stop = start + present * (prefix_tokens - start)
        out0, out1, top, total = _attend_range(
            out0, out1, top, total, q0, q1, prefix_k + kv_head * PREFIX_K_HEAD, prefix_v + kv_head * PREFIX_V_HEAD,
            tl.zeros_like(rows) + start, tl.zeros_like(rows) + stop, start, start, stop, stop,
            PREFIX_K_ROW, PREFIX_V_ROW, WIDTH0, WIDTH1, HEAD_DIM, SCALE, BLOCK_N, False,
        )  # fmt: skip
    start = tl.maximum(begin, end - WINDOW) if WINDOW > 0 else begin
    out0, out1, top, total = _attend_range(
        out0, out1, top, total, q0, q1, k + kv_head * K_HEAD, v + kv_head * V_HEAD,
        tl.zeros_like(rows) + start, tl.zeros_like(rows) + end, start, start, end, end,
        K_ROW, V_ROW, WIDTH0, WIDTH1, HEAD_DIM, SCALE, BLOCK_N, False,
    )  # fmt: skip

    total = tl.where(query_mask, total, 1.0)
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
    """Attend within each sequence; see `Ops.varlen_attention`. Rows that no tile covers stay uninitialized."""
    group = q.shape[1] // k.shape[1]
    config = config or _look_up_config("attention", q.shape[2], q.dtype, q.device)
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
            **_constants(q, k, v, out, prefix),
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
    """Attend with one query per sequence; see `Ops.pooled_attention`. Empty sequences, used as padding, give zeros."""
    config = config or _look_up_config("pooled_attention", q.shape[2], q.dtype, q.device)
    out = torch.empty((len(rows), *q.shape[1:]), dtype=q.dtype, device=q.device)
    launch(
        _pooled_attention_kernel,
        (len(rows) * k.shape[1],),
        (q, k, v, out, packed.cu_seqlens, rows, *(prefix or (None, None)), 0 if prefix is None else len(prefix[0])),
        {
            **_constants(q, k, v, out, prefix),
            "WINDOW": window or 0,
            "SCALE": _exp2_scale(scale),
            "BLOCK_M": max(MIN_DOT_SIZE, triton.next_power_of_2(q.shape[1] // k.shape[1])),
            "BLOCK_N": config.block_n,
        },
        config.num_warps,
        config.num_stages,
    )
    return out


def tile_tokens(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return the tile size of `varlen_attention` in tokens: it reads `packed.tiles` of this size."""
    return _tile_tokens(_look_up_config("attention", head_dim, dtype, device), heads // kv_heads)


def check_supported(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Check that the kernels support these heads and this dtype.

    Raises:
        ValueError: They do not; the message says why.
    """
    if dtype not in DTYPES:
        raise ValueError(
            f"The attention kernels support float16, bfloat16 and float32, got {str(dtype).split('.')[-1]}"
        )
    if not MIN_DOT_SIZE <= head_dim <= MAX_HEAD_DIM or head_dim % MIN_DOT_SIZE:
        raise ValueError(
            f"The attention kernels support head sizes that are multiples of {MIN_DOT_SIZE} up to {MAX_HEAD_DIM},"
            f" got {head_dim}"
        )
    if heads % kv_heads:
        raise ValueError(
            f"The number of query heads must be a multiple of the number of key heads, got {heads} and {kv_heads}"
        )


def _split_head(head_dim: int) -> tuple[int, int]:
    """Split a head into two blocks, both powers of two: 80 = 64 + 16. The second may overhang: 112 = 64 + 64."""
    first = 1 << head_dim.bit_length() - 1
    return first, max(MIN_DOT_SIZE, triton.next_power_of_2(head_dim - first)) if head_dim > first else 0


def _look_up_config(kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> Config:
    return blocks.table_for(device).config(kernel, itemsize=dtype.itemsize, head_dim=head_dim)


def _block_m(config: Config, group: int) -> int:
    return max(config.block_m, triton.next_power_of_2(group))


def _tile_tokens(config: Config, group: int) -> int:
    return _block_m(config, group) // group


def _exp2_scale(scale: float) -> float:
    if not scale > 0:
        raise ValueError(f"The attention scale must be positive, got {scale}")
    return scale * math.log2(math.e)


def _constants(q: Tensor, k: Tensor, v: Tensor, out: Tensor, prefix: tuple[Tensor, Tensor] | None) -> dict[str, int]:
    """Return the compile-time constants that both kernels derive from their tensors.

    Raises:
        ValueError: The kernels do not support the heads or the dtype, or the tensors differ in dtype or are not
            contiguous in their last dimension.
    """
    check_supported(q.shape[1], k.shape[1], q.shape[2], q.dtype)
    inputs = {"q": q, "k": k, "v": v, **dict(zip(("prefix_k", "prefix_v"), prefix or (), strict=False))}
    for name, tensor in inputs.items():
        if tensor.stride(-1) != 1 or tensor.dtype != q.dtype:
            raise ValueError(
                f"Attention needs {name} in the dtype of q ({q.dtype}) with a contiguous last dimension,"
                f" got {tensor.dtype} with strides {tensor.stride()}"
            )
    prefix_k, prefix_v = prefix or (k[:0], v[:0])
    strides = {"Q": q, "K": k, "V": v, "OUT": out, "PREFIX_K": prefix_k, "PREFIX_V": prefix_v}
    width0, width1 = _split_head(q.shape[2])
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
