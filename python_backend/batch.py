"""Batch: rows of token ids packed end to end for one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from triton_embed.kernels.packed import Packed
from triton_embed.python_backend.row import Ids

FILLER = np.zeros(1, dtype=np.int32)


@dataclass(frozen=True)
class Batch:
    """T tokens of B rows, on the device: ids [T] int64, positions [A,T] int64 with one row an axis.

    `pooled` [B]: the token of each row that its vector is made of; None where it is made of all of them.
    """

    ids: Tensor
    positions: Tensor
    packed: Packed
    pooled: Tensor | None

    @classmethod
    def pack(
        cls, rows: Sequence[Ids], pooling: str, device: str, positions: Sequence[npt.NDArray[np.int64]] | None = None
    ) -> "Batch":
        """Lay the rows end to end, in the order given; no row may be empty.

        `positions` [A,n] of each row; without them a row counts from 0 on one axis. On a CPU, one-token rows follow
        that belong to nobody: see `filler_count`.
        """
        fillers = filler_count(sum(map(len, rows))) if device == "cpu" else 0
        everything = [*rows, *[FILLER] * fillers]
        placed = [np.arange(len(ids))[None] for ids in everything]
        if positions is not None:
            placed = [*positions, *[np.zeros((len(positions[0]), 1), dtype=np.int64)] * fillers]
        packed = Packed.from_lengths([len(ids) for ids in everything], device)
        pooled = None
        if pooling in ("cls", "last"):
            pooled = packed.cu_seqlens[:-1].long() if pooling == "cls" else packed.cu_seqlens[1:].long() - 1
        return cls(
            ids=torch.from_numpy(np.concatenate(everything).astype(np.int64)).to(device),
            positions=torch.from_numpy(np.concatenate(placed, axis=1)).to(device),
            packed=packed,
            pooled=pooled,
        )

    @cached_property
    def states(self) -> Packed:
        """How a network's hidden states are laid out: all of them, or one a row where only pooled rows are left."""
        return self.packed if self.pooled is None else one_each(len(self.packed.lengths), self.ids.device)


def one_each(rows: int, device: torch.device | str) -> Packed:
    """The layout of one state a row."""
    return Packed.from_lengths([1] * rows, device)


def filler_count(tokens: int) -> int:
    """How many tokens to add to a batch on a CPU: up to 7, or up to an eighth of it (a 16th on average).

    oneDNN keeps 2 MB of code for every number of tokens that MiniLM ever met (measured: 350 MB of memory became
    1.2 GB in 500 batches), so the numbers are rounded up to eight an octave.
    """
    step = 1 << max(3, tokens.bit_length() - 4)
    return -tokens % step
