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

    # Checkpoints on the hub, of transformers 5, and of a bare Qwen2VLModel name their tensors differently.
    naming = replace(
        Decoder.naming,
        renames=(
            ("model.language_model.", "language_model."),
            ("model.visual.", "visual."),
            ("model.", "language_model."),
        ),
    )

    def __init__(self, ops: Ops, model: ModelConfig, config: Qwen2VLConfig, device: str) -> None:
        super().__init__()
        self._config, self._device = config, device
        self._image_positions = model.image_positions
        self.visual = VisionTower(ops, model, config, device)
        self.language_model = Decoder(ops, model, config.text, device)
        self.recordable, self.shareable = self.language_model.recordable, self.language_model.shareable

    def forward(self, rows: Sequence[Row], prefix: Prefix | None = None) -> tuple[Tensor, Packed]:
        batch = self.lay_out(rows, prefix).to(self._device)
        x = self.language_model.embed_tokens(batch.ids)
        if images := [image for row in rows for image in row.images]:
            x[batch.ids == self._config.image_token] = self.visual(images).to(x.dtype)
        return self.language_model.decode(batch, x, prefix), batch.states

    def lay_out(self, rows: Sequence[Row], prefix: Prefix | None = None) -> Layout:
        return self.language_model.lay_out(rows, [self._positions(row) for row in rows], prefix)

    def compute(self, batch: Batch) -> Tensor:
        """Return the hidden states of a batch without images."""
        return self.language_model.compute(batch)

    def sample_image_rows(self) -> list[Row]:
        """Return one row for warm-up: an image of 2 x 2 tokens, and a token after it."""
        side = 2 * self._config.patch_size * self._config.merge
        ids = np.array([*[self._config.image_token] * 4, 0], dtype=np.int32)
        return [Row(ids, (np.full((side, side, 3), 127, dtype=np.uint8),), 4 * self._config.merge**2)]

    def read_prefix(self, ids: Ids) -> Prefix:
        return self.language_model.read_prefix(ids)

    def _positions(self, row: Row) -> npt.NDArray[np.int64]:
        """Return the positions [3,n] of each token: time, height and width.

        `mrope` (transformers' get_rope_index): a text token advances all three axes. The tokens of an image share one
        time and lie on a grid of height and width; the next token continues after the longer side of the grid.
        `sequential`: every token advances all axes, as in GME's official code on the transformers it was written for.
        """
        count = len(row.ids)
        image_indices = np.flatnonzero(row.ids == self._config.image_token)
        if self._image_positions == "sequential" or not row.images:
            return np.tile(np.arange(count), (3, 1))
        side = self._config.patch_size * self._config.merge
        positions = np.empty((3, count), dtype=np.int64)
        token, position = 0, 0  # the next token, and its position
        for image in row.images:
            height, width = image.shape[0] // side, image.shape[1] // side  # in tokens
            start = int(image_indices[image_indices >= token][0])
            positions[:, token:start] = np.arange(position, position + start - token)
            position += start - token
            token = start + height * width
            positions[:, start:token] = position + np.stack(
                [np.zeros((height, width), dtype=np.int64), *np.indices((height, width))]
            ).reshape(3, -1)
            position += max(height, width)
        positions[:, token:] = np.arange(position, position + count - token)
        return positions
