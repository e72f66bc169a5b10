"""Patches: pictures as a vision tower's rows of numbers, and where each of them lies."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from triton_embed.kernels import ops
from triton_embed.python_backend.config import ModelConfig
from triton_embed.python_backend.row import Pixels


@dataclass(frozen=True)
class Grid:
    """Patches of a picture, down and across."""

    rows: int
    columns: int

    @property
    def count(self) -> int:
        return self.rows * self.columns


class Patches:
    """uint8 [height, width, 3] -> fp32 [patches, 3*frames*patch*patch], normalised, in the order of the merger:
    `merge` x `merge` block by block."""

    def __init__(self, model: ModelConfig, patch: int, merge: int, frames: int, device: str) -> None:
        self._patch, self._merge, self._frames, self._device = patch, merge, frames, device
        # Constants, real even where parameters are built on meta.
        self._mean, self._std = (torch.tensor(channels, device=device) for channels in model.normalisation)

    def __call__(self, picture: Pixels) -> Tensor:
        image = torch.from_numpy(np.ascontiguousarray(picture)).to(self._device)
        return ops.patchify(image, self._patch, self._merge, self._frames, self._mean, self._std)

    def grid(self, picture: Pixels) -> Grid:
        return Grid(picture.shape[0] // self._patch, picture.shape[1] // self._patch)

    def positions(self, grid: Grid) -> Tensor:
        """Row and column of each patch, in the same order: [2, patches]."""
        block = (grid.rows // self._merge, self._merge, grid.columns // self._merge, self._merge)
        places = torch.stack(torch.meshgrid(torch.arange(grid.rows), torch.arange(grid.columns), indexing="ij"))
        return places.view(2, *block).permute(0, 1, 3, 2, 4).reshape(2, -1).to(self._device)
