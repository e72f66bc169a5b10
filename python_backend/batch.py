"""Batch: rows of token ids packed end to end for one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from triton_embed.kernels.packed import Packed
from triton_embed.python_backend.tokenizer import Ids


@dataclass(frozen=True)
class Batch:
    """B rows, T tokens: ids and positions are [T] int64 on the device; `dims` is the output size of each row."""

    ids: torch.Tensor
    positions: torch.Tensor
    packed: Packed
    dims: tuple[int, ...]

    @classmethod
    def pack(cls, rows: Sequence[Ids], dims: Sequence[int], device: str) -> "Batch":
        """Lay the rows end to end, in the order given; no row may be empty."""
        lengths = [len(ids) for ids in rows]
        positions = np.concatenate([np.arange(n) for n in lengths])
        ids = np.concatenate(rows).astype(np.int64)
        return cls(
            ids=torch.from_numpy(ids).to(device),
            positions=torch.from_numpy(positions).to(device),
            packed=Packed.from_lengths(lengths, device),
            dims=tuple(dims),
        )
