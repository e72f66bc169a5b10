"""Batch: rows of token ids packed end to end for one forward pass.

A batch is laid out on the host first (Layout), as int32 arrays that reach the device in one copy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from triton_embed.kernels.packed import Int32s, Packed, bounds, tiles
from triton_embed.python_backend.row import Ids

ALIGNMENT = 4  # int32s: every array starts at a multiple of 16 bytes, as kernels assume


@dataclass(frozen=True)
class Batch:
    """T tokens of B rows, on the device: ids [T], positions [A,T] with one row an axis, all int32.

    `pooled` [B]: the token of each row that its vector is made of; None where it is made of all of them. `states`: how
    a network's hidden states are laid out: as the tokens, or one a row where only pooled rows are left.
    """

    ids: Tensor
    positions: Tensor
    packed: Packed
    pooled: Tensor | None
    states: Packed


@dataclass(frozen=True)
class Layout:
    """A batch on the host: the arrays that Batch is made of, and its rows' lengths. `tile`: tokens of a tile of
    attention (`ops.tile_tokens`)."""

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
        """Lay the rows end to end, in the order given. `positions` [A,n] of each row; without them a row counts from 0
        on one axis.

        ValueError: no row, or an empty one.
        """
        lengths = tuple(map(len, rows))
        if not lengths or min(lengths) < 1:
            raise ValueError(f"every row needs at least one token, got lengths {list(lengths)}")
        offsets = np.cumsum([0, *lengths])
        if positions is None:
            placed = (np.arange(offsets[-1]) - offsets[:-1].repeat(lengths))[None]
        else:
            placed = np.concatenate(positions, axis=1)
        arrays = {"ids": np.concatenate(rows), "positions": placed, "cu_seqlens": offsets}
        if pooling in ("cls", "last"):
            arrays["pooled"] = offsets[:-1] if pooling == "cls" else offsets[1:] - 1
            arrays["states"] = np.arange(len(rows) + 1)
        if tile is not None:
            arrays |= {"bounds": bounds(lengths), "tiles": tiles(lengths, tile)}
        return cls({name: array.astype(np.int32, copy=False) for name, array in arrays.items()}, lengths, tile)

    def padded(self, tokens: int, rows: int) -> "Layout":
        """The same batch in arrays of a size that depends on `tokens` and `rows` alone, for recorded passes.

        What is added is nobody's: tokens that no tile covers, rows of no tokens, tiles of none.
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
            # Of neighbours that share no tile every two have more tokens than one; a long row has one tile to spare.
            most = 4 * tokens // self.tile + 2
            found = self.arrays["tiles"]
            arrays["tiles"] = np.pad(found, [(0, most - len(found)), (0, 0)])
        # Only their sum and number are read: what a recorded pass does, it does by the arrays.
        return Layout(arrays, (tokens - rows + 1, *[1] * (rows - 1)), self.tile)

    @cached_property
    def places(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Where each array lies in `buffer`, and its shape."""
        ends = np.cumsum([-(-array.size // ALIGNMENT) * ALIGNMENT for array in self.arrays.values()])
        starts = [0, *ends.tolist()]
        return {name: (start, self.arrays[name].shape) for name, start in zip(self.arrays, starts, strict=False)}

    def buffer(self) -> Tensor:
        """All arrays as one, on the host."""
        last = next(reversed(self.places))
        start, shape = self.places[last]
        found = np.zeros(start + -(-int(np.prod(shape)) // ALIGNMENT) * ALIGNMENT, dtype=np.int32)
        for name, (start, _) in self.places.items():
            found[start : start + self.arrays[name].size] = self.arrays[name].ravel()
        return torch.from_numpy(found)

    def to(self, device: str) -> Batch:
        """On the device, after one copy; on a CPU as it is."""
        if device == "cpu":
            return self._batch({name: torch.from_numpy(array) for name, array in self.arrays.items()})
        buffer = self.buffer()
        return self.view(buffer.pin_memory().to(device, non_blocking=True) if "cuda" in device else buffer.to(device))

    def view(self, buffer: Tensor) -> Batch:
        """The batch in a buffer on the device, laid out as this one is."""
        found = {
            name: buffer[start : start + int(np.prod(shape))].view(shape)
            for name, (start, shape) in self.places.items()
        }
        return self._batch(found)

    def _batch(self, found: Mapping[str, Tensor]) -> Batch:
        packed = Packed(found["cu_seqlens"], self.lengths)
        if self.tile is not None:
            packed = Packed.laid_out(found["cu_seqlens"], self.lengths, found["bounds"], found["tiles"], self.tile)
        states = Packed(found["states"], (1,) * len(self.lengths)) if "states" in found else packed
        return Batch(found["ids"], found["positions"], packed, found.get("pooled"), states)


def one_each(rows: int, device: torch.device | str) -> Packed:
    """The layout of one state a row."""
    return Packed.from_lengths([1] * rows, device)
