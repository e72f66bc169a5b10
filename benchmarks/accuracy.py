"""How far an engine's vectors are from the reference's: by angle, and by which texts they call alike."""

from typing import NamedTuple

import numpy as np

from benchmarks.worker import Vectors

NEIGHBOURS = 10


class Accuracy(NamedTuple):
    cosine_mean: float
    cosine_least: float
    neighbours: float  # share of the nearest NEIGHBOURS other texts that are the same, mean over the texts


def judge(found: Vectors, reference: Vectors) -> Accuracy:
    """Of [texts, dimensions] against the same of the reference; at least NEIGHBOURS + 1 texts."""
    found, reference = _normalised(found), _normalised(reference)
    cosines = (found * reference).sum(axis=1)
    same = [len(a & b) for a, b in zip(nearest(found), nearest(reference), strict=True)]
    return Accuracy(float(cosines.mean()), float(cosines.min()), float(np.mean(same)) / NEIGHBOURS)


def nearest(vectors: Vectors) -> list[set[int]]:
    """Of each text, which others are nearest; vectors of length 1."""
    alike = vectors @ vectors.T
    np.fill_diagonal(alike, -np.inf)
    order = np.argpartition(-alike, NEIGHBOURS - 1, axis=1)[:, :NEIGHBOURS]
    return [set(row.tolist()) for row in order]


def _normalised(vectors: Vectors) -> Vectors:
    """In float64: a cosine of fp32 itself would differ from 1 by as much as what is looked for."""
    exact = vectors.astype(np.float64)
    normalised: Vectors = exact / np.linalg.norm(exact, axis=1, keepdims=True)
    return normalised
