"""Qwen2-VL: a decoder that reads image tokens among text tokens."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from triton_embed.kernels.ops import Ops
from triton_embed.kernels.packed import Packed
from triton_embed.python_backend.checkpoint.config import ModelConfig
from triton_embed.python_backend.checkpoint.hf_config import Qwen2VLConfig
from triton_embed.python_backend.execution.prefix_cache import Prefix
from triton_embed.python_backend.inputs.row import Ids, Row
from triton_embed.python_backend.networks.batch import Batch, Layout
from triton_embed.python_backend.networks.decoder import Decoder
from triton_embed.python_backend.networks.qwen2_vl_vision import VisionTower


class Qwen2VL(nn.Module):
    """Rows of token ids with images -> hidden states as from Decoder, and their layout."""

    # Names of the hub, of transformers 5, and of a bare Qwen2VLModel.
    naming = replace(
        Decoder.naming,
        renames=(
            ("model.language_model.", "language_model."),
            ("model.visual.", "visual."),
            ("model.", "language_model."),
        ),
    )

    def __init__(self, ops: Ops, model: ModelConfig, shape: Qwen2VLConfig, device: str) -> None:
        super().__init__()
        self._shape, self._device = shape, device
        self._rule = model.image_positions
        self.visual = VisionTower(ops, model, shape, device)
        self.language_model = Decoder(ops, model, shape.text, device)
        self.recordable, self.shareable = self.language_model.recordable, self.language_model.shareable

    def forward(self, rows: Sequence[Row], prefix: Prefix | None = None) -> tuple[Tensor, Packed]:
        batch = self.lay_out(rows, prefix).to(self._device)
        x = self.language_model.embed_tokens(batch.ids)
        if pictures := [picture for row in rows for picture in row.images]:
            x[batch.ids == self._shape.image_token] = self.visual(pictures).to(x.dtype)
        return self.language_model.decode(batch, x, prefix), batch.states

    def lay_out(self, rows: Sequence[Row], prefix: Prefix | None = None) -> Layout:
        return self.language_model.lay_out(rows, [self._positions(row) for row in rows], prefix)

    def compute(self, batch: Batch) -> Tensor:
        """Lay out rows without images."""
        return self.language_model.compute(batch)

    def sample_pictures(self) -> list[Row]:
        """Return a row for warm-up: an image of 2 x 2 tokens, and a token after it."""
        side = 2 * self._shape.patch_size * self._shape.merge
        ids = np.array([*[self._shape.image_token] * 4, 0], dtype=np.int32)
        return [Row(ids, (np.full((side, side, 3), 127, dtype=np.uint8),), 4 * self._shape.merge**2)]

    def read_prefix(self, ids: Ids) -> Prefix:
        return self.language_model.read_prefix(ids)

    def _positions(self, row: Row) -> npt.NDArray[np.int64]:
        """Return time, height and width [3,n] of each token.

        `mrope` (transformers' get_rope_index): text counts up on all three axes, a picture's tokens stand still in
        time and lie on a grid, and what follows goes on after its longer side. `sequential`: everything counts up,
        which is what GME's official code did on the transformers it was written for.
        """
        count = len(row.ids)
        places = np.flatnonzero(row.ids == self._shape.image_token)
        if self._rule == "sequential" or not row.images:
            return np.tile(np.arange(count), (3, 1))
        side = self._shape.patch_size * self._shape.merge
        found = np.empty((3, count), dtype=np.int64)
        token, position = 0, 0
        for picture in row.images:
            high, wide = picture.shape[0] // side, picture.shape[1] // side
            start = int(places[places >= token][0])
            found[:, token:start] = np.arange(position, position + start - token)
            position += start - token
            token = start + high * wide
            found[:, start:token] = position + np.stack(
                [np.zeros((high, wide), dtype=np.int64), *np.indices((high, wide))]
            ).reshape(3, -1)
            position += max(high, wide)
        found[:, token:] = np.arange(position, position + count - token)
        return found
