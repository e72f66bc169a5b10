"""Inputs: the rows of one request on their way to the network, and what comes back on its way to the caller.

What is wrong with a row is the end of its request or, with on_error "report", of that row alone: `faults` holds its
message, nothing is computed for it, and its place in every output holds zeros.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import numpy.typing as npt

from triton_embed.python_backend.errors import BadRequest
from triton_embed.python_backend.long_text import Chunk, combine, first_of, split_ids, split_text
from triton_embed.python_backend.reader import Reader, Template
from triton_embed.python_backend.request import PROMPTS, Item, count_rows, parse_prompts, read_item, unpad_ids
from triton_embed.python_backend.row import NO_IDS, Ids, Pixels, Row

LARGEST_IDS = 2**24  # numbers of the output IDS, padding included: 64 MiB


class Inputs:
    """What rows of every kind have in common.

    `rows` is what is to be computed: a row for each good one or, with long_text "mean", for each of its chunks.
    """

    def __init__(self, reader: Reader, parameters: Mapping[str, Any], count: int) -> None:
        self._reader = reader
        self._truncate: str = parameters.get("truncate", "end")
        self._mean = parameters.get("long_text") == "mean"
        self._report = parameters.get("on_error") == "report"
        self._count = count
        self._ids: list[Ids] = [NO_IDS] * count  # as sent or encoded, uncut
        self._weights: list[int] = []  # of each chunk
        self._counts: list[int] = []  # chunks of each good row
        self.rows: list[Row] = []
        self.faults: dict[int, str] = {}

    @property
    def averaged(self) -> bool:
        """Whether a vector is the average of several, which must then be whole ones."""
        return len(self._weights) > len(self._counts)

    def texts(self) -> list[str]:
        """What is to be encoded."""
        return []

    def take(self, encoded: Iterator[Ids]) -> None:
        """Take the ids of each of `texts`."""

    def make_rows(self, limit: int) -> None:
        """Fill `rows`. BadRequest: a row's fault, or more than `limit` tokens in all."""
        if self._mean:  # before they are split for nothing
            _check_total(sum(map(len, self._ids)), limit)
        total = 0
        for i in self._good():
            try:
                chunks = self._split(i, limit - total) if self._mean else ((self._row(i), 1),)
            except BadRequest as error:
                self._fault(i, error)
                continue
            for row, weight in chunks:
                self.rows.append(row)
                self._weights.append(weight)
                total += row.tokens
            self._counts.append(len(chunks))
        _check_total(total, limit)

    def padded_ids(self) -> npt.NDArray[np.int32]:
        """[n,L]: what the model would read if it had no limit, rows padded with -1.

        BadRequest: a row's fault, one with a picture among them, or too much padding.
        """
        found = [NO_IDS] * self._count
        for i in self._good():
            try:
                found[i] = self._whole(i)
            except BadRequest as error:
                self._fault(i, error)
        longest = max(map(len, found), default=0)
        if self._count * longest > LARGEST_IDS:
            raise BadRequest(
                f"{self._count} rows padded to the {longest} ids of the longest are more than {LARGEST_IDS} numbers: "
                "send fewer at once"
            )
        padded = np.full((self._count, max(longest, 1)), -1, dtype=np.int32)
        for row, ids in zip(padded, found, strict=True):
            row[: len(ids)] = ids
        return padded

    def embeddings(self, vectors: npt.NDArray[np.float32], dims: int) -> npt.NDArray[np.float32]:
        """[n,dims], from the vectors of `rows`."""
        return self._spread(combine(vectors, self._weights, self._counts, dims) if self.averaged else vectors)

    def tokens(self) -> npt.NDArray[np.int32]:
        """[n,1]: tokens computed."""
        return self._column([row.tokens for row in self.rows])

    def dropped(self) -> npt.NDArray[np.int32]:
        """[n,1]: tokens cut off."""
        return self._column([row.dropped for row in self.rows])

    def reused(self, sources: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """[n,1], from where the vector of each of `rows` came from: of a row that is several, the dearest."""
        column = sources[:, None]
        return self._spread(np.minimum.reduceat(column, first_of(self._counts)) if self.averaged else column)

    def errors(self) -> npt.NDArray[np.object_]:
        """[n,1]: what is wrong with each row, empty where nothing is."""
        return np.array([[self.faults.get(i, "").encode()] for i in range(self._count)], dtype=np.object_)

    def _good(self) -> Iterator[int]:
        return (i for i in range(self._count) if i not in self.faults)

    def _fault(self, index: int, error: BadRequest) -> None:
        if not self._report:
            raise error
        self.faults.setdefault(index, str(error))

    def _spread(self, found: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Rows of the good ones -> rows of all."""
        if not self.faults:
            return found
        whole = np.zeros((self._count, *found.shape[1:]), dtype=found.dtype)
        whole[list(self._good())] = found
        return whole

    def _column(self, values: list[int]) -> npt.NDArray[np.int32]:
        """A number of each of `rows` -> [n,1], added up where a row is several."""
        column = np.array(values, dtype=np.int32)[:, None]
        if self.averaged:
            column = np.add.reduceat(column, first_of(self._counts), dtype=np.int32)
        return self._spread(column)

    def _row(self, index: int) -> Row:
        raise NotImplementedError

    def _split(self, index: int, most: int) -> Sequence[Chunk]:
        """A row's chunks, up to the one that brings them over `most` tokens."""
        raise NotImplementedError

    def _whole(self, index: int) -> Ids:
        raise NotImplementedError


class ItemInputs(Inputs):
    """Rows of TEXT and IMAGE."""

    def __init__(
        self,
        reader: Reader,
        parameters: Mapping[str, Any],
        text: npt.NDArray[np.object_] | None,
        image: npt.NDArray[np.object_] | None,
    ) -> None:
        super().__init__(reader, parameters, count_rows(text, image))
        self._items = [Item()] * self._count
        for i in range(self._count):
            try:
                item = read_item(text, image, i)
                reader.check(item, i)
            except BadRequest as error:
                self._fault(i, error)
            else:
                self._items[i] = item
        if "prompts" in parameters:
            self._templates = [Template()] * self._count
            for i, prompt in enumerate(parse_prompts(parameters["prompts"], self._count)):
                try:
                    self._templates[i] = reader.template(prompt)
                except BadRequest as error:
                    self._fault(i, BadRequest(f"{error} (input at index {i})"))
        else:
            self._templates = [reader.template(parameters)] * self._count
        self._written = [i for i in self._good() if reader.has_ids(self._items[i])]
        self._pictures: list[list[Future[Pixels]]] = []

    def open_pictures(self, pool: Executor) -> None:
        """Have the images decoded; `make_rows` waits for them."""
        read = self._reader.picture
        self._pictures = [
            [] if i in self.faults else [pool.submit(read, image, i) for image in item.images]
            for i, item in enumerate(self._items)
        ]

    def texts(self) -> list[str]:
        return [self._templates[i](self._items[i]) for i in self._written]

    def take(self, encoded: Iterator[Ids]) -> None:
        for i in self._written:
            self._ids[i] = next(encoded)

    def _row(self, index: int) -> Row:
        return self._fit(index, self._truncate)

    def _fit(self, index: int, truncate: str) -> Row:
        template = self._templates[index]
        pictures = tuple(future.result() for future in self._pictures[index])
        return self._reader.share(self._reader.row(self._ids[index], pictures, template, truncate, index), template)

    def _split(self, index: int, most: int) -> Sequence[Chunk]:
        item = self._items[index]
        if item.images or len(self._ids[index]) <= self._reader.tokenizer.limit:
            return [(self._fit(index, "none"), 1)]
        return _up_to(most, split_text(self._reader, item.text, self._templates[index], index))

    def _whole(self, index: int) -> Ids:
        if self._items[index].images:
            raise BadRequest(f"Input at index {index} has an image, which is no token ids")
        return self._ids[index]


class IdInputs(Inputs):
    """Rows of INPUT_IDS."""

    def __init__(self, reader: Reader, parameters: Mapping[str, Any], ids: npt.NDArray[np.int32]) -> None:
        super().__init__(reader, parameters, len(ids))
        if not parameters.keys().isdisjoint(PROMPTS):
            raise BadRequest("instruction, prompt_name and prompts need TEXT: token ids are used as they are")
        for i, row in enumerate(ids):
            try:
                self._ids[i] = unpad_ids(row, i)
            except BadRequest as error:
                self._fault(i, error)

    def _row(self, index: int) -> Row:
        return self._reader.ids_row(self._ids[index], self._truncate, index)

    def _split(self, index: int, most: int) -> Sequence[Chunk]:
        return _up_to(most, split_ids(self._reader, self._ids[index], index))

    def _whole(self, index: int) -> Ids:
        return self._reader.own_ids(self._ids[index], index)


def _check_total(tokens: int, limit: int) -> None:
    if tokens > limit:
        raise BadRequest(f"The request has {tokens} tokens, more than the {limit} a request may have")


def _up_to(most: int, chunks: Iterator[Chunk]) -> list[Chunk]:
    found = []
    for chunk in chunks:
        found.append(chunk)
        most -= chunk[0].tokens
        if most < 0:
            break
    return found
