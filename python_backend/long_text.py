"""Long texts: what the model cannot take at once is embedded in chunks, and the chunks' vectors are averaged.

A chunk of a text is cut out where two tokens meet and then written and encoded as if it had been sent alone. A chunk
counts by its own tokens: those of the prompt and special tokens are the same in every chunk.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from triton_embed.python_backend.errors import BadRequest
from triton_embed.python_backend.reader import Reader, Template
from triton_embed.python_backend.request import Item
from triton_embed.python_backend.row import Ids, Row

Chunk = tuple[Row, int]  # and its weight, in tokens


def split_text(reader: Reader, text: str, template: Template, index: int) -> Iterator[Chunk]:
    """The chunks of a text, each as long as the model takes. BadRequest: its template alone takes all there is.

    White space alone, which nobody could send, is left out.
    """
    tokenizer = reader.tokenizer
    pieces = tokenizer.pieces(text)
    room = tokenizer.limit - len(tokenizer.encode([template(Item())])[0])
    begin = 0
    while begin < len(pieces):
        count = min(room, len(pieces) - begin)
        while count > 0:
            chunk = "".join(pieces[begin : begin + count])
            ids = tokenizer.encode([template(Item(chunk))])[0]
            excess = len(ids) - tokenizer.limit
            if excess <= 0:
                break
            # A cut inside a word may make more tokens of it.
            count = max(count - excess, count // 2)
        else:
            raise _no_room(index)
        begin += count
        if chunk.strip():
            row = reader.share(reader.row(ids, (), template, "none", index), template)
            yield row, max(1, tokenizer.count(chunk))


def split_ids(reader: Reader, ids: Ids, index: int) -> Iterator[Chunk]:
    """The chunks of ids that the caller made; what the pooling needs of them is in each."""
    ids = reader.own_ids(ids, index)
    before, after = reader.tokenizer.pooled
    room = reader.tokenizer.limit - before - after
    if len(ids) <= reader.tokenizer.limit:
        yield Row(ids), 1
        return
    if room < 1:
        raise _no_room(index)
    end = len(ids) - after
    for start in range(before, end, room):
        chunk = ids[start : min(start + room, end)]
        yield Row(np.concatenate([ids[:before], chunk, ids[end:]])), len(chunk)


def combine(
    vectors: npt.NDArray[np.float32], weights: Sequence[int], counts: Sequence[int], dims: int
) -> npt.NDArray[np.float32]:
    """Unit vectors [C,E] of all chunks, `counts` of them a text -> fp32 [B,dims]: weighted mean, cut, norm 1."""
    weighted = vectors * np.array(weights, dtype=np.float64)[:, None]
    means = np.add.reduceat(weighted, first_of(counts))[:, :dims]
    norms = np.linalg.norm(means, axis=1, keepdims=True)
    found: npt.NDArray[np.float32] = (means / np.maximum(norms, np.finfo(np.float64).tiny)).astype(np.float32)
    return found


def first_of(counts: Sequence[int]) -> npt.NDArray[np.int64]:
    """Where each text's chunks begin among all."""
    return np.cumsum([0, *counts[:-1]])


def _no_room(index: int) -> BadRequest:
    return BadRequest(f"Input at index {index} is too long, and its instruction leaves no room for a part of it")
