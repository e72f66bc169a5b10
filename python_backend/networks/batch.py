"""Batches: rows of token ids packed end to end for one forward pass.

A batch is first laid out on the host (`Layout`) as int32 arrays, which are copied to the device in one transfer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from triton_embed.kernels.packed import Int32s, Packed, bounds, tiles
from triton_embed.python_backend.inputs.row import Ids

ALIGNMENT = 4  # int32 values: every array starts at a multiple of 16 bytes, as the kernels assume


@dataclass(frozen=True)
class Batch:
    """T tokens of B rows, on the device: ids [T] and positions [A,T] for A axes, all int32.

    Attributes:
        pooled: [B], the token of each row that becomes its vector; None if all tokens are pooled.
        states: The layout of the hidden states that the network returns: that of the tokens, or one state per row.
    """

    ids: Tensor
    positions: Tensor
    packed: Packed
    pooled: Tensor | None
    states: Packed


@dataclass(frozen=True)
class Layout:
    """A batch on the host.

    Attributes:
        arrays: The arrays of a `Batch` and of its layouts, by name.
        lengths: The lengths of the rows.
        tile: Tokens per tile of attention (`Ops.tile_tokens`).
    """

    arrays: Mapping[str, Int32s]
    lengths: tuple[int, ...]
    tile: int | None

    @classmethod
    def of(
        cls,
        rows: Sequence[Ids],
        pooling: str,
        positions: Sequence[npt.NDArray[np.int64]] | None = None,
        tile: int | None = None,
    ) -> "Layout":
        """Lay rows end to end.

        Args:
            positions: [A,n] of each row; by default each row counts from 0 on one axis.

        Raises:
            ValueError: There is no row, or an empty one.
        """
        lengths = tuple(map(len, rows))
        if not lengths or min(lengths) < 1:
            raise ValueError(f"every row needs at least one token, got lengths {list(lengths)}")
        offsets = np.cumsum([0, *lengths])
        if positions is None:
            all_positions = (np.arange(offsets[-1]) - offsets[:-1].repeat(lengths))[None]
        else:
            all_positions = np.concatenate(positions, axis=1)
        arrays = {"ids": np.concatenate(rows), "positions": all_positions, "cu_seqlens": offsets}
        if pooling in ("cls", "last"):
            arrays["pooled"] = offsets[:-1] if pooling == "cls" else offsets[1:] - 1
            arrays["states"] = np.arange(len(rows) + 1)
        if tile is not None:
            arrays |= {"bounds": bounds(lengths), "tiles": tiles(lengths, tile)}
        return cls({name: array.astype(np.int32, copy=False) for name, array in arrays.items()}, lengths, tile)

    def padded(self, tokens: int, rows: int) -> "Layout":
        """Return the batch in arrays whose sizes depend on `tokens` and `rows` alone, for CUDA graphs.

        Padding: tokens outside every tile, empty rows, empty tiles.
        """
        sizes = {"ids": tokens, "positions": tokens, "bounds": tokens, "cu_seqlens": rows + 1, "pooled": rows}
        arrays = {
            name: np.pad(array, [*[(0, 0)] * (array.ndim - 1), (0, sizes[name] - array.shape[-1])])
            for name, array in self.arrays.items()
            if name in sizes
        }
        arrays["cu_seqlens"][len(self.lengths) :] = self.arrays["cu_seqlens"][-1]
        if "states" in self.arrays:
            arrays["states"] = np.arange(rows + 1, dtype=np.int32)
        if self.tile is not None:
            # Two neighboring tiles together hold more tokens than one tile, except for one tile per long row.
            max_tiles = 4 * tokens // self.tile + 2
            tiles_used = self.arrays["tiles"]
            arrays["tiles"] = np.pad(tiles_used, [(0, max_tiles - len(tiles_used)), (0, 0)])
        # Any lengths with this sum and number will do: a CUDA graph reads the arrays.
        return Layout(arrays, (tokens - rows + 1, *[1] * (rows - 1)), self.tile)

    @cached_property
    def offsets(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """The start of each array in `buffer`, and its shape."""
        ends = np.cumsum([-(-array.size // ALIGNMENT) * ALIGNMENT for array in self.arrays.values()])
        starts = [0, *ends.tolist()]
        return {name: (start, self.arrays[name].shape) for name, start in zip(self.arrays, starts, strict=False)}

    def buffer(self) -> Tensor:
        """Return all arrays in one, on the host."""
        last = next(reversed(self.offsets))
        start, shape = self.offsets[last]
        buffer = np.zeros(start + -(-int(np.prod(shape)) // ALIGNMENT) * ALIGNMENT, dtype=np.int32)
        for name, (start, _) in self.offsets.items():
            buffer[start : start + self.arrays[name].size] = self.arrays[name].ravel()
        return torch.from_numpy(buffer)

    def to(self, device: str) -> Batch:
        """Return the batch on a device: in one copy, or without a copy on a CPU."""
        if device == "cpu":
            return self._batch({name: torch.from_numpy(array) for name, array in self.arrays.items()})
        buffer = self.buffer()
        return self.view(buffer.pin_memory().to(device, non_blocking=True) if "cuda" in device else buffer.to(device))

    def view(self, buffer: Tensor) -> Batch:
        """Return the batch whose arrays are in `buffer`, which has this layout."""
        tensors = {
            name: buffer[start : start + int(np.prod(shape))].view(shape)
            for name, (start, shape) in self.offsets.items()
        }
        return self._batch(tensors)

    def _batch(self, tensors: Mapping[str, Tensor]) -> Batch:
        packed = Packed(tensors["cu_seqlens"], self.lengths)
        if self.tile is not None:
            packed = Packed.laid_out(
                tensors["cu_seqlens"], self.lengths, tensors["bounds"], tensors["tiles"], self.tile
            )
        states = Packed(tensors["states"], (1,) * len(self.lengths)) if "states" in tensors else packed
        return Batch(tensors["ids"], tensors["positions"], packed, tensors.get("pooled"), states)


def one_each(rows: int, device: torch.device | str) -> Packed:
    """Return the layout of one state per row."""
    return Packed.from_lengths([1] * rows, device)
