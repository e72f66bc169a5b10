"""The rows of one request: from its tensors to rows of the network, and from vectors back to output tensors.

An invalid row ends its request or, with on_error "report", only itself: `row_errors` has its error, nothing is
computed for it, and its entry in every output is zero.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from triton_embed.python_backend import wire
from triton_embed.python_backend.errors import BadInput, BadRequest
from triton_embed.python_backend.inputs.chunking import Chunk, combine, first_chunks, split_ids, split_text
from triton_embed.python_backend.inputs.excerpts import GROWTH, Excerpt, excerpt, first_size
from triton_embed.python_backend.inputs.parameters import Item, count_rows, parse_prompts, read_item, unpad_ids
from triton_embed.python_backend.inputs.processors import Template, TextProcessor
from triton_embed.python_backend.inputs.row import NO_IDS, Ids, Pixels, Row
from triton_embed.python_backend.wire import ErrorFormat, InputError

MAX_CHARACTERS_PER_TOKEN = 8  # of texts that are needed whole
IMAGE_CHARACTERS = 10_000  # an estimate: an image takes as long to decode as so many characters to tokenize
MAX_CHARACTERS = 2**25  # of all texts of a request with their prompts, which are tokenized in one go
MAX_PADDED_IDS = 2**24  # numbers in the output IDS, padding included: 64 MiB


class RequestRows:
    """The base class for the inputs of a request, which are the rows of TEXT, IMAGE and INPUT_IDS.

    Attributes:
        rows: The rows to compute: one for each valid input or, with long_text "mean", one for each of its chunks.
        row_errors: Index -> error of each invalid input.
        characters: Of all texts to encode; an image counts as IMAGE_CHARACTERS.
    """

    def __init__(self, processor: TextProcessor, parameters: Mapping[str, Any], count: int) -> None:
        self._processor = processor
        self._truncate: str = parameters.get("truncate", processor.tokenizer.truncate_default)
        self._mean = parameters.get("long_text") == "mean"
        self._report = parameters.get("on_error") == "report"
        self._error_format: ErrorFormat = parameters.get("error_format", "text")
        self._count = count
        self._ids: list[Ids] = [NO_IDS] * count  # as received or encoded, not truncated
        self._weights: list[int] = []  # of each chunk
        self._counts: list[int] = []  # chunks of each valid input
        self.rows: list[Row] = []
        self.row_errors: dict[int, InputError] = {}
        self.characters = 0

    @property
    def averaged(self) -> bool:
        """Whether any vector is the average of several, which must then have all dimensions."""
        return len(self._weights) > len(self._counts)

    def texts(self) -> list[str]:
        """Return the texts to encode."""
        return []

    def set_ids(self, encoded: Iterator[Ids]) -> None:
        """Set the token ids of each of `texts`."""

    def make_rows(self, limit: int) -> None:
        """Fill `rows`.

        Raises:
            BadInput: An input is invalid, and errors are not reported per input.
            BadRequest: The inputs have more than `limit` tokens together.
        """
        if self._mean:  # checked before the work of splitting too
            _check_total(sum(map(len, self._ids)), limit)
        total = 0
        for i in self._valid():
            try:
                chunks = self._split(i, limit - total) if self._mean else ((self._row(i), 1),)
            except BadInput as error:
                self._add_error(error)
                continue
            for row, weight in chunks:
                self.rows.append(row)
                self._weights.append(weight)
                total += row.tokens
            self._counts.append(len(chunks))
        _check_total(total, limit)

    def padded_ids(self) -> npt.NDArray[np.int32]:
        """Return [n,L]: the ids the model would read without a length limit, rows padded with -1.

        Raises:
            BadInput: An input is invalid or has an image, and errors are not reported per input.
            BadRequest: The result has too many ids, padding included.
        """
        rows = [NO_IDS] * self._count
        for i in self._valid():
            try:
                rows[i] = self._all_ids(i)
            except BadInput as error:
                self._add_error(error)
        longest = max(map(len, rows), default=0)
        if self._count * longest > MAX_PADDED_IDS:
            raise BadRequest(
                f"{self._count} rows padded to the {longest} ids of the longest have more than {MAX_PADDED_IDS} ids: "
                "send fewer rows at once"
            )
        padded = np.full((self._count, max(longest, 1)), -1, dtype=np.int32)
        for row, ids in zip(padded, rows, strict=True):
            row[: len(ids)] = ids
        return padded

    def embeddings(self, vectors: npt.NDArray[np.float32], dims: int) -> npt.NDArray[np.float32]:
        """Return [n,dims] from the vectors of `rows`."""
        return self._scatter(combine(vectors, self._weights, self._counts, dims) if self.averaged else vectors)

    def tokens(self) -> npt.NDArray[np.int32]:
        """Return [n,1]: the tokens of each input that are counted as usage."""
        return self._column([row.tokens for row in self.rows])

    def dropped(self) -> npt.NDArray[np.int32]:
        """Return [n,1]: tokens removed by truncation."""
        return self._column([row.dropped for row in self.rows])

    def reused(self, sources: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Return [n,1] from the source of each of `rows`.

        A chunked input gets the most expensive source of its chunks (computed > shared > cached).
        """
        column = sources[:, None]
        return self._scatter(np.minimum.reduceat(column, first_chunks(self._counts)) if self.averaged else column)

    def errors(self) -> npt.NDArray[np.uint8]:
        """Return [n,L]: the error of each row in UTF-8, padded with spaces; only spaces for valid rows."""
        texts = {i: error.write(self._error_format).encode() for i, error in self.row_errors.items()}
        longest = max(map(len, texts.values()), default=1)
        padded = b"".join(texts.get(i, b"").ljust(longest) for i in range(self._count))
        return np.frombuffer(padded, np.uint8).reshape(self._count, longest)

    def _valid(self) -> Iterator[int]:
        return (i for i in range(self._count) if i not in self.row_errors)

    def _add_error(self, error: BadInput) -> None:
        """Record the error of an input for ERROR or, unless errors are reported, raise it."""
        if not self._report:
            raise error
        self.row_errors.setdefault(error.error.index, error.error)

    def _scatter(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Expand an array of the valid inputs to all inputs; those of invalid ones are zero."""
        if not self.row_errors:
            return values
        scattered = np.zeros((self._count, *values.shape[1:]), dtype=values.dtype)
        scattered[list(self._valid())] = values
        return scattered

    def _column(self, values: list[int]) -> npt.NDArray[np.int32]:
        """Return [n,1] from a number for each of `rows`; the numbers of an input's chunks are added up."""
        column = np.array(values, dtype=np.int32)[:, None]
        if self.averaged:
            column = np.add.reduceat(column, first_chunks(self._counts), dtype=np.int32)
        return self._scatter(column)

    def _row(self, index: int) -> Row:
        """Return the row of an input, truncated as the request says."""
        raise NotImplementedError

    def _split(self, index: int, max_tokens: int) -> Sequence[Chunk]:
        """Return the chunks of an input, up to the one that exceeds `max_tokens` together."""
        raise NotImplementedError

    def _all_ids(self, index: int) -> Ids:
        """Return the ids of an input, not truncated."""
        raise NotImplementedError


class ItemRows(RequestRows):
    """Rows of TEXT and IMAGE.

    Args:
        limit: Tokens that a text may have if it is needed whole.
        whole: Whether texts are needed whole, as they also are with long_text "mean".
    """

    def __init__(
        self,
        processor: TextProcessor,
        parameters: Mapping[str, Any],
        text: npt.NDArray[np.object_] | None,
        image: npt.NDArray[np.object_] | None,
        *,
        limit: int,
        whole: bool = False,
    ) -> None:
        super().__init__(processor, parameters, count_rows(text, image))
        self._whole = whole or self._mean
        self._needed_tokens = limit if self._whole else processor.tokenizer.max_tokens
        self._items = [Item()] * self._count
        self._excerpts = [Excerpt("", 0)] * self._count
        for i in range(self._count):
            try:
                item = read_item(text, image, i)
                processor.check(item, i)
                self._excerpts[i] = self._excerpt(item.text, i, first_size(processor.tokenizer.max_tokens))
            except BadInput as error:
                self._add_error(error)
            else:
                self._items[i] = item
        if "prompts" in parameters:
            self._templates = [Template()] * self._count
            for i, prompt in enumerate(parse_prompts(parameters["prompts"], self._count)):
                try:
                    self._templates[i] = processor.template(prompt)
                except BadRequest as error:
                    self._add_error(BadInput(i, "invalid_prompt", str(error)))
        else:
            self._templates = [processor.template(parameters)] * self._count
        self._encoded_indices = [i for i in self._valid() if processor.has_ids(self._items[i])]
        self.characters = self._count_characters() + IMAGE_CHARACTERS * sum(len(item.images) for item in self._items)
        self._pixels: list[list[Future[Pixels]]] = []

    def _count_characters(self) -> int:
        """Return the characters of all texts with their prompts, which may be many times what was sent.

        Raises:
            BadRequest: They are too long.
        """
        templates = (self._templates[i] for i in self._encoded_indices)
        prompts = sum(len(template.prefix) + len(template.suffix) for template in templates)
        characters = prompts + sum(len(self._excerpts[i].text) for i in self._encoded_indices)
        if characters > MAX_CHARACTERS:
            raise BadRequest(f"The texts have {characters} characters with their prompts, more than {MAX_CHARACTERS}")
        return characters

    def decode_images(self, pool: Executor) -> None:
        """Start decoding the images; `make_rows` waits for them."""
        decode = self._processor.decode_image
        self._pixels = [
            [] if i in self.row_errors else [pool.submit(decode, image, i) for image in item.images]
            for i, item in enumerate(self._items)
        ]

    def texts(self) -> list[str]:
        return [self._text(i) for i in self._encoded_indices]

    def set_ids(self, encoded: Iterator[Ids]) -> None:
        for i in self._encoded_indices:
            self._ids[i] = next(encoded)
            try:
                self._read_on(i)
            except BadInput as error:
                self._add_error(error)

    def _text(self, index: int) -> str:
        """Return the text to encode of an input."""
        return self._templates[index](replace(self._items[index], text=self._excerpts[index].text))

    def _excerpt(self, text: str, index: int, size: int) -> Excerpt:
        tokenizer = self._processor.tokenizer
        limit = max(GROWTH * first_size(tokenizer.max_tokens), MAX_CHARACTERS_PER_TOKEN * self._needed_tokens)
        from_end = self._truncate == "start" and not self._whole
        return excerpt(text, size, limit, index, from_end=from_end, may_cut=tokenizer.splits_at_spaces)

    def _read_on(self, index: int) -> None:
        """Extend the excerpt of a text until it has more tokens than are needed.

        Raises:
            BadInput: The text is too long.
        """
        tokenizer = self._processor.tokenizer
        size = first_size(tokenizer.max_tokens)
        while not (part := self._excerpts[index]).is_whole:
            if len(self._ids[index]) > self._needed_tokens + part.spare:
                if self._whole:
                    message = f"Input has more than the {self._needed_tokens} tokens a request may have"
                    raise BadInput(index, "too_long", message)
                return
            size *= GROWTH
            self._excerpts[index] = self._excerpt(self._items[index].text, index, size)
            self._ids[index] = tokenizer.encode([self._text(index)])[0]

    def _row(self, index: int) -> Row:
        part = self._excerpts[index]
        if part.is_whole:
            return self._fit(index, self._truncate)
        if self._truncate == "none":
            raise BadInput(index, "too_long", wire.length_message(f"over {self._needed_tokens}", self._needed_tokens))
        row = self._fit(index, self._truncate)
        return replace(row, dropped=part.estimate(len(self._ids[index])) - self._needed_tokens)

    def _fit(self, index: int, truncate: str) -> Row:
        template = self._templates[index]
        images = tuple(future.result() for future in self._pixels[index])
        return self._processor.mark_shared_prefix(
            self._processor.build_row(self._ids[index], images, template, truncate, index), template
        )

    def _split(self, index: int, max_tokens: int) -> Sequence[Chunk]:
        item = self._items[index]
        if item.images or len(self._ids[index]) <= self._processor.tokenizer.max_tokens:
            return [(self._fit(index, "none"), 1)]
        return _up_to(max_tokens, split_text(self._processor, item.text, self._templates[index], index))

    def _all_ids(self, index: int) -> Ids:
        if self._items[index].images:
            raise BadInput(index, "unsupported_input", "Input has an image, which has no token ids")
        return self._ids[index]


class IdRows(RequestRows):
    """Rows of INPUT_IDS."""

    def __init__(self, processor: TextProcessor, parameters: Mapping[str, Any], ids: npt.NDArray[np.int32]) -> None:
        super().__init__(processor, parameters, len(ids))
        if not parameters.keys().isdisjoint((*wire.PROMPT_KEYS, "prompts")):
            raise BadRequest("instruction, prompt_name and prompts need TEXT: token ids are used as they are")
        for i, row in enumerate(ids):
            try:
                self._ids[i] = unpad_ids(row, i)
            except BadInput as error:
                self._add_error(error)

    def _row(self, index: int) -> Row:
        return self._processor.row_from_ids(self._ids[index], self._truncate, index)

    def _split(self, index: int, max_tokens: int) -> Sequence[Chunk]:
        return _up_to(max_tokens, split_ids(self._processor, self._ids[index], index))

    def _all_ids(self, index: int) -> Ids:
        return self._processor.check_token_ids(self._ids[index], index)


def _check_total(tokens: int, limit: int) -> None:
    if tokens > limit:
        raise BadRequest(f"The request has {tokens} tokens, more than the {limit} a request may have")


def _up_to(max_tokens: int, chunks: Iterator[Chunk]) -> list[Chunk]:
    """Return the chunks up to the one that exceeds `max_tokens` together; later ones are not computed."""
    selected = []
    for chunk in chunks:
        selected.append(chunk)
        max_tokens -= chunk[0].tokens
        if max_tokens < 0:
            break
    return selected
