"""Packed batches: sequences laid end to end, the layout that every op reads."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby, pairwise

import numpy as np
import numpy.typing as npt
import torch

Int32s = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Packed:
    """The layout of a packed batch: B sequences, T tokens in total, no padding.

    `cu_seqlens` int32 [B+1], on the device, holds the offset of each sequence and T. `lengths` holds the same on the
    host, so that no op waits for the device to learn a shape. Every length is at least 1.
    """

    cu_seqlens: torch.Tensor
    lengths: tuple[int, ...]
    _bounds: list[torch.Tensor] = field(default_factory=list, repr=False, compare=False)
    _tiles: dict[int, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], device: torch.device | str = "cpu", tile: int | None = None
    ) -> "Packed":
        """Lay out sequences of these lengths, and their tiles of `tile` tokens if that is given.

        Raises:
            ValueError: There is no sequence, or one without tokens.
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(f"every sequence needs at least one token, got lengths {list(lengths)}")
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        if tile is None:
            return cls(offsets, tuple(lengths))
        token_bounds, tile_ranges = (torch.from_numpy(x).to(device) for x in (bounds(lengths), tiles(lengths, tile)))
        return cls.laid_out(offsets, tuple(lengths), token_bounds, tile_ranges, tile)

    @classmethod
    def laid_out(
        cls, cu_seqlens: torch.Tensor, lengths: tuple[int, ...], bounds: torch.Tensor, tiles: torch.Tensor, size: int
    ) -> "Packed":
        """Return a layout whose `bounds` and `tiles` of `size` tokens are on the device already."""
        return cls(cu_seqlens, lengths, _bounds=[bounds], _tiles={size: tiles})

    @cached_property
    def tokens(self) -> int:
        """T, the total number of tokens."""
        return sum(self.lengths)

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        """(first token, sequences, length) for each run of neighboring sequences of equal length.

        A run is a dense [sequences, length] block already, so an op computes it in one call without padding.
        """
        runs, start = [], 0
        for length, group in groupby(self.lengths):
            count = sum(1 for _ in group)
            runs.append((start, count, length))
            start += count * length
        return runs

    @property
    def bounds(self) -> torch.Tensor:
        """int32 [2,T] on the device: the first token of each token's sequence, and the one after its last."""
        if not self._bounds:
            self._bounds.append(torch.from_numpy(bounds(self.lengths)).to(self.cu_seqlens.device))
        return self._bounds[0]

    def tiles(self, size: int) -> torch.Tensor:
        """int32 [n,4] on the device: see the function `tiles`."""
        if size not in self._tiles:
            self._tiles[size] = torch.from_numpy(tiles(self.lengths, size)).to(self.cu_seqlens.device)
        return self._tiles[size]


def bounds(lengths: Sequence[int]) -> Int32s:
    """Return [2,T]: the first token of each token's sequence, and the one after its last."""
    ends = np.cumsum(lengths, dtype=np.int32)
    return np.repeat(np.stack([ends - np.asarray(lengths, dtype=np.int32), ends]), lengths, axis=1)


def tiles(lengths: Sequence[int], size: int) -> Int32s:
    """Return the token ranges of attention's tiles, (q0, q1, k0, k1) [n,4], most expensive first.

    The queries q0..q1 are at most `size` tokens and see no keys outside k0..k1; ends are exclusive. A sequence of more
    than `size` tokens is split evenly. Neighboring sequences that fit share a tile, because a tile of few queries costs
    as much as a full one.
    """
    ranges: list[tuple[int, int, int, int]] = []
    start = tile_start = 0  # of this sequence, and of the last tile; no sequence may join it if they are equal
    for length in lengths:
        end = start + length
        if ranges and tile_start < start and end - tile_start <= size:
            ranges[-1] = (tile_start, end, tile_start, end)
        elif length <= size:
            tile_start = start
            ranges.append((start, end, start, end))
        else:
            count = -(-length // size)
            cuts = [start + length * i // count for i in range(count + 1)]
            ranges += [(first, last, start, end) for first, last in pairwise(cuts)]
            tile_start = end
        start = end
    # The cost is the number of keys k1 - k0, or q1 - k0 in causal attention.
    return np.array(sorted(ranges, key=lambda tile: (tile[2] - tile[3], tile[2] - tile[1])), dtype=np.int32)
