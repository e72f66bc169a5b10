"""The scores of public model cards: the data is valid, and scores are computed like the code on the cards."""

import json
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from triton_embed.gateway.verify import model_cards as cards
from triton_embed.gateway.verify.model_cards import CardScores, Input, cards_of, compare, read_cards

CARD = CardScores(
    checkpoint="org/name",
    source="a page",
    kind="cosine",
    decimals=4,
    tolerance=0.01,
    queries=[Input(text="a"), Input(text="b")],
    documents=[Input(text="c"), Input(text="d"), Input(text="e")],
    scores=[[0.5, None, 0.25], [None, None, 0.125]],
)
LARGEST = {"cosine": 1.0, "cosine x 100": 100.0, "logits": 100.0}


def test_every_entry_is_valid() -> None:
    entries = read_cards()
    assert len(entries) == len(json.loads(cards.FILE.read_text())) >= 20
    for entry in entries:
        assert re.fullmatch(r"[\w-]+/[\w.-]+", entry.checkpoint)
        assert len(entry.source) > 10
        scores = [score for row in entry.scores for score in row if score is not None]
        assert scores
        assert all(math.isfinite(score) and abs(score) <= LARGEST[entry.kind] + 1e-6 for score in scores)
        assert entry.tolerance <= 0.03 * LARGEST[entry.kind]  # a larger difference means another model
        urls = [item.image for item in entry.inputs if item.image]
        assert all(re.fullmatch(r"https?://[\w./%-]+\.jpg", url) for url in urls)


def test_every_family_has_a_card() -> None:
    checkpoints = {entry.checkpoint for entry in read_cards()}
    for name in ("all-MiniLM", "BAAI/bge", "multilingual-e5", "gte-Qwen2", "Qwen3-Embedding", "gme-Qwen2-VL", "clip-"):
        assert any(name in checkpoint for checkpoint in checkpoints), name


@pytest.mark.parametrize(
    "changes",
    [
        {"scores": [[0.5, None, 0.25]]},
        {"scores": [[0.5, None], [None, None]]},
        {"kind": "dot"},
        {"kind": "logits"},
        {"logit_scale": 100.0},
        {"tolerance": 0.0},
        {"queries": [{"text": "a"}, {"text": ""}]},
        {"queries": [{"text": "a"}, {"words": "b"}]},
        {"queries": [{"text": "a"}]},
        {"note": "unknown"},
    ],
    ids=str,
)
def test_malformed_entry_is_refused(changes: dict[str, Any]) -> None:
    CardScores.model_validate(CARD.model_dump())
    with pytest.raises(ValidationError):
        CardScores.model_validate(CARD.model_dump() | changes)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("BAAI/bge-base-en-v1.5", 4),
        ("bge-base-en-v1.5", 4),
        ("BGE-Base-EN-v1.5", 4),
        ("baai/BGE-M3", 1),
        ("other/bge-m3", 0),
        ("bge", 0),
        ("Qwen3-Embedding-0.6B", 1),
        ("", 0),
    ],
)
def test_card_is_found_by_id_or_its_last_part(name: str, count: int) -> None:
    entries = cards_of(read_cards(), name)
    assert len(entries) == count
    assert all(entry.checkpoint.lower().endswith(name.lower()) for entry in entries)


@pytest.mark.parametrize(("kind", "scale"), [("cosine", None), ("cosine x 100", None), ("logits", 20.0)])
def test_scores_equal_the_code_on_the_cards(kind: str, scale: float | None) -> None:
    """Compare with `(queries @ documents.T) * 100` of normalized embeddings in torch, as on the cards."""
    card = CardScores.model_validate(CARD.model_dump() | {"kind": kind, "logit_scale": scale})
    embeddings = torch.nn.functional.normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    factor = {"cosine": 1.0, "cosine x 100": 100.0, "logits": 20.0}[kind]
    expected = (embeddings[:2] @ embeddings[2:].T * factor).tolist()
    vectors = dict(zip(card.inputs, embeddings.numpy(), strict=True))
    pairs = list(compare(card, vectors))
    assert [(pair.query.text, pair.document.text, pair.published) for pair in pairs] == [
        ("a", "c", 0.5),
        ("a", "e", 0.25),
        ("b", "e", 0.125),
    ]
    assert [pair.ours for pair in pairs] == pytest.approx([expected[0][0], expected[0][2], expected[1][2]], abs=1e-5)


@pytest.mark.parametrize(("ours", "agrees"), [(0.5, True), (0.509, True), (0.491, True), (0.511, False), (0, False)])
def test_score_may_differ_by_the_tolerance(ours: float, agrees: bool) -> None:
    unit, other = np.array([1, 0], dtype=np.float32), np.array([ours, math.sqrt(1 - ours**2)], dtype=np.float32)
    pair = next(compare(CARD, {Input(text="a"): unit, Input(text="c"): other}))
    assert pair.agrees is agrees


def test_missing_vector_gives_no_score() -> None:
    pair = next(compare(CARD, {Input(text="a"): np.ones(1, dtype=np.float32)}))
    assert pair.ours is None
    assert not pair.agrees


def test_inputs_are_printed_in_one_short_line() -> None:
    long = Input(text="The Tesla Cybertruck is a battery\nelectric pickup truck", image="https://x.org/a/b.jpg?c")
    assert str(long) == '"The Tesla Cybertruck is a bat…" + b.jpg?c'
    assert str(Input(text="short")) == '"short"'
    assert str(Input(image="https://x.org/photo.png")) == "photo.png"
    assert len({Input(text="a"), Input(text="a", instruction="b"), Input(text="a")}) == 2
