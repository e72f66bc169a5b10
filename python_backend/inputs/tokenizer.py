"""Tokenizer: text to token ids, with special tokens, the EOS token and truncation that preserves both."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from triton_embed.python_backend.checkpoint.config import ModelConfig
from triton_embed.python_backend.checkpoint.json_file import JsonFile
from triton_embed.python_backend.errors import BadInput, ConfigError
from triton_embed.python_backend.inputs import tokenizer_files
from triton_embed.python_backend.inputs.excerpts import splits_at_spaces
from triton_embed.python_backend.inputs.row import Ids, Row
from triton_embed.python_backend.wire import length_error, vocabulary_error


class Tokenizer:
    """The tokenizer of the checkpoint, loaded by transformers from all files and keys that belong to it.

    The padding and truncation configured in the files are switched off: this class truncates, and nothing is padded.

    Args:
        eos: The token that must end every text, see `Spec.eos`.

    Attributes:
        truncate_default: The side of long texts that the checkpoint's own tokenizer cuts: "end" or "start".

    Raises:
        ConfigError: transformers cannot load the tokenizer, or it lacks the EOS token, or ends texts with another one.
    """

    def __init__(self, directory: Path, model: ModelConfig, eos: str | None) -> None:
        config = JsonFile(directory / "tokenizer_config.json")
        if eos == "eos_token":
            eos = _eos_token(directory, config)
        self._fast, truncation_side = tokenizer_files.load(directory, model.lowercase)
        self.truncate_default = "start" if truncation_side == "left" else "end"
        self.splits_at_spaces = splits_at_spaces(self._fast.get_vocab(with_added_tokens=False))
        # A token that a text may contain but the network has no embedding for.
        self._has_unknown_ids = max(self._fast.get_vocab().values()) >= model.vocab_size
        self._model = model
        probe = self._fast.encode("a")
        text_indices = [i for i, special in enumerate(probe.special_tokens_mask) if not special]
        if not text_indices:
            raise ConfigError(f"{directory}: the tokenizer produces no token for the letter 'a'")
        # Number of special tokens that the post-processor adds before and after a text.
        self._leading, self._trailing = text_indices[0], len(probe.ids) - 1 - text_indices[-1]
        self._appended: tuple[int, ...] = ()
        if eos is not None:
            self._append_eos(directory, config, eos, probe.tokens[text_indices[-1] + 1 :])
        if model.max_tokens <= self._leading + self._trailing:
            raise ConfigError(f"{directory}: special tokens alone fill the maximum length of {model.max_tokens} tokens")

    def _append_eos(self, directory: Path, config: JsonFile, eos: str, trailing: list[str]) -> None:
        """Append the EOS token to every text, unless the post-processor already adds it (in `trailing`)."""
        eos_id = self._fast.token_to_id(eos)
        if eos_id is None or not tokenizer_files.is_stored(eos, directory, config, self._fast):
            raise ConfigError(f"{directory}: the tokenizer has no token '{eos}', which every text must end with")
        if not trailing:
            self._appended, self._trailing = (eos_id,), 1
        elif trailing[-1] != eos:
            raise ConfigError(
                f"{directory}: the tokenizer ends texts with '{trailing[-1]}', but the model was trained with '{eos}'"
            )

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text with its special tokens, not truncated.

        Encode many texts in one call: the call uses every core.
        """
        encodings = self._fast.encode_batch_fast(list(texts))
        return [np.array([*encoding.ids, *self._appended], dtype=np.int32) for encoding in encodings]

    def stable_prefix(self, text: str) -> Ids:
        """Return the ids that every text starting with `text` starts with.

        The last two tokens of `text` are left out, because they may merge with the characters that follow.
        """
        ids = self.encode([text])[0]
        return ids[: max(len(ids) - self._trailing - 2, 0)]

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text without special tokens."""
        return len(self._fast.encode(text, add_special_tokens=False).ids)

    def split_at_tokens(self, text: str) -> list[str]:
        """Split a text before every token that starts at a new character; joined, the pieces are the text."""
        starts = [0]
        for start, _ in self._fast.encode(text, add_special_tokens=False).offsets:
            if start > starts[-1]:  # several byte-level tokens may belong to one character
                starts.append(start)
        return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]

    def truncate_text(self, ids: Ids, truncate: str, index: int, prompt: str = "") -> Row:
        """Truncate an encoded text to the model's maximum length; keep the special tokens and the prompt before it.

        Raises:
            BadInput: `truncate` is "none", or the tokens to keep exceed the maximum length.
        """
        head = self._leading
        if prompt and truncate == "start" and len(ids) > self.max_tokens:
            prompt_ids = self.encode([prompt])[0]
            compared = min(len(prompt_ids) - self._trailing, len(ids) - self._trailing)
            # Keep the common prefix only: the end of the prompt may have merged with the text into one token.
            mismatches = np.flatnonzero(prompt_ids[:compared] != ids[:compared])
            head = max(head, int(mismatches[0]) if len(mismatches) else compared)
        return self.truncate(ids, truncate, index, head, self._trailing)

    def truncate_token_ids(self, ids: Ids, truncate: str, index: int) -> Row:
        """Truncate token ids from the request; keep the ids that the pooling needs.

        Raises:
            BadInput: `truncate` is "none" and the ids exceed the maximum length.
        """
        return self.truncate(ids, truncate, index, *self.pooled_ends)

    @property
    def max_tokens(self) -> int:
        """The model's maximum length."""
        return self._model.max_tokens

    @property
    def pooled_ends(self) -> tuple[int, int]:
        """The number of ids that the pooling needs at the start and at the end of a row."""
        return {"cls": (1, 0), "last": (0, 1), "projection": (0, 1)}.get(self._model.pooling, (0, 0))

    def check_ids(self, ids: Ids, index: int) -> Ids:
        """Return token ids from the request unchanged after checking them.

        Raises:
            BadInput: `ids` is empty, or an id is outside the vocabulary.
        """
        if not len(ids):
            raise BadInput(index, "empty", "Input cannot be empty")
        if message := self._vocabulary_error(ids):
            raise BadInput(index, "invalid_token_id", message)
        return ids

    def _vocabulary_error(self, ids: Ids) -> str | None:
        return vocabulary_error(ids, ids.min(), ids.max(), self._model.vocab_size)

    def truncate(self, ids: Ids, truncate: str, index: int, head: int, tail: int) -> Row:
        """Truncate ids to the model's maximum length; keep the first `head` and the last `tail` ids.

        Args:
            truncate: "end" or "start", the side of the text to cut; "none" rejects ids that are too long.
            index: The index of the input in the request, for error messages.

        Raises:
            BadInput: `truncate` is "none", the ids to keep exceed the maximum length, or an id has no embedding.
        """
        row = self._cut(ids, truncate, index, head, tail)
        if self._has_unknown_ids and (message := self._vocabulary_error(row.ids)):
            raise BadInput(index, "invalid_token_id", message)
        return row

    def _cut(self, ids: Ids, truncate: str, index: int, head: int, tail: int) -> Row:
        limit = self.max_tokens
        message = length_error(len(ids), limit)
        if message is None:
            return Row(ids)
        if truncate == "none":
            raise BadInput(index, "too_long", message)
        dropped = len(ids) - limit
        if head + tail > limit:
            raise BadInput(
                index,
                "too_long",
                f"Input: images and instruction take {head + tail} tokens, more than the model's context length "
                f"({limit} tokens)",
            )
        start = head if truncate == "end" else head + dropped
        parts = (ids[:head], ids[start : start + limit - head - tail], ids[len(ids) - tail :])
        return Row(np.concatenate(parts), dropped=dropped)


def _eos_token(directory: Path, config: JsonFile) -> str:
    """Return the `eos_token` of tokenizer_config.json, else of special_tokens_map.json."""
    older = JsonFile(directory / "special_tokens_map.json")
    is_older = older.has("eos_token") and not config.has("eos_token")
    file = older if is_older else JsonFile(directory / "tokenizer_config.json", required=True)
    value = file.require("eos_token", (str, dict))
    return value if isinstance(value, str) else str(file.nested("eos_token").require("content", str))
