"""One vector per sequence: one program pools, truncates and normalizes each vector in registers."""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_embed.kernels.gpu import blocks
from triton_embed.kernels.gpu.blocks import Config
from triton_embed.kernels.gpu.functions import row_stride
from triton_embed.kernels.gpu.launch import launch
from triton_embed.kernels.packed import Packed


@triton.jit(do_not_specialize=["size"])
def _segment_pool_kernel(
    x,  # [T, WIDTH]
    cu_seqlens,  # [B + 1]; None: sequence b is row b alone
    dims,  # [B]: the dimensions of each vector; None: `size` for every vector
    y,  # fp32 [B, WIDTH] dense
    size,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    MODE: tl.constexpr,
    L2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    sequence = tl.program_id(0)
    column = tl.arange(0, BLOCK_N)
    start, end = sequence, sequence + 1
    if cu_seqlens is not None:
        start, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    pooled = tl.zeros([BLOCK_N], tl.float32)  # for empty sequences, which pad a batch to a fixed size
    if start < end:
        pooled = _pool_rows(x, start, end, column, STRIDE, WIDTH, MODE, BLOCK_M, BLOCK_N)
    if dims is not None:
        size = tl.load(dims + sequence)
    pooled = tl.where(column < size, pooled, 0.0)
    if L2:
        norm = tl.sqrt(tl.sum(pooled * pooled, axis=0))
        pooled /= tl.maximum(norm, 1e-12, propagate_nan=tl.PropagateNan.ALL)  # the eps of F.normalize
    tl.store(y + sequence.to(tl.int64) * WIDTH + column, pooled, mask=column < WIDTH)


@triton.jit
def _pool_rows(
    x,
    start,
    end,
    column,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Pool rows start..end, at least one, into one vector: fp32 [N]."""
    if MODE == "cls" or MODE == "last":
        row = start if MODE == "cls" else end - 1
        pointers = x + row.to(tl.int64) * STRIDE + column
        pooled = tl.load(pointers, mask=column < WIDTH, other=0.0).to(tl.float32)
    else:
        identity: tl.constexpr = 0.0 if MODE == "mean" else float("-inf")
        total = tl.full([BLOCK_M, BLOCK_N], identity, tl.float32)
        for first in range(start, end, BLOCK_M):
            row = first + tl.arange(0, BLOCK_M)
            pointers = x + row.to(tl.int64)[:, None] * STRIDE + column[None, :]
            mask = (row < end)[:, None] & (column < WIDTH)[None, :]
            values = tl.load(pointers, mask=mask, other=identity).to(tl.float32)
            total = total + values if MODE == "mean" else tl.maximum(total, values, propagate_nan=tl.PropagateNan.ALL)
        if MODE == "mean":
            pooled = tl.sum(total, axis=0) / (end - start).to(tl.float32)
        else:
            has_nan = tl.max((total != total).to(tl.int32), axis=0)  # tl.max ignores NaN
            pooled = tl.where(has_nan > 0, float("nan"), tl.max(total, axis=0))
    return pooled


def segment_pool(
    x: Tensor,
    packed: Packed,
    mode: str,
    dims: Sequence[int],
    project: Callable[[Tensor], Tensor] | None = None,
    l2: bool = True,
    config: Config | None = None,
) -> Tensor:
    """Pool each sequence to one vector; see `Ops.segment_pool`. Empty sequences, used as padding, give zeros."""
    if project is None:
        return _pool(x, packed.cu_seqlens, mode, dims, l2, config)
    pooled = project(_pool(x, packed.cu_seqlens, mode, [x.shape[1]] * len(dims), False, config))
    return _pool(pooled, None, "cls", dims, l2, config)


def _pool(
    x: Tensor, cu_seqlens: Tensor | None, mode: str, dims: Sequence[int], l2: bool, config: Config | None
) -> Tensor:
    width = x.shape[1]
    config = config or blocks.table_for(x.device).config("pooling", width=width)
    y = torch.empty((len(dims), width), dtype=torch.float32, device=x.device)
    launch(
        _segment_pool_kernel,
        (len(dims),),
        (x, cu_seqlens, None if min(dims) == max(dims) else _on_device(dims, x.device), y, dims[0]),
        {
            "STRIDE": row_stride(x),
            "WIDTH": width,
            "MODE": mode,
            "L2": l2,
            "BLOCK_M": config.block_m,
            "BLOCK_N": triton.next_power_of_2(width),
        },
        config.num_warps,
    )
    return y


def _on_device(dims: Sequence[int], device: torch.device) -> Tensor:
    """Copy without waiting for the device, which requires pinned memory."""
    sizes = torch.tensor(dims, dtype=torch.int32, pin_memory=device.type == "cuda")
    return sizes.to(device, non_blocking=True)
