"""Conversion of decoded pixels to the rows that a vision tower's first matrix product reads."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_embed.kernels.gpu import blocks
from triton_embed.kernels.gpu.blocks import Config
from triton_embed.kernels.gpu.functions import row_stride
from triton_embed.kernels.gpu.launch import launch


@triton.jit(do_not_specialize=["columns", "stride"])
def _patchify_kernel(
    image,  # uint8 [height, width, CHANNELS]
    mean,  # [CHANNELS]
    std,  # [CHANNELS]
    y,  # fp32 [patches, CHANNELS, FRAMES, PATCH, PATCH] dense
    columns,  # of MERGE x MERGE blocks of patches in the image
    stride,  # elements from one row of pixels to the next
    CHANNELS: tl.constexpr,
    FRAMES: tl.constexpr,
    PATCH: tl.constexpr,
    MERGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    area: tl.constexpr = PATCH * PATCH
    patch = tl.program_id(0)
    block, index_in_block = patch // (MERGE * MERGE), patch % (MERGE * MERGE)
    first_row = (block // columns * MERGE + index_in_block // MERGE) * PATCH
    first_column = (block % columns * MERGE + index_in_block % MERGE) * PATCH
    index = tl.arange(0, BLOCK_N)
    mask = index < CHANNELS * area
    channel, pixel = index // area, index % area
    row, column = first_row + pixel // PATCH, first_column + pixel % PATCH
    pointers = image + row.to(tl.int64) * stride + column * CHANNELS + channel
    value = tl.load(pointers, mask=mask, other=0).to(tl.float32) / 255.0
    value -= tl.load(mean + channel, mask=mask, other=0.0).to(tl.float32)
    value /= tl.load(std + channel, mask=mask, other=1.0).to(tl.float32)
    out = y + patch.to(tl.int64) * (CHANNELS * FRAMES * area) + channel * (FRAMES * area) + pixel
    for frame in tl.static_range(FRAMES):
        tl.store(out + frame * area, value, mask=mask)


def patchify(
    image: Tensor,
    patch: int,
    merge: int,
    frames: int,
    mean: Tensor,
    std: Tensor,
    config: Config | None = None,
) -> Tensor:
    """Cut an image into normalized patches; see `Ops.patchify`.

    Raises:
        ValueError: The pixels of a row are not contiguous.
    """
    height, width, channels = image.shape
    if image.stride()[1:] != (channels, 1):
        raise ValueError(f"The pixels of an image {tuple(image.shape)} are not contiguous: strides {image.stride()}")
    for vector in (mean, std):
        row_stride(vector)
    values = channels * patch * patch
    config = config or blocks.table_for(image.device).config("patchify", values=values)
    y = torch.empty((height * width // patch**2, frames * values), dtype=torch.float32, device=image.device)
    launch(
        _patchify_kernel,
        (len(y),),
        (image, mean, std, y, width // (patch * merge), image.stride(0)),
        {
            "CHANNELS": channels,
            "FRAMES": frames,
            "PATCH": patch,
            "MERGE": merge,
            "BLOCK_N": triton.next_power_of_2(values),
        },
        config.num_warps,
    )
    return y
