"""Accuracy of an engine's vectors against a reference: cosine similarity and nearest-neighbor overlap."""

from typing import NamedTuple

import numpy as np

from benchmarks.worker import Vectors

NEIGHBORS = 10


class Accuracy(NamedTuple):
    """Accuracy of a set of vectors against the reference vectors of the same texts."""

    cosine_mean: float
    cosine_min: float
    neighbors: float  # share of the NEIGHBORS nearest other texts that agree, mean over the texts


def compare(vectors: Vectors, reference: Vectors) -> Accuracy:
    """Compare two [texts, dimensions] arrays of the same texts; at least NEIGHBORS + 1 texts."""
    vectors, reference = _normalize(vectors), _normalize(reference)
    cosines = (vectors * reference).sum(axis=1)
    overlaps = [len(a & b) for a, b in zip(nearest(vectors), nearest(reference), strict=True)]
    return Accuracy(float(cosines.mean()), float(cosines.min()), float(np.mean(overlaps)) / NEIGHBORS)


def nearest(vectors: Vectors) -> list[set[int]]:
    """Return the indices of the NEIGHBORS nearest other texts of each text. Vectors must have length 1."""
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -np.inf)
    order = np.argpartition(-cosines, NEIGHBORS - 1, axis=1)[:, :NEIGHBORS]
    return [set(row.tolist()) for row in order]


def _normalize(vectors: Vectors) -> Vectors:
    """Normalize in float64: the rounding error of an fp32 cosine is as large as the differences measured."""
    exact = vectors.astype(np.float64)
    normalized: Vectors = exact / np.linalg.norm(exact, axis=1, keepdims=True)
    return normalized
