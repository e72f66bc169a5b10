"""Linear layers that apply their activation while the product is still in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_embed.kernels.gpu import blocks
from triton_embed.kernels.gpu.blocks import Config
from triton_embed.kernels.gpu.functions import activate, row_stride
from triton_embed.kernels.gpu.launch import launch

GROUP = 8  # row blocks that use the same weight block at about the same time, while the L2 cache holds it


@triton.jit(do_not_specialize=["count"])
def _linear_kernel(
    x,  # [count, K]
    weight,  # [N, K]
    bias,  # [N] or None
    y,  # [count, N] dense
    count,
    X_STRIDE: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    # Consecutive programs cover GROUP row blocks, then move on to the next column block.
    group_size = GROUP * tl.cdiv(N, BLOCK_N)
    first_block = tl.program_id(0) // group_size * GROUP
    height = tl.minimum(tl.cdiv(count, BLOCK_M) - first_block, GROUP)
    index = tl.program_id(0) % group_size
    row = (first_block + index % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = index // height * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    # Rows past the end repeat the last row, so the loop needs no row mask. They are not stored.
    x_pointers = x + tl.minimum(row, count - 1).to(tl.int64)[:, None] * X_STRIDE + inner[None, :]
    weight_pointers = weight + tl.minimum(column, N - 1).to(tl.int64)[None, :] * WEIGHT_STRIDE + inner[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            x_block, weight_block = tl.load(x_pointers + start), tl.load(weight_pointers + start)
        else:
            x_block = tl.load(x_pointers + start, mask=(inner < K - start)[None, :], other=0.0)
            weight_block = tl.load(weight_pointers + start, mask=(inner < K - start)[:, None], other=0.0)
        total = tl.dot(x_block, weight_block, total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    out = y + row.to(tl.int64)[:, None] * N + column[None, :]
    mask = (row < count)[:, None] & (column < N)[None, :]
    tl.store(out, activate(total, KIND).to(y.dtype.element_ty), mask=mask)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None = None, config: Config | None = None
) -> Tensor:
    """Compute act(x W^T + b); see `Ops.linear`.

    Raises:
        LookupError: No config is passed, and the table leaves this size to torch.
    """
    (count, inputs), outputs = x.shape, len(weight)
    sizes = {"tokens": count, "outputs": outputs, "inputs": inputs, "itemsize": x.element_size()}
    config = config or blocks.table_for(x.device).config("linear", **sizes)
    if bias is not None:
        row_stride(bias)
    y = torch.empty((count, outputs), dtype=x.dtype, device=x.device)
    launch(
        _linear_kernel,
        (triton.cdiv(count, config.block_m) * triton.cdiv(outputs, config.block_n),),
        (x, weight, bias, y, count),
        {
            "X_STRIDE": row_stride(x),
            "WEIGHT_STRIDE": row_stride(weight),
            "N": outputs,
            "K": inputs,
            "KIND": act or "none",
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "GROUP": GROUP,
        },
        config.num_warps,
        config.num_stages,
    )
    return y
