"""The patch kernel against torch's unfold in float64: patch and block sizes, frames, channels, strides."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from conftest import assert_close, guarded
from triton_embed.kernels.gpu.patchify import patchify

SIZES = [
    # height, width, channels, patch, merge, frames
    (28, 28, 3, 14, 2, 2),
    (56, 84, 3, 14, 2, 2),
    (28, 42, 3, 14, 1, 1),
    (32, 96, 3, 32, 1, 1),
    (32, 16, 3, 16, 1, 2),
    (30, 18, 3, 2, 3, 1),
    (5, 15, 1, 5, 1, 3),
    (12, 6, 4, 3, 2, 2),
    (1, 2, 2, 1, 1, 1),
]


def image_of(height: int, width: int, channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (height, width, channels), dtype=torch.uint8, generator=generator)


def statistics(channels: int) -> tuple[Tensor, Tensor]:
    """Create CLIP's mean and std, and distinct values for a fourth channel."""
    mean, std = [0.48145466, 0.4578275, 0.40821073, 0.1], [0.26862954, 0.26130258, 0.27577711, 1.5]
    return guarded(torch.tensor(mean[:channels])), guarded(torch.tensor(std[:channels]))


def float64_patches(image: Tensor, patch: int, merge: int, frames: int, mean: Tensor, std: Tensor) -> Tensor:
    """Split the image into patches with unfold, row by row, then reorder them by merge x merge blocks."""
    height, width, channels = image.shape
    pixels = (image.double() / 255 - mean.double()) / std.double()
    rows = F.unfold(pixels.permute(2, 0, 1)[None], patch, stride=patch)[0].T.unflatten(1, (channels, 1, -1))
    patch_columns = width // patch
    order = [
        (block_row + row) * patch_columns + block_column + column
        for block_row in range(0, height // patch, merge)
        for block_column in range(0, patch_columns, merge)
        for row in range(merge)
        for column in range(merge)
    ]
    return rows[order].expand(-1, -1, frames, -1).flatten(1)


@pytest.mark.parametrize(("height", "width", "channels", "patch", "merge", "frames"), SIZES)
def test_patches_match_unfold(height: int, width: int, channels: int, patch: int, merge: int, frames: int) -> None:
    image, (mean, std) = guarded(image_of(height, width, channels)), statistics(channels)
    result = patchify(image, patch, merge, frames, mean, std)
    assert result.dtype == torch.float32
    assert_close(result, float64_patches(image, patch, merge, frames, mean, std))


def test_strided_image() -> None:
    image, (mean, std) = guarded(image_of(12, 50, 3)[:, 10:34]), statistics(3)
    assert_close(patchify(image, 4, 3, 2, mean, std), float64_patches(image, 4, 3, 2, mean, std))


def test_row_strides_beyond_32_bits() -> None:
    near, (mean, std) = image_of(4, 4, 3), statistics(3)
    far = torch.empty(3 * 2**30 + 12, dtype=torch.uint8).as_strided((4, 4, 3), (2**30, 3, 1)).copy_(near)
    assert_close(patchify(far, 2, 1, 1, mean, std), float64_patches(near, 2, 1, 1, mean, std))


def test_noncontiguous_pixels_are_rejected() -> None:
    mean, std = statistics(3)
    for image in (image_of(8, 16, 3)[:, ::2], image_of(3, 8, 8).permute(1, 2, 0), image_of(8, 8, 6)[..., ::2]):
        with pytest.raises(ValueError, match="not contiguous"):
            patchify(image, 4, 1, 1, mean, std)
    for statistics_pair in ((torch.zeros(6)[::2], std), (mean, torch.ones(6)[::2])):
        with pytest.raises(ValueError, match="not contiguous"):
            patchify(image_of(8, 8, 3), 4, 1, 1, *statistics_pair)
