"""Rows: one input each, as the network reads it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Pixels = npt.NDArray[np.uint8]  # [height, width, 3], sides as the vision tower needs them
Channels = tuple[float, float, float]  # red, green, blue
NO_IDS: Ids = np.empty(0, dtype=np.int32)


@dataclass(frozen=True)
class Row:
    """Token ids [n] and images of one input.

    Attributes:
        vision_tokens: Tokens of the vision tower, over all images.
        dropped: Tokens removed by truncation.
        shared_prefix_tokens: Leading ids that belong to an instruction, so that other rows probably begin with them.
    """

    ids: Ids
    images: tuple[Pixels, ...] = ()
    vision_tokens: int = 0
    dropped: int = 0
    shared_prefix_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Tokens counted as usage: text tokens with image tokens among them, or the tokens of an image alone."""
        return len(self.ids) or self.vision_tokens

    @property
    def cost(self) -> int:
        """Tokens to compute in all towers, which the token budget counts."""
        return len(self.ids) + self.vision_tokens
