"""Rotary positions: the frequencies of each scaling, and the angles of a packed batch.

The rules follow transformers' `modeling_rope_utils` and the papers it cites. Everything is computed in fp32.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from triton_embed.python_backend.checkpoint.hf_config import RopeConfig


class Rotary:
    """Positions -> the cosines and sines that every layer shares."""

    def __init__(self, rope: RopeConfig, device: str) -> None:
        self._rope = rope
        with torch.device("cpu"):  # constants need real memory even while parameters are built on meta
            self._frequencies = frequencies(rope).to(device)
            # The axis of the position that each of the D/2 angles depends on.
            self._axis = torch.repeat_interleave(torch.tensor(rope.sections)).to(device)
        self._scale = attention_factor(rope)

    def __call__(self, positions: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return cos and sin fp32 [T, D/2] of positions int [A,T] on A axes.

        With dynamic scaling, a sequence longer than the trained length gets its own frequencies.

        Args:
            lengths: Of the packed sequences.
        """
        # Contiguous [T, D/2], because every layer reads cos and sin.
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


def frequencies(rope: RopeConfig, length: int = 0) -> Tensor:
    """Return fp32 [D/2]: radians per position. `length` of the sequence matters to dynamic scaling only."""
    size, theta, numbers = rope.head_dim, rope.theta, rope.scaling
    if rope.kind == "dynamic":
        growth = numbers["factor"] * max(length, rope.positions) / rope.positions - (numbers["factor"] - 1)
        theta *= growth ** (size / (size - 2))
    plain = 1.0 / theta ** (torch.arange(0, size, 2).float() / size)
    if rope.kind == "linear":
        return plain / numbers["factor"]
    if rope.kind == "yarn":
        return _yarn(plain, rope)
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    return plain


def attention_factor(rope: RopeConfig) -> float:
    """Return the factor of cosines and sines: other than 1 for yarn only."""
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


def _yarn(plain: Tensor, rope: RopeConfig) -> Tensor:
    """Return YaRN's frequencies (arXiv 2309.00071): fast ones unchanged, slow ones divided, linear in between."""
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


def _llama3(plain: Tensor, rope: RopeConfig) -> Tensor:
    """Return Llama 3.1's frequencies: wavelengths beyond the trained length are stretched, shorter ones are not."""
    numbers = rope.scaling
    trained, low, high = (
        numbers[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    turns = trained * plain / (2 * math.pi)  # turns of a frequency within the trained length
    unscaled = ((turns - low) / (high - low)).clamp(0, 1)
    return plain / numbers["factor"] * (1 - unscaled) + plain * unscaled
