"""The report that `verify` prints and its exit code."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_model_cards import CARD
from test_model_info import INFO

from triton_embed.gateway.api.requests import Embeddings
from triton_embed.gateway.verify import report as report_module
from triton_embed.gateway.verify.model_cards import Input
from triton_embed.gateway.verify.oracle import CheckpointFacts, OracleError, OracleResult
from triton_embed.gateway.verify.probe import ProbeResult
from triton_embed.gateway.verify.report import Limits, Report, conclude

PAIRS = CARD.model_copy(update={"scores": [[0.6, None, None], [None, None, 0.8]]})


def unit(rows: int, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=(rows, 8))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def probed(ours: np.ndarray, alone: np.ndarray, *, images: int = 0, dropped: int = 0, **info: object) -> ProbeResult:
    """Return the probe's result with the vectors `ours` in a batch and `alone`.

    Args:
        images: The number of last rows that are images.
        dropped: The number of first rows that were truncated.
    """
    count = len(ours)
    cut = np.array([3] * dropped + [0] * (count - dropped), dtype=np.int32)
    texts = [f"text {i}" for i in range(count - images)]
    vectors = dict(zip(PAIRS.inputs, [np.float32([1, 0]), np.float32([0, 1]), *map(np.float32, SCORED)], strict=True))
    return ProbeResult(replace(INFO, **info), vectors, texts, [b""] * images, Embeddings(ours, cut + 1, cut), alone)


SCORED = ([0.6, 0.8], [1, 0], [0.6, 0.8])


def run_conclude(
    monkeypatch: pytest.MonkeyPatch,
    result: ProbeResult,
    theirs: OracleResult | OracleError | ImportError,
    cards: int = 1,
) -> tuple[int, list[str]]:
    """Return (exit code, texts passed to the oracle). `theirs` is the oracle's result or its error."""
    compared: list[str] = []

    def compute(facts: CheckpointFacts, texts: list[str], images: list[bytes]) -> OracleResult:
        compared.extend(texts)
        if isinstance(theirs, Exception):
            raise theirs
        return theirs

    monkeypatch.setattr(report_module, "compute", compute)
    return conclude(result, [PAIRS] * cards, CheckpointFacts(Path(), result.info, "mrope", (1, 2))), compared


def test_equal_vectors_and_scores_agree(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ours = unit(5)
    theirs = OracleResult("library 1.2", ours[:4].astype(float), ours[4:].astype(float))
    code, compared = run_conclude(monkeypatch, probed(ours, ours, images=1), theirs)
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert compared == ["text 0", "text 1", "text 2", "text 3"]
    assert re.search(r'0\.6000 +0\.6000 +\+0\.0000  ok +"a" x "c"\n', printed)
    assert re.search(r'0\.8000 +0\.8000 +\+0\.0000  ok +"b" x "e"\n', printed)
    assert "4 texts by library 1.2\n" in printed
    assert "1 images by library 1.2\n" in printed
    assert printed.endswith("\n9 agree, 0 differ, 0 could not be compared\n")
    assert "differs" not in printed


@pytest.mark.parametrize("differing", ["alone", "norm", "texts", "images", "card"])
def test_single_difference_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], differing: str
) -> None:
    ours, other = unit(5), unit(1, 1)[0]
    parts = {"alone": ours.copy(), "texts": ours[:4].astype(float), "images": ours[4:].astype(float)}
    if differing in parts:
        parts[differing][-1] = other
    elif differing == "norm":
        ours[2] *= 1 + 5e-6
    result = probed(ours, parts["alone"], images=1)
    if differing == "card":
        result.cards[Input(text="c")] = np.float32([0.611, 0.79])
    code, _ = run_conclude(monkeypatch, result, OracleResult("library", parts["texts"], parts["images"]))
    printed = capsys.readouterr().out
    assert code == 1, printed
    assert ("'text 3'" in printed) == (differing == "texts")  # names the input
    assert ("'image 0'" in printed) == (differing in ("alone", "images"))
    assert bool(re.search(r'0\.6000 +0\.6110 +\+0\.0110  differs +"a" x "c"\n', printed)) == (differing == "card")


def test_score_without_a_vector_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ours = unit(4)
    result = probed(ours, ours)
    del result.cards[Input(text="e")]
    code, _ = run_conclude(monkeypatch, result, OracleResult("library", ours.astype(float), np.empty((0, 0))))
    printed = capsys.readouterr().out
    assert code == 1
    assert re.search(r'0\.8000 +not compared +"b" x "e"\n', printed)
    assert printed.endswith("1 could not be compared\n")


@pytest.mark.parametrize("error", [OracleError("it is not installed"), ImportError("it is not installed")])
@pytest.mark.parametrize(("cards", "code"), [(1, 0), (0, 1)])
def test_missing_library_fails_only_without_a_card(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: OracleError | ImportError,
    cards: int,
    code: int,
) -> None:
    ours = unit(4)
    assert run_conclude(monkeypatch, probed(ours, ours), error, cards)[0] == code
    assert "not compared with transformers or sentence-transformers: it is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(("family", "count"), [("qwen2_vl", 2), ("bert", 4)])
def test_truncated_chat_is_not_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], family: str, count: int
) -> None:
    ours = unit(4)
    theirs = OracleResult("library", ours[4 - count :].astype(float), np.empty((0, 0)))
    code, compared = run_conclude(monkeypatch, probed(ours, ours, dropped=2, family=family), theirs)
    assert code == 0
    assert compared == [f"text {i}" for i in range(4 - count, 4)]
    assert (", 2 truncated ones skipped" in capsys.readouterr().out) == (family == "qwen2_vl")


@pytest.mark.parametrize(
    ("dtype", "angle", "agrees"),
    [
        ("float32", 1e-5, True),
        ("float32", 1e-4, False),  # the cosine is still 0.999999995
        ("float32", 2e-3, False),
        ("bfloat16", 2e-2, True),
        ("bfloat16", 4e-2, False),
        ("float16", 2e-2, True),
    ],
)
def test_half_precision_has_wider_limits(
    capsys: pytest.CaptureFixture[str], dtype: str, angle: float, agrees: bool
) -> None:
    ours, theirs = np.float32([[1, 0], [0, 1]]), np.array([[np.cos(angle), np.sin(angle)], [0, 1]])
    report = Report()
    report.vectors("title", ["turned", "same"], ours, theirs, Limits.of(dtype))
    assert (report.differ == 0) is agrees
    printed = capsys.readouterr().out
    assert ("'turned'" in printed) is not agrees
    assert "'same'" not in printed


def test_vectors_of_different_sizes_differ(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    report.vectors("title", ["a"], np.ones((1, 3), dtype=np.float32), np.ones((1, 4)), Limits.of("float32"))
    assert report.verdict() == 1
    assert "3 and 4" in capsys.readouterr().out


def test_empty_report_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert Report().verdict() == 1
    assert capsys.readouterr().out == "\n0 agree, 0 differ, 0 could not be compared\n"
