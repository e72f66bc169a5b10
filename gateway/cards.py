"""The scores that model cards print, beside the same scores made of our vectors."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, TypeAdapter, model_validator

FILE = Path(__file__).with_name("cards.json")

Vector = npt.NDArray[np.float32]


class Input(BaseModel):
    """One query or document of a card: a text, an image's URL, or both in one vector."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str = ""
    image: str = ""
    instruction: str | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> "Input":
        if not self.text and not self.image:
            raise ValueError("neither text nor image")
        return self

    def __str__(self) -> str:
        """Short, in one line."""
        words = " ".join(self.text.split())
        text = f"{words[:29]}…" if len(words) > 30 else words
        return " + ".join(filter(None, (text and f'"{text}"', self.image.rpartition("/")[2][:40])))


class CardScores(BaseModel):
    """Scores that one page prints for one checkpoint: queries down, documents across, None where it prints none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: str  # Hugging Face id
    source: str
    kind: Literal["cosine", "cosine x 100", "logits"]
    logit_scale: PositiveFloat | None = None  # of kind logits: the factor before the cosine
    decimals: PositiveInt  # that the page prints
    tolerance: PositiveFloat  # in the unit of the scores
    queries: list[Input]
    documents: list[Input]
    scores: list[list[float | None]]

    @model_validator(mode="after")
    def _fits(self) -> "CardScores":
        if [len(row) for row in self.scores] != [len(self.documents)] * len(self.queries):
            raise ValueError("scores are not queries x documents")
        if (self.kind == "logits") != (self.logit_scale is not None):
            raise ValueError("logit_scale goes with the kind logits")
        return self

    @property
    def inputs(self) -> list[Input]:
        """Every query and document."""
        return [*self.queries, *self.documents]

    @property
    def scale(self) -> float:
        """What a cosine is multiplied with."""
        return self.logit_scale or (100.0 if self.kind == "cosine x 100" else 1.0)


@dataclass(frozen=True)
class Pair:
    """A score of a card and ours; None: there is no vector for one of the two."""

    query: Input
    document: Input
    card: float
    ours: float | None
    tolerance: float

    @property
    def agrees(self) -> bool:
        return self.ours is not None and abs(self.ours - self.card) <= self.tolerance


def read_cards() -> list[CardScores]:
    """Every entry of cards.json."""
    return TypeAdapter(list[CardScores]).validate_json(FILE.read_bytes())


def cards_of(cards: Sequence[CardScores], checkpoint: str) -> list[CardScores]:
    """The entries of a checkpoint, given its id or the last part of it, in any case."""
    wanted = checkpoint.lower()
    return [card for card in cards if wanted in (card.checkpoint.lower(), card.checkpoint.lower().rpartition("/")[2])]


def compare(card: CardScores, vectors: Mapping[Input, Vector]) -> Iterator[Pair]:
    """Every score that the card prints, beside ours. `vectors` are of unit length."""
    for query, row in zip(card.queries, card.scores, strict=True):
        for document, score in zip(card.documents, row, strict=True):
            if score is not None:
                found = query in vectors and document in vectors
                ours = card.scale * float(vectors[query].astype(float) @ vectors[document]) if found else None
                yield Pair(query, document, score, ours, card.tolerance)
