"""Patch extraction: images as input rows of a vision tower, with the position of each patch."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from triton_embed.kernels.ops import Ops
from triton_embed.python_backend.checkpoint.config import ModelConfig
from triton_embed.python_backend.inputs.row import Pixels


@dataclass(frozen=True)
class PatchGrid:
    """The number of patch rows and columns of an image."""

    rows: int
    columns: int

    @property
    def count(self) -> int:
        return self.rows * self.columns


class Patchify:
    """The conversion of an image to normalized patches.

    uint8 [height, width, 3] -> fp32 [patches, 3*frames*patch*patch]. Patches are ordered by block of `merge` x `merge`,
    as the patch merger expects.
    """

    def __init__(self, ops: Ops, model: ModelConfig, patch: int, merge: int, frames: int, device: str) -> None:
        self._ops = ops
        self._patch, self._merge, self._frames, self._device = patch, merge, frames, device
        # An explicit device keeps these constants real when the network is built on the meta device.
        self._mean, self._std = (torch.tensor(channels, device=device) for channels in model.image_normalization)

    def __call__(self, image: Pixels) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(image)).to(self._device)
        return self._ops.patchify(pixels, self._patch, self._merge, self._frames, self._mean, self._std)

    def grid(self, image: Pixels) -> PatchGrid:
        return PatchGrid(image.shape[0] // self._patch, image.shape[1] // self._patch)

    def positions(self, grid: PatchGrid) -> Tensor:
        """Return the row and the column of each patch as [2, patches], in the order of the patches."""
        block = (grid.rows // self._merge, self._merge, grid.columns // self._merge, self._merge)
        positions = torch.stack(torch.meshgrid(torch.arange(grid.rows), torch.arange(grid.columns), indexing="ij"))
        return positions.view(2, *block).permute(0, 1, 3, 2, 4).reshape(2, -1).to(self._device)
