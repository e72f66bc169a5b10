"""Row: one input as the network takes it, whatever it was made of."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Pixels = npt.NDArray[np.uint8]  # [height, width, 3], sides as the vision tower needs them
Channels = tuple[float, float, float]  # a number for red, green and blue
NO_IDS: Ids = np.empty(0, dtype=np.int32)


@dataclass(frozen=True)
class Row:
    """Token ids [n], the pictures among or instead of them, and what it all costs.

    `vision_tokens`: tokens of the vision tower, over all pictures. `dropped`: tokens that truncation cut off.
    `shared`: how many of the first ids are an instruction's, and so likely to be met again.
    """

    ids: Ids
    pictures: tuple[Pixels, ...] = ()
    vision_tokens: int = 0
    dropped: int = 0
    shared: int = 0

    @property
    def tokens(self) -> int:
        """What usage counts: text tokens with the image tokens among them, or those of a picture alone."""
        return len(self.ids) or self.vision_tokens

    @property
    def cost(self) -> int:
        """Tokens to compute, in all towers: what the token budget counts."""
        return len(self.ids) + self.vision_tokens
