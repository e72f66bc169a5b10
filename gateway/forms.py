"""What a vector may look like in an answer: cut to a size, as floats, as base64, or as small integers."""

from base64 import b64encode
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]  # [n, d], each row of length 1

OUTPUT_DTYPES: Final = ("float", "int8", "uint8", "binary", "ubinary")


@dataclass(frozen=True, slots=True)
class Form:
    """How the caller wants its vectors. `sizes` empty: whole; `several`: one vector for each of `sizes`."""

    base64: bool = False
    output_dtype: str = "float"
    sizes: tuple[int, ...] = ()
    several: bool = False
    receipt: bool = False

    def of(self, vectors: Floats) -> tuple[list[Any], list[Any] | None]:
        """(what stands for each row in JSON, the scale of each row where there is one)."""
        if not self.several:
            return self._of(vectors, self.sizes[0] if self.sizes else vectors.shape[1])
        made = [self._of(vectors, size) for size in self.sizes]
        rows = [list(row) for row in zip(*(values for values, _ in made), strict=True)]
        if made[0][1] is None:
            return rows, None
        return rows, [list(row) for row in zip(*(scales or () for _, scales in made), strict=True)]

    def _of(self, vectors: Floats, size: int) -> tuple[list[Any], list[Any] | None]:
        vectors = cut(vectors, size)
        if self.output_dtype != "float":
            values, scales = quantise(vectors, self.output_dtype)
            return list(values), None if scales is None else scales.tolist()
        if self.base64:
            return [b64encode(row).decode() for row in vectors], None
        return list(vectors), None


def cut(vectors: Floats, size: int) -> Floats:
    """The first `size` values of each row, normalised again: what Matryoshka training is for."""
    if size == vectors.shape[1]:
        return vectors
    part = vectors[:, :size]
    length = np.linalg.norm(part, axis=1, keepdims=True)
    shortened: Floats = part / np.where(length == 0, 1, length)
    return shortened


def quantise(vectors: Floats, dtype: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32] | None]:
    """Small integers of each row, and the scale of each where it has one.

    int8: value / scale, rounded, where scale is the row's greatest magnitude / 127; uint8: 128 more. A cosine needs no
    scale. ubinary: a bit a value, 1 above zero, the first the highest of its byte, the last byte filled with zeros;
    binary: 128 less. The bits are sentence-transformers' (`quantize_embeddings`), whose int8 needs calibration texts.
    """
    if dtype in ("binary", "ubinary"):
        bits = np.packbits(vectors > 0, axis=1)
        return (bits if dtype == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)), None
    scales = np.abs(vectors).max(axis=1) / 127
    steps = np.rint(vectors / np.where(scales == 0, 1, scales)[:, None])
    return (steps.astype(np.int8) if dtype == "int8" else (steps + 128).astype(np.uint8)), scales
