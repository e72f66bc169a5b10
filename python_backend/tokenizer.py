"""Text -> token ids: special tokens, the end of a text, truncation that keeps both."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as FastTokenizer

from triton_embed.python_backend.config import ModelConfig
from triton_embed.python_backend.errors import BadRequest, ConfigError
from triton_embed.python_backend.json_file import JsonFile
from triton_embed.python_backend.row import Ids, Row


class Tokenizer:
    """The checkpoint's tokenizer.json, with its own padding and truncation switched off: both are ours.

    `eos` is `Spec.eos`. ConfigError: no tokenizer.json, an unreadable one, one with more ids than the network has
    embeddings, one without the token that texts end with, or one that ends them with another.
    """

    def __init__(self, directory: Path, model: ModelConfig, eos: str | None) -> None:
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{path} is missing")
        try:
            self._fast = FastTokenizer.from_file(str(path))
            self._fast.no_padding()
            self._fast.no_truncation()
            probe = self._fast.encode("a")
        except Exception as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        if (size := self._fast.get_vocab_size()) > model.vocab_size:
            raise ConfigError(
                f"{path} has {size} tokens, {directory / 'config.json'} says vocab_size {model.vocab_size}"
            )
        self._model = model
        inside = [i for i, special in enumerate(probe.special_tokens_mask) if not special]
        if not inside:
            raise ConfigError(f"{path} makes no token of the letter a")
        # How many special tokens the post-processor puts before and after a text.
        self._before, self._after = inside[0], len(probe.ids) - 1 - inside[-1]
        self._appended: tuple[int, ...] = ()
        if eos is not None:
            self._end_with(directory, eos, probe.tokens[inside[-1] + 1 :])
        if model.max_tokens <= self._before + self._after:
            raise ConfigError(f"{path}: special tokens alone fill the {model.max_tokens} tokens allowed")

    def _end_with(self, directory: Path, eos: str, ending: list[str]) -> None:
        """Append the token that texts end with, unless the post-processor, which puts `ending`, does it."""
        if eos == "eos_token":
            config = JsonFile(directory / "tokenizer_config.json", required=True)
            stated = config.need("eos_token", (str, dict))
            eos = stated if isinstance(stated, str) else config.nested("eos_token").need("content", str)
        number = self._fast.token_to_id(eos)
        if number is None:
            raise ConfigError(f"{directory / 'tokenizer.json'} has no token '{eos}', which every text must end with")
        if not ending:
            self._appended, self._after = (number,), 1
        elif ending[-1] != eos:
            raise ConfigError(
                f"{directory / 'tokenizer.json'} ends texts with '{ending[-1]}', the model was trained to see '{eos}'"
            )

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text with its special tokens, uncut. One call for many texts uses every core."""
        if self._model.lowercase:
            texts = [text.lower() for text in texts]
        found = self._fast.encode_batch_fast(list(texts))
        return [np.array([*e.ids, *self._appended], dtype=np.int32) for e in found]

    def opening(self, text: str) -> Ids:
        """The ids that texts beginning so begin with, but the last two: what follows may merge into those."""
        ids = self.encode([text])[0]
        return ids[: max(len(ids) - self._after - 2, 0)]

    def count(self, text: str) -> int:
        """Tokens of a text by itself, without special tokens around it."""
        return len(self._fast.encode(text, add_special_tokens=False).ids)

    def pieces(self, text: str) -> list[str]:
        """The text cut in front of every token that begins with a new character; joined, they are the text as read."""
        if self._model.lowercase:
            text = text.lower()
        starts = [0]
        for start, _ in self._fast.encode(text, add_special_tokens=False).offsets:
            if start > starts[-1]:  # tokens of a few bytes each may share a character
                starts.append(start)
        return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]

    def cut_text(self, ids: Ids, truncate: str, row: int, prompt: str = "") -> Row:
        """Fit an encoded text that begins with a prompt into the model's length; special tokens stay, and the prompt.

        BadRequest: `truncate` forbids it, or what stays is too much.
        """
        before = self._before
        if prompt and truncate == "start" and len(ids) > self.limit:
            alone = self.encode([prompt])[0]
            size = min(len(alone) - self._after, len(ids) - self._after)
            # What both begin with: the end of the prompt and the text may have become a token together.
            apart = np.flatnonzero(alone[:size] != ids[:size])
            before = max(before, int(apart[0]) if len(apart) else size)
        return self.cut(ids, truncate, row, before, self._after)

    def cut_ids(self, ids: Ids, truncate: str, row: int) -> Row:
        """Fit ids given by the caller; those that the pooling needs stay. BadRequest: `truncate` forbids it."""
        return self.cut(ids, truncate, row, *self.pooled)

    @property
    def limit(self) -> int:
        """The model's length."""
        return self._model.max_tokens

    @property
    def pooled(self) -> tuple[int, int]:
        """How many ids the pooling needs at the beginning and at the end of a row."""
        return {"cls": (1, 0), "last": (0, 1), "projection": (0, 1)}.get(self._model.pooling, (0, 0))

    def check_ids(self, ids: Ids, row: int) -> Ids:
        """Ids given by the caller are used as they are. BadRequest: none at all, or one outside the vocabulary."""
        if not len(ids):
            raise BadRequest(f"Input at index {row} cannot be empty")
        outside = ids[(ids < 0) | (ids >= self._model.vocab_size)]
        if len(outside):
            raise BadRequest(
                f"Input at index {row} has token id {outside[0]}, which is outside the model's vocabulary "
                f"(0 to {self._model.vocab_size - 1})"
            )
        return ids

    def cut(self, ids: Ids, truncate: str, row: int, before: int, after: int) -> Row:
        """Fit ids into the model's length; the first `before` and the last `after` stay.

        BadRequest: `truncate` forbids it, or those alone are too many.
        """
        limit = self.limit
        dropped = len(ids) - limit
        if dropped <= 0:
            return Row(ids)
        if truncate == "none":
            raise BadRequest(
                f"The input ({len(ids)} tokens) is longer than the model's context length ({limit} tokens). "
                f"(input at index {row})"
            )
        if before + after > limit:
            raise BadRequest(
                f"Input at index {row}: images and instruction take {before + after} tokens, more than the model's "
                f"context length ({limit} tokens)"
            )
        start = before if truncate == "end" else before + dropped
        kept = (ids[:before], ids[start : start + limit - before - after], ids[len(ids) - after :])
        return Row(np.concatenate(kept), dropped=dropped)
