"""Chunking of texts that are longer than the model: chunks are embedded separately, and their vectors averaged.

A text is cut at token boundaries, and each chunk is templated and encoded as if it had been sent alone. The weight of a
chunk is the number of its own tokens, without prompt and special tokens, which are the same in every chunk.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from triton_embed.python_backend.errors import BadInput
from triton_embed.python_backend.inputs.parameters import Item
from triton_embed.python_backend.inputs.processors import Template, TextProcessor
from triton_embed.python_backend.inputs.row import Ids, Row

Chunk = tuple[Row, int]  # (row, weight in tokens)


def split_text(processor: TextProcessor, text: str, template: Template, index: int) -> Iterator[Chunk]:
    """Yield the chunks of a text, each as long as the model allows. Chunks of white space alone are left out.

    Raises:
        BadInput: The template leaves no room for a token of the text.
    """
    tokenizer = processor.tokenizer
    pieces = tokenizer.split_at_tokens(text)
    max_chunk = tokenizer.max_tokens - len(tokenizer.encode([template(Item())])[0])
    start = 0
    while start < len(pieces):
        count = min(max_chunk, len(pieces) - start)
        while count > 0:
            chunk = "".join(pieces[start : start + count])
            ids = tokenizer.encode([template(Item(chunk))])[0]
            excess = len(ids) - tokenizer.max_tokens
            if excess <= 0:
                break
            # The next chunk may still be too long, because a word that is cut may have more tokens than the whole word.
            count = max(count - excess, count // 2)
        else:
            raise _no_room(index)
        start += count
        if chunk.strip():
            row = processor.mark_shared_prefix(processor.build_row(ids, (), template, "none", index), template)
            yield row, max(1, tokenizer.count_tokens(chunk))


def split_ids(processor: TextProcessor, ids: Ids, index: int) -> Iterator[Chunk]:
    """Yield the chunks of a caller's token ids. Each keeps the ids at the ends that pooling needs.

    Raises:
        BadInput: The ids are not valid, or the model's length leaves no room between the ends.
    """
    ids = processor.check_token_ids(ids, index)
    before, after = processor.tokenizer.pooled_ends
    max_chunk = processor.tokenizer.max_tokens - before - after
    if len(ids) <= processor.tokenizer.max_tokens:
        yield Row(ids), 1
        return
    if max_chunk < 1:
        raise _no_room(index)
    end = len(ids) - after
    for start in range(before, end, max_chunk):
        chunk = ids[start : min(start + max_chunk, end)]
        yield Row(np.concatenate([ids[:before], chunk, ids[end:]])), len(chunk)


def combine(
    vectors: npt.NDArray[np.float32], weights: Sequence[int], counts: Sequence[int], dims: int
) -> npt.NDArray[np.float32]:
    """Average unit vectors [C,E] of chunks, `counts` of them per text -> fp32 [B,dims], truncated and normalized."""
    weighted = vectors * np.array(weights, dtype=np.float64)[:, None]
    means = np.add.reduceat(weighted, first_chunks(counts))[:, :dims]
    norms = np.linalg.norm(means, axis=1, keepdims=True)
    combined: npt.NDArray[np.float32] = (means / np.maximum(norms, np.finfo(np.float64).tiny)).astype(np.float32)
    return combined


def first_chunks(counts: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return the index of the first chunk of each text."""
    return np.cumsum([0, *counts[:-1]])


def _no_room(index: int) -> BadInput:
    message = "Input is too long, and its instruction leaves no room for a chunk of it: shorten the instruction"
    return BadInput(index, "too_long", message)
