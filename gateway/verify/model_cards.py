"""Scores published on model cards, and the same scores computed from our vectors."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, TypeAdapter, model_validator

FILE = Path(__file__).with_name("model_cards.json")

Float32Array = npt.NDArray[np.float32]


class Input(BaseModel):
    """One query or document of a card: a text, the URL of an image, or both in one vector."""

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
        """Return a short form in one line."""
        words = " ".join(self.text.split())
        text = f"{words[:29]}…" if len(words) > 30 else words
        return " + ".join(filter(None, (text and f'"{text}"', self.image.rpartition("/")[2][:40])))


class CardScores(BaseModel):
    """The scores of one page for one checkpoint: a row per query, a column per document, None for missing scores."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: str  # Hugging Face id
    source: str
    kind: Literal["cosine", "cosine x 100", "logits"]
    logit_scale: PositiveFloat | None = None  # for logits: the factor of the cosine
    decimals: PositiveInt  # printed on the page
    tolerance: PositiveFloat  # in the unit of the scores
    queries: list[Input]
    documents: list[Input]
    scores: list[list[float | None]]

    @model_validator(mode="after")
    def _is_consistent(self) -> "CardScores":
        if [len(row) for row in self.scores] != [len(self.documents)] * len(self.queries):
            raise ValueError("scores are not queries x documents")
        if (self.kind == "logits") != (self.logit_scale is not None):
            raise ValueError("logit_scale is for kind logits only")
        return self

    @property
    def inputs(self) -> list[Input]:
        """Every query and document."""
        return [*self.queries, *self.documents]

    @property
    def scale(self) -> float:
        """The factor of a cosine."""
        return self.logit_scale or (100.0 if self.kind == "cosine x 100" else 1.0)


@dataclass(frozen=True)
class Pair:
    """The score of a query and a document on a card, and ours, which is None if a vector is missing."""

    query: Input
    document: Input
    published: float
    ours: float | None
    tolerance: float

    @property
    def agrees(self) -> bool:
        return self.ours is not None and abs(self.ours - self.published) <= self.tolerance


def read_cards() -> list[CardScores]:
    """Read every entry of model_cards.json."""
    return TypeAdapter(list[CardScores]).validate_json(FILE.read_bytes())


def cards_of(cards: Sequence[CardScores], checkpoint: str) -> list[CardScores]:
    """Return the entries of a checkpoint by its id, or the last part of its id, in any case."""
    name = checkpoint.lower()
    return [card for card in cards if name in (card.checkpoint.lower(), card.checkpoint.lower().rpartition("/")[2])]


def compare(card: CardScores, vectors: Mapping[Input, Float32Array]) -> Iterator[Pair]:
    """Yield every score of a card with ours. `vectors` have unit length."""
    for query, row in zip(card.queries, card.scores, strict=True):
        for document, score in zip(card.documents, row, strict=True):
            if score is not None:
                complete = query in vectors and document in vectors
                ours = card.scale * float(vectors[query].astype(float) @ vectors[document]) if complete else None
                yield Pair(query, document, score, ours, card.tolerance)
