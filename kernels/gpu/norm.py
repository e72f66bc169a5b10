"""Norms of rows, fused with the sum or the lookup that produces a row: memory is read once and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_embed.kernels.gpu import blocks
from triton_embed.kernels.gpu.blocks import Config
from triton_embed.kernels.gpu.functions import row_stride
from triton_embed.kernels.gpu.launch import launch


@triton.jit
def _normalize(x, weight, bias, column, WIDTH: tl.constexpr, EPS: tl.constexpr, CENTERED: tl.constexpr):
    """Normalize fp32 rows x [M,N], which are 0 from `column` WIDTH on: LayerNorm where CENTERED, else RMSNorm."""
    mask = column < WIDTH
    scale = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    if CENTERED:
        x = tl.where(mask[None, :], x - tl.sum(x, axis=1)[:, None] / WIDTH, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, axis=1) / WIDTH + EPS)[:, None] * scale[None, :]
    if CENTERED:
        y += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit(do_not_specialize=["count"])
def _add_norm_kernel(
    x,  # [count, WIDTH]
    residual,  # [.., WIDTH] or None
    rows,  # [count]: the row of `residual` to add to each row of x; None: the row with the same index
    weight,  # [WIDTH]
    bias,  # [WIDTH]; None: RMSNorm
    y,  # [count, WIDTH] dense
    total,  # [count, WIDTH] dense; None: do not store the sum
    count,
    X_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    mask = (row < count)[:, None] & (column < WIDTH)[None, :]
    out_offsets = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    value = tl.load(x + row.to(tl.int64)[:, None] * X_STRIDE + column[None, :], mask=mask, other=0.0)
    if residual is not None:
        source = row if rows is None else tl.load(rows + row, mask=row < count, other=0)
        residual_offsets = source.to(tl.int64)[:, None] * RESIDUAL_STRIDE + column[None, :]
        exact_sum = value.to(tl.float32) + tl.load(residual + residual_offsets, mask=mask, other=0.0).to(tl.float32)
        value = exact_sum.to(value.dtype)  # the norm sees the rounded sum, which the next layer adds to
        if total is not None:
            tl.store(total + out_offsets, value, mask=mask)
    normed = _normalize(value.to(tl.float32), weight, bias, column, WIDTH, EPS, bias is not None)
    tl.store(y + out_offsets, normed.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _embed_layer_norm_kernel(
    ids,  # [count]
    pos,  # [count]
    types,  # [count] or None
    word,  # [.., WIDTH], like `position` and `token_type`
    position,
    token_type,
    weight,  # [WIDTH]
    bias,  # [WIDTH]
    y,  # [count, WIDTH] dense
    count,
    WORD_STRIDE: tl.constexpr,
    POSITION_STRIDE: tl.constexpr,
    TYPE_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    mask = (row < count)[:, None] & (column < WIDTH)[None, :]
    total = _look_up(word, ids, row, column, count, mask, WORD_STRIDE)
    total += _look_up(position, pos, row, column, count, mask, POSITION_STRIDE)
    if types is None:
        total += tl.load(token_type + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    else:
        total += _look_up(token_type, types, row, column, count, mask, TYPE_STRIDE)
    normed = _normalize(total, weight, bias, column, WIDTH, EPS, True)
    tl.store(y + row.to(tl.int64)[:, None] * WIDTH + column[None, :], normed.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _look_up(table, ids, row, column, count, mask, STRIDE: tl.constexpr):
    """Look up rows of `table` in fp32: [M,N], 0 outside `mask`."""
    index = tl.load(ids + row, mask=row < count, other=0).to(tl.int64)
    return tl.load(table + index[:, None] * STRIDE + column[None, :], mask=mask, other=0.0).to(tl.float32)


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    rows: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Add and normalize rows; see `Ops.add_rms_norm`."""
    total = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return _add_norm(x, residual, rows, weight, None, None if residual is None else total, eps, config), total


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    rows: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Add and normalize rows; see `Ops.add_layer_norm`."""
    total = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return _add_norm(x, residual, rows, weight, bias, None if residual is None else total, eps, config), total


def post_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    rows: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Add and normalize rows; see `Ops.post_layer_norm`."""
    y = _add_norm(x, residual, rows, weight, bias, None, eps, config)
    return y, y


def _add_norm(
    x: Tensor,
    residual: Tensor | None,
    rows: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    total: Tensor | None,
    eps: float,
    config: Config | None,
) -> Tensor:
    for vector in (weight, bias, rows):
        if vector is not None:
            row_stride(vector)
    count, width = x.shape
    config = config or blocks.table_for(x.device).config("rowwise", width=width)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        _add_norm_kernel,
        (triton.cdiv(count, config.block_m),),
        (x, residual, rows, weight, bias, y, total, count),
        {
            "X_STRIDE": row_stride(x),
            "RESIDUAL_STRIDE": 0 if residual is None else row_stride(residual),
            "WIDTH": width,
            "EPS": eps,
            "BLOCK_M": config.block_m,
            "BLOCK_N": triton.next_power_of_2(width),
        },
        config.num_warps,
    )
    return y


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
    config: Config | None = None,
) -> Tensor:
    """Sum embeddings and normalize them; see `Ops.embed_layer_norm`."""
    for vector in (ids, pos, types, weight, bias):
        if vector is not None:
            row_stride(vector)
    count, width = len(ids), len(weight)
    config = config or blocks.table_for(ids.device).config("rowwise", width=width)
    y = torch.empty((count, width), dtype=word.dtype, device=ids.device)
    launch(
        _embed_layer_norm_kernel,
        (triton.cdiv(count, config.block_m),),
        (ids, pos, types, word, position, token_type, weight, bias, y, count),
        {
            "WORD_STRIDE": row_stride(word),
            "POSITION_STRIDE": row_stride(position),
            "TYPE_STRIDE": row_stride(token_type),
            "WIDTH": width,
            "EPS": eps,
            "BLOCK_M": config.block_m,
            "BLOCK_N": triton.next_power_of_2(width),
        },
        config.num_warps,
    )
    return y
