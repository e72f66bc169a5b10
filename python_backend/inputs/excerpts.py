"""Excerpts: the part of a long text that is tokenized, because a row of a few hundred tokens needs no megabytes.

Tokenizing a megabyte takes seconds, in which the model's other requests wait (measured: 2 to 4 s per million
characters, on one core). An excerpt gives the same token ids: it is cut where no token can cross, and extended until
more tokens are read than are used.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

from triton_embed.python_backend.errors import BadInput

FIRST_CHARACTERS = 65_536  # read at first; shorter texts are read whole
FIRST_PER_TOKEN = 16  # characters per token of the model's length, if that is more; ordinary text has about four
GROWTH = 4  # how much more is read if that was not enough
SEARCHED = 65_536  # characters in which to look for a place to cut
BEGINNING = 1_024  # characters in which to look for the end of what stays at the start of a text cut there
SPARE_TOKENS = 16  # around a cut, for white space that tokenizers merge with what follows
# A single space before a word, or the start of a line. No token crosses such a place, see `splits_at_spaces`.
_CUT = re.compile(r"(?<=\w) (?=\w)|(?<=\n)(?=\w)")


@dataclass(frozen=True)
class Excerpt:
    """Part of a text.

    Attributes:
        characters: Length of the whole text.
        spare: Tokens of the excerpt that may differ from those of the whole text.
    """

    text: str
    characters: int
    spare: int = 0

    @property
    def is_whole(self) -> bool:
        return len(self.text) == self.characters

    def estimate(self, tokens: int) -> int:
        """Return the tokens of the whole text if the rest has as many per character as the excerpt, which has some."""
        return round(tokens * self.characters / len(self.text))


def splits_at_spaces(pieces: Collection[str]) -> bool:
    """Return whether no piece of a vocabulary continues after a space, so that texts may be cut before one."""
    space = "▁" if any(piece.startswith("▁") for piece in pieces) else "Ġ"  # SentencePiece's mark, or that of bytes
    crosses = re.compile(rf"[^{space} ][{space} ]")
    return not any(crosses.search(piece) for piece in pieces)


def first_size(max_tokens: int) -> int:
    """Return the characters to read at first for a model of this length."""
    return max(FIRST_CHARACTERS, FIRST_PER_TOKEN * max_tokens)


def excerpt(text: str, size: int, limit: int, index: int, *, from_end: bool = False, may_cut: bool = True) -> Excerpt:
    """Return the first `size` characters of a text or a few more.

    Args:
        limit: Characters to read at most.
        index: The index of the input in the request, for error messages.
        from_end: Return the last `size` characters instead, after the beginning, which may merge with a prompt.
        may_cut: Whether the tokenizer allows cuts, see `splits_at_spaces`.

    Raises:
        BadInput: The text has more than `limit` characters and no place to cut it.
    """
    if len(text) <= size:
        return Excerpt(text, len(text))
    if may_cut and size <= limit:
        if from_end:
            first = _CUT.search(text, 0, BEGINNING)
            last = _CUT.search(text, len(text) - size)
            if first and last:
                beginning = text[: first.start()]
                # A character has at most four bytes, each of which may be a token.
                spare = 4 * len(beginning) + SPARE_TOKENS
                return Excerpt(beginning + text[last.start() :], len(text), spare)
        elif end := _CUT.search(text, size, size + SEARCHED):
            return Excerpt(text[: end.start()], len(text), SPARE_TOKENS)
    if len(text) <= limit:
        return Excerpt(text, len(text))
    raise BadInput(
        index,
        "too_long",
        f"Input has {len(text)} characters, more than the {limit} that are read without finding words",
    )
