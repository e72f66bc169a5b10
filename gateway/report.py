"""What `verify` prints: ours beside theirs, the difference, and whether it is small enough."""

import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from triton_embed.gateway.cards import CardScores, Pair, Vector, compare
from triton_embed.gateway.examine import Answers
from triton_embed.gateway.oracle import Facts, OracleError, Vectors, opinion

log = logging.getLogger(__name__)

NORM_DEVIATION = 1e-6
WORST_SHOWN = 5


@dataclass(frozen=True)
class Limits:
    """How far two vectors of unit length may be apart that should be one."""

    cosine: float
    difference: float | None  # of a single value; None: the cosine alone decides

    @classmethod
    def of(cls, dtype: str) -> "Limits":
        """For a model that computes in `dtype`."""
        return cls(0.999999, 2e-5) if dtype == "float32" else cls(0.98 if dtype == "int8" else 0.9995, None)


class Report:
    """Written to stdout as it comes; counts what agrees, what differs and what could not be compared."""

    def __init__(self) -> None:
        self.agree = self.differ = self.lacking = 0

    def say(self, line: str = "") -> None:
        sys.stdout.write(f"{line}\n")

    def scores(self, card: CardScores, pairs: Iterable[Pair]) -> None:
        """Every score of a card."""
        self.say(f"\n{card.checkpoint}: {card.kind}, may differ by {card.tolerance:g}\n{card.source}")
        self.say(f"{'card':>12} {'ours':>12} {'difference':>12}")
        for pair in pairs:
            pair_of = f"{pair.query} x {pair.document}"
            if pair.ours is None:
                self.lacking += 1
                self.say(f"{pair.card:12.4f} {'':>12} {'':>12}  not compared  {pair_of}")
                continue
            numbers = f"{pair.card:12.4f} {pair.ours:12.4f}"
            difference = f"{pair.ours - pair.card:+z12.4f}"
            self.say(f"{numbers} {difference}  {self._judge(pair.agrees):12}  {pair_of}")

    def vectors(self, title: str, names: Sequence[str], ours: Vector, theirs: Vector | Vectors, limits: Limits) -> None:
        """Vectors [n, d] of unit length that should be the same; `names` are those of the rows."""
        self.say(f"\n{title}")
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
            self.say(f"  {cosines[i]:.9f}  {names[i][:80]!r}")

    def norms(self, ours: Vector) -> None:
        """Vectors [n, d] that should be of unit length."""
        deviation = float(np.abs(np.linalg.norm(ours.astype(float), axis=1) - 1).max())
        self._line(
            "largest norm deviation", f"{deviation:.1e}", f"at most {NORM_DEVIATION}", deviation <= NORM_DEVIATION
        )

    def verdict(self) -> int:
        """The last line, and the exit code: 0 when something was compared and all of it agrees."""
        counts = f"{self.agree} agree, {self.differ} differ, {self.lacking} could not be compared"
        self.say(f"\n{counts}")
        return 0 if self.agree and not self.differ and not self.lacking else 1

    def _line(self, name: str, value: str, limit: str = "", agrees: bool | None = None) -> None:
        verdict = "" if agrees is None else f"{self._judge(agrees):8} ({limit})"
        self.say(f"  {name:24} {value:>16}  {verdict}".rstrip())

    def _judge(self, agrees: bool) -> str:
        if agrees:
            self.agree += 1
            return "ok"
        self.differ += 1
        return "differs"


def conclude(answers: Answers, cards: Sequence[CardScores], facts: Facts) -> int:
    """Compare the answers with one another, with the cards and with other libraries; returns the exit code."""
    report = Report()
    info, together = answers.info, answers.together
    limits = Limits.of(info.dtype)
    report.say(f"{info.name}: {info.family} in {info.dtype} on {info.device}, kernels {info.kernels}")
    title = f"{len(answers.names)} inputs in one request, and each alone"
    report.vectors(title, answers.names, together.vectors, answers.alone, limits)
    report.norms(together.vectors)
    for card in cards:
        report.scores(card, compare(card, answers.cards))
    _compare_with_libraries(report, answers, facts, limits, needed=not cards)
    return report.verdict()


def _compare_with_libraries(report: Report, answers: Answers, facts: Facts, limits: Limits, needed: bool) -> None:
    """`needed`: without them the model would have been compared with nothing but itself."""
    count = len(answers.texts)
    vectors, dropped = answers.together.vectors, answers.together.dropped[:count]
    # How much of a chat's text goes when it is too long is nobody's rule but ours.
    asked = np.flatnonzero(dropped == 0) if answers.info.family == "qwen2_vl" else np.arange(count)
    texts = [answers.texts[i] for i in asked]
    log.info("asking transformers, on the CPU in float32")
    try:
        theirs = opinion(facts, texts, answers.pictures)
    except (OracleError, ImportError) as error:
        report.say(f"\nnot compared with transformers or sentence-transformers: {error}")
        report.lacking += needed
        return
    left_out = f", {count - len(texts)} left out that had to be cut" if len(texts) < count else ""
    report.vectors(f"{len(texts)} texts by {theirs.library}{left_out}", texts, vectors[asked], theirs.texts, limits)
    if names := answers.names[count:]:
        report.vectors(f"{len(names)} pictures by {theirs.library}", names, vectors[count:], theirs.pictures, limits)


def _cosines(ours: Vector, theirs: Vector | Vectors) -> Vectors:
    a, b = ours.astype(float), theirs.astype(float)
    found: Vectors = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return found
