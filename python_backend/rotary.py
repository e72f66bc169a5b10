"""Rotary positions: the frequencies of each scaling, and the angles of a packed batch.

The rules are those of transformers' `modeling_rope_utils`, after the papers it cites; all of it in fp32.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from triton_embed.python_backend.shapes import Rope


class Rotary:
    """Positions -> the cosines and sines every layer shares."""

    def __init__(self, rope: Rope, device: str) -> None:
        self._rope = rope
        with torch.device("cpu"):  # these are constants, real even where parameters are built on meta
            self._frequencies = frequencies(rope).to(device)
            # Column j of the D/2 angles follows this axis of the position.
            self._axis = torch.repeat_interleave(torch.tensor(rope.sections)).to(device)
        self._scale = attention_factor(rope)

    def __call__(self, positions: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """positions int [A,T], one row an axis; `lengths` of the packed sequences -> cos, sin fp32 [T, D/2].

        A sequence longer than the model was made for gets frequencies of its own where the scaling is dynamic.
        """
        # [T, D/2], laid out so: every layer reads what follows from it.
        by_column = positions.T[:, self._axis].float()
        angles = by_column * self._frequencies
        if self._rope.kind == "dynamic" and max(lengths) > self._rope.positions:
            start = 0
            for length in lengths:
                if length > self._rope.positions:
                    rows = slice(start, start + length)
                    angles[rows] = by_column[rows] * frequencies(self._rope, length).to(angles.device)
                start += length
        return angles.cos() * self._scale, angles.sin() * self._scale


def frequencies(rope: Rope, length: int = 0) -> Tensor:
    """fp32 [D/2]: radians a position, for a sequence of `length` tokens (which only dynamic scaling looks at)."""
    size, theta, numbers = rope.head_dim, rope.theta, rope.scaling
    if rope.kind == "dynamic":
        grown = numbers["factor"] * max(length, rope.positions) / rope.positions - (numbers["factor"] - 1)
        theta *= grown ** (size / (size - 2))
    plain = 1.0 / theta ** (torch.arange(0, size, 2).float() / size)
    if rope.kind == "linear":
        return plain / numbers["factor"]
    if rope.kind == "yarn":
        return _yarn(plain, rope)
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    return plain


def attention_factor(rope: Rope) -> float:
    """What cosines and sines are multiplied by: not 1 for yarn alone."""
    numbers = rope.scaling
    if rope.kind != "yarn":
        return 1.0
    if numbers.get("attention_factor"):
        return numbers["attention_factor"]

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(numbers["factor"]) + 1.0 if numbers["factor"] > 1 else 1.0

    if numbers.get("mscale") and numbers.get("mscale_all_dim"):
        return magnitude(numbers["mscale"]) / magnitude(numbers["mscale_all_dim"])
    return magnitude(1.0)


def _yarn(plain: Tensor, rope: Rope) -> Tensor:
    """Fast frequencies stay, slow ones are divided by the factor, a linear ramp between (arXiv 2309.00071)."""
    size, numbers = rope.head_dim, rope.scaling
    trained = numbers.get("original_max_position_embeddings") or rope.positions

    def column(turns: float) -> float:
        return size * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = column(numbers.get("beta_fast") or 32), column(numbers.get("beta_slow") or 1)
    if numbers.get("truncate", 1.0):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    if first == last:
        last += 0.001
    slow = ((torch.arange(size // 2).float() - first) / (last - first)).clamp(0, 1)
    return plain / numbers["factor"] * slow + plain * (1 - slow)


def _llama3(plain: Tensor, rope: Rope) -> Tensor:
    """Llama 3.1: wavelengths beyond the trained length are stretched, those well inside it are not."""
    numbers = rope.scaling
    trained, low, high = (
        numbers[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    turns = trained * plain / (2 * math.pi)  # how often a frequency turns within the trained length
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain / numbers["factor"] * (1 - kept) + plain * kept
