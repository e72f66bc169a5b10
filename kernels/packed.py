"""Packed: a batch of sequences laid end to end, the one layout every op reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

import torch


@dataclass(frozen=True)
class Packed:
    """Where each sequence of a packed batch lies: B sequences, T tokens in all, no padding.

    `cu_seqlens` [B+1] int32 lives on the device; `lengths` is the same fact on the host, so that no op has to
    wait for the device to learn a shape. Every length is at least 1.
    """

    cu_seqlens: torch.Tensor
    lengths: tuple[int, ...]

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> "Packed":
        """Lay out sequences of these lengths. ValueError: none at all, or one shorter than 1 token."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"every sequence needs at least one token, got lengths {list(lengths)}")
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        return cls(offsets, tuple(lengths))

    @cached_property
    def tokens(self) -> int:
        """T."""
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
