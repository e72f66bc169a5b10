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

    `cu_seqlens` [B+1] int32 lives on the device; `lengths` is the same fact on the host, so that no op has to
    wait for the device to learn a shape. Every length is at least 1.
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

        ValueError: none at all, or one shorter than 1 token.
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(f"every sequence needs at least one token, got lengths {list(lengths)}")
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        if tile is None:
            return cls(offsets, tuple(lengths))
        spans, found = (torch.from_numpy(x).to(device) for x in (bounds(lengths), tiles(lengths, tile)))
        return cls.laid_out(offsets, tuple(lengths), spans, found, tile)

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
        """(first token, sequences, length) for each run of neighbours of equal length.

        Such a run is a dense [sequences, length] block already: one call serves it without padding.
        """
        found, start = [], 0
        for length, group in groupby(self.lengths):
            count = sum(1 for _ in group)
            found.append((start, count, length))
            start += count * length
        return found

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
    """Return [2,T]: the start and end of each token's sequence."""
    ends = np.cumsum(lengths, dtype=np.int32)
    return np.repeat(np.stack([ends - np.asarray(lengths, dtype=np.int32), ends]), lengths, axis=1)


def tiles(lengths: Sequence[int], size: int) -> Int32s:
    """Return the token ranges of attention's tiles, (q0, q1, k0, k1) [n,4], most expensive first.

    Queries q0..q1 are at most `size` tokens and see keys among k0..k1 alone. A sequence of more than `size` tokens is
    split evenly; neighbours that fit share a tile, because a tile of few queries costs as much as a full one.
    """
    found: list[tuple[int, int, int, int]] = []
    start = shared = 0  # of this sequence, of the tile being filled
    for length in lengths:
        end = start + length
        if found and shared < start and end - shared <= size:
            found[-1] = (shared, end, shared, end)
        elif length <= size:
            shared = start
            found.append((start, end, start, end))
        else:
            count = -(-length // size)
            cuts = [start + length * i // count for i in range(count + 1)]
            found += [(first, last, start, end) for first, last in pairwise(cuts)]
            shared = end
        start = end
    return np.array(sorted(found, key=lambda tile: (tile[2] - tile[3], tile[2] - tile[1])), dtype=np.int32)
