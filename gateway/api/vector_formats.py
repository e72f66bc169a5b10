"""Formats of a vector in a response: truncated dimensions, floats, base64, or quantized integers."""

from base64 import b64encode
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]  # [n, d], each row of length 1

OutputDtype = Literal["float", "int8", "uint8", "binary", "ubinary"]
OUTPUT_DTYPES = get_args(OutputDtype)


@dataclass(frozen=True, slots=True)
class VectorFormat:
    """The format a caller wants. `sizes` empty: all dimensions; `several`: one vector for each of `sizes`."""

    base64: bool = False
    output_dtype: OutputDtype = "float"
    sizes: tuple[int, ...] = ()
    several: bool = False
    receipt: bool = False

    def encode(self, vectors: Floats) -> tuple[list[Any], list[Any] | None]:
        """Return the JSON value of each row, and the scale of each row if the format has one."""
        if not self.several:
            return self._encode(vectors, self.sizes[0] if self.sizes else vectors.shape[1])
        by_size = [self._encode(vectors, size) for size in self.sizes]
        rows = [list(row) for row in zip(*(values for values, _ in by_size), strict=True)]
        if by_size[0][1] is None:
            return rows, None
        return rows, [list(row) for row in zip(*(scales or () for _, scales in by_size), strict=True)]

    def _encode(self, vectors: Floats, size: int) -> tuple[list[Any], list[Any] | None]:
        vectors = truncate(vectors, size)
        if self.output_dtype != "float":
            values, scales = quantize(vectors, self.output_dtype)
            return list(values), None if scales is None else scales.tolist()
        if self.base64:
            return [b64encode(row).decode() for row in vectors], None
        return list(vectors), None


def truncate(vectors: Floats, size: int) -> Floats:
    """Return the first `size` values of each row, normalized again (Matryoshka embeddings)."""
    if size == vectors.shape[1]:
        return vectors
    part = vectors[:, :size]
    length = np.linalg.norm(part, axis=1, keepdims=True)
    shortened: Floats = part / np.where(length == 0, 1, length)
    return shortened


def quantize(vectors: Floats, dtype: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32] | None]:
    """Return each row as small integers, and the scale of each row if the dtype has one.

    int8: value / scale, rounded, where scale is the row's largest magnitude / 127. uint8: int8 + 128. A cosine needs no
    scale. ubinary: one bit per value, 1 if positive, most significant bit first, the last byte padded with zeros.
    binary: ubinary - 128. The bits are those of sentence-transformers' `quantize_embeddings`; its int8 differs, because
    it needs calibration texts.
    """
    if dtype in ("binary", "ubinary"):
        bits = np.packbits(vectors > 0, axis=1)
        return (bits if dtype == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)), None
    scales = np.abs(vectors).max(axis=1) / 127
    steps = np.rint(vectors / np.where(scales == 0, 1, scales)[:, None])
    return (steps.astype(np.int8) if dtype == "int8" else (steps + 128).astype(np.uint8)), scales
