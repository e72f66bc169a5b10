"""The report of `verify`: our vectors and scores, those of the reference, and whether they differ too much."""

import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from triton_embed.gateway.verify.model_cards import CardScores, Float32Array, Pair, compare
from triton_embed.gateway.verify.oracle import CheckpointFacts, OracleError, Vectors, compute
from triton_embed.gateway.verify.probe import ProbeResult

log = logging.getLogger(__name__)

NORM_DEVIATION = 1e-6  # limit of | length of a vector - 1 |
WORST_SHOWN = 5


@dataclass(frozen=True)
class Limits:
    """Limits of the difference between two vectors of unit length that should be equal."""

    cosine: float
    difference: float | None  # of any value; None: only the cosine counts

    @classmethod
    def of(cls, dtype: str) -> "Limits":
        """Return the limits of a model that computes in `dtype`."""
        return cls(0.999999, 2e-5) if dtype == "float32" else cls(0.98 if dtype == "int8" else 0.9995, None)


class Report:
    """A report written to stdout line by line. Counts comparisons that agree, differ, or are impossible."""

    def __init__(self) -> None:
        self.agree = self.differ = self.not_compared = 0

    def write(self, line: str = "") -> None:
        sys.stdout.write(f"{line}\n")

    def scores(self, card: CardScores, pairs: Iterable[Pair]) -> None:
        """Report every score of a card."""
        self.write(f"\n{card.checkpoint}: {card.kind}, may differ by {card.tolerance:g}\n{card.source}")
        self.write(f"{'card':>12} {'ours':>12} {'difference':>12}")
        for pair in pairs:
            inputs = f"{pair.query} x {pair.document}"
            if pair.ours is None:
                self.not_compared += 1
                self.write(f"{pair.published:12.4f} {'':>12} {'':>12}  not compared  {inputs}")
                continue
            numbers = f"{pair.published:12.4f} {pair.ours:12.4f}"
            difference = f"{pair.ours - pair.published:+z12.4f}"
            self.write(f"{numbers} {difference}  {self._judge(pair.agrees):12}  {inputs}")

    def vectors(
        self, title: str, names: Sequence[str], ours: Float32Array, theirs: Float32Array | Vectors, limits: Limits
    ) -> None:
        """Report vectors [n, d] of unit length that should be equal. `names` are those of the rows."""
        self.write(f"\n{title}")
        if ours.shape != theirs.shape:
            self._line("dimensions", f"{ours.shape[1]} and {theirs.shape[1]}", "the same", False)
            return
        cosines = _cosines(ours, theirs)
        differences = np.abs(ours - theirs).max(1)
        self._line("lowest cosine", f"{cosines.min():.9f}", f"at least {limits.cosine}", cosines.min() >= limits.cosine)
        self._line("mean cosine", f"{cosines.mean():.9f}")
        if limits.difference is None:
            self._line("largest difference", f"{differences.max():.1e}")
        else:
            agree = bool(differences.max() <= limits.difference)
            self._line("largest difference", f"{differences.max():.1e}", f"at most {limits.difference}", agree)
        apart = (cosines < limits.cosine) | (differences > (limits.difference or np.inf))
        for i in [i for i in np.argsort(cosines) if apart[i]][:WORST_SHOWN]:
            self.write(f"  {cosines[i]:.9f}  {names[i][:80]!r}")

    def norms(self, ours: Float32Array) -> None:
        """Report vectors [n, d] that should have unit length."""
        deviation = float(np.abs(np.linalg.norm(ours.astype(float), axis=1) - 1).max())
        self._line(
            "largest norm deviation", f"{deviation:.1e}", f"at most {NORM_DEVIATION}", deviation <= NORM_DEVIATION
        )

    def verdict(self) -> int:
        """Write the last line. Return the exit code: 0 if something was compared and everything agrees."""
        counts = f"{self.agree} agree, {self.differ} differ, {self.not_compared} could not be compared"
        self.write(f"\n{counts}")
        return 0 if self.agree and not self.differ and not self.not_compared else 1

    def _line(self, name: str, value: str, limit: str = "", agrees: bool | None = None) -> None:
        outcome = "" if agrees is None else f"{self._judge(agrees):8} ({limit})"
        self.write(f"  {name:24} {value:>16}  {outcome}".rstrip())

    def _judge(self, agrees: bool) -> str:
        if agrees:
            self.agree += 1
            return "ok"
        self.differ += 1
        return "differs"


def conclude(result: ProbeResult, cards: Sequence[CardScores], facts: CheckpointFacts) -> int:
    """Compare the vectors with each other, with the cards and with other libraries. Return the exit code."""
    report = Report()
    info, together = result.info, result.together
    limits = Limits.of(info.dtype)
    report.write(f"{info.name}: {info.family} in {info.dtype} on {info.device}, kernels {info.kernels}")
    title = f"{len(result.names)} inputs in one request, and each alone"
    report.vectors(title, result.names, together.vectors, result.alone, limits)
    report.norms(together.vectors)
    for card in cards:
        report.scores(card, compare(card, result.cards))
    _compare_with_libraries(report, result, facts, limits, required=not cards)
    return report.verdict()


def _compare_with_libraries(
    report: Report, result: ProbeResult, facts: CheckpointFacts, limits: Limits, required: bool
) -> None:
    """Compare with another library.

    Args:
        required: If no library can compute the vectors, count it as not compared: the model has no card either.
    """
    count = len(result.texts)
    vectors, dropped = result.together.vectors, result.together.dropped[:count]
    # transformers has no rule for truncating the text inside a chat template.
    compared = np.flatnonzero(dropped == 0) if result.info.family == "qwen2_vl" else np.arange(count)
    texts = [result.texts[i] for i in compared]
    log.info("computing with transformers, on the CPU in float32")
    try:
        reference = compute(facts, texts, result.images)
    except (OracleError, ImportError) as error:
        report.write(f"\nnot compared with transformers or sentence-transformers: {error}")
        report.not_compared += required
        return
    skipped = f", {count - len(texts)} truncated ones skipped" if len(texts) < count else ""
    title = f"{len(texts)} texts by {reference.library}{skipped}"
    report.vectors(title, texts, vectors[compared], reference.texts, limits)
    if names := result.names[count:]:
        title = f"{len(names)} images by {reference.library}"
        report.vectors(title, names, vectors[count:], reference.images, limits)


def _cosines(ours: Float32Array, theirs: Float32Array | Vectors) -> Vectors:
    a, b = ours.astype(float), theirs.astype(float)
    cosines: Vectors = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return cosines
