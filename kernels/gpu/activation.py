"""Activations of whole matrices, for products that do not apply their activation themselves."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_embed.kernels.gpu import blocks
from triton_embed.kernels.gpu.blocks import Config
from triton_embed.kernels.gpu.functions import activate, row_stride
from triton_embed.kernels.gpu.launch import launch


@triton.jit(do_not_specialize=["count"])
def _activation_kernel(
    x,  # [count, WIDTH], or [count, 2 * WIDTH] where GATED: the gate, then the values it multiplies
    y,  # [count, WIDTH] dense
    count,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Programs index rows and columns, not one flat range: the compiler then knows the row length and emits wide loads.
    column_blocks: tl.constexpr = tl.cdiv(WIDTH, BLOCK_N)
    row = tl.program_id(0) // column_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < count)[:, None] & (column < WIDTH)[None, :]
    pointers = x + row.to(tl.int64)[:, None] * STRIDE + column[None, :]
    value = activate(tl.load(pointers, mask=mask, other=0.0).to(tl.float32), KIND)
    if GATED:
        value *= tl.load(pointers + WIDTH, mask=mask, other=0.0).to(tl.float32)
    out = y + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(out, value.to(y.dtype.element_ty), mask=mask)


def activation(x: Tensor, kind: str, config: Config | None = None) -> Tensor:
    """Apply an activation; see `Ops.activation`.

    Raises:
        ValueError: x is not a matrix with contiguous rows.
    """
    return _activate(x, x.shape[-1], kind, False, config)


def gated_activation(gate_up: Tensor, config: Config | None = None) -> Tensor:
    """Compute silu(gate) * up; see `Ops.gated_activation`.

    Raises:
        ValueError: gate_up is not a matrix with contiguous rows.
    """
    return _activate(gate_up, gate_up.shape[-1] // 2, "silu", True, config)


def _activate(x: Tensor, width: int, kind: str, gated: bool, config: Config | None) -> Tensor:
    if x.dim() != 2:
        raise ValueError(f"The input of an activation must be a matrix [rows, values], got shape {tuple(x.shape)}")
    config = config or blocks.table_for(x.device).config("elementwise", width=width)
    y = torch.empty((len(x), width), dtype=x.dtype, device=x.device)
    launch(
        _activation_kernel,
        (triton.cdiv(len(x), config.block_m) * triton.cdiv(width, config.block_n),),
        (x, y, len(x)),
        {
            "STRIDE": row_stride(x),
            "WIDTH": width,
            "KIND": kind,
            "GATED": gated,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        },
        config.num_warps,
    )
    return y
