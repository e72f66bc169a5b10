"""Text -> token ids: prompt, special tokens, truncation that keeps them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as FastTokenizer

from triton_embed.python_backend.config import ModelConfig
from triton_embed.python_backend.errors import BadRequest, ConfigError

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Tokens:
    """One row ready for the network: its ids, and how many tokens truncation cut off."""

    ids: Ids
    dropped: int


class Tokenizer:
    """The checkpoint's tokenizer.json, with its own padding and truncation switched off: both are ours.

    ConfigError: no tokenizer.json, an unreadable one, or one with more ids than the network has embeddings.
    """

    def __init__(self, directory: Path, model: ModelConfig) -> None:
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{path} is missing")
        try:
            self._fast = FastTokenizer.from_file(str(path))
        except Exception as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        self._fast.no_padding()
        self._fast.no_truncation()
        if (size := self._fast.get_vocab_size()) > model.vocab_size:
            raise ConfigError(
                f"{path} has {size} tokens, {directory / 'config.json'} says vocab_size {model.vocab_size}"
            )
        self._model = model
        probe = self._fast.encode("a")
        inside = [i for i, special in enumerate(probe.special_tokens_mask) if not special]
        # How many special tokens the post-processor puts before and after a text.
        self._before, self._after = inside[0], len(probe.ids) - 1 - inside[-1]
        if model.max_tokens <= self._before + self._after:
            raise ConfigError(f"{path}: special tokens alone fill the {model.max_tokens} tokens allowed")

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text with its special tokens, uncut. One call for many texts uses every core."""
        if self._model.lowercase:
            texts = [text.lower() for text in texts]
        return [np.array(e.ids, dtype=np.int32) for e in self._fast.encode_batch_fast(list(texts))]

    def cut_text(self, ids: Ids, truncate: str, row: int) -> Tokens:
        """Fit an encoded text into the model's length; special tokens stay. BadRequest: `truncate` forbids it."""
        return self._cut(ids, truncate, row, self._before, self._after)

    def check_ids(self, ids: Ids, truncate: str, row: int) -> Tokens:
        """Check ids given by the caller and fit them: used as they are, none added.

        A model that pools the last token keeps it, one that pools the first keeps that.
        BadRequest: none at all, or one outside the vocabulary.
        """
        if not len(ids):
            raise BadRequest(f"Input at index {row} cannot be empty")
        outside = ids[(ids < 0) | (ids >= self._model.vocab_size)]
        if len(outside):
            raise BadRequest(
                f"Input at index {row} has token id {outside[0]}, which is outside the model's vocabulary "
                f"(0 to {self._model.vocab_size - 1})"
            )
        pooled = {"cls": (1, 0), "last": (0, 1)}.get(self._model.pooling, (0, 0))
        return self._cut(ids, truncate, row, *pooled)

    def _cut(self, ids: Ids, truncate: str, row: int, before: int, after: int) -> Tokens:
        limit = self._model.max_tokens
        dropped = len(ids) - limit
        if dropped <= 0:
            return Tokens(ids, 0)
        if truncate == "none":
            raise BadRequest(
                f"The input ({len(ids)} tokens) is longer than the model's context length ({limit} tokens). "
                f"(input at index {row})"
            )
        start = before if truncate == "end" else before + dropped
        kept = (ids[:before], ids[start : start + limit - before - after], ids[len(ids) - after :])
        return Tokens(np.concatenate(kept), dropped)
