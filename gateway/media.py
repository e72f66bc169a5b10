"""References to images become bytes: base64 is decoded, URLs are fetched, files of this machine are never read.

Whether the bytes are an image is for Pillow to say, in the model.
"""

import asyncio
import binascii
from collections.abc import Callable, Mapping, Sequence

from triton_embed.gateway.errors import ApiError, invalid
from triton_embed.gateway.fetch import IMAGE_BYTES, Fetcher, FetchError

Refuse = Callable[[int, str], None]  # told the index of an input and what is wrong with it; it may raise

AT_ONCE = 8  # fetches of one request, so that a long one leaves slots to others
# Decoding holds the interpreter for over 1 ms a MiB: what is longer is decoded in pieces, away from the event loop.
PIECE = 2**18  # characters; a multiple of 4


class Media:
    """One for each gateway. Without a `fetcher` URLs are refused.

    `max_bytes` bounds the images of one request together, `timeout` (seconds) the fetching of them all.
    """

    def __init__(self, fetcher: Fetcher | None, *, max_bytes: int, timeout: float) -> None:
        self._fetcher = fetcher
        self._max_bytes = max_bytes
        self._timeout = timeout

    async def close(self) -> None:
        if self._fetcher is not None:
            await self._fetcher.close()

    async def load(self, images: Sequence[Sequence[str]], param: str, refuse: Refuse) -> list[list[bytes]]:
        """The encoded images of each input, in order; none for one that `refuse` was told about.

        ApiError 400: they are too large together; 504: they took longer than the timeout. A URL that occurs twice is
        fetched once.
        """
        small = sum(len(reference) for row in images for reference in row) <= PIECE
        decoded = _decode_all(images) if small else await asyncio.to_thread(_decode_all, images)
        rows: list[list[bytes]] = []
        places: dict[str, list[int]] = {}
        for i, found in enumerate(decoded):
            if isinstance(found, str):
                refuse(i, f"Input at index {i}: {found}")
                found = []
            else:
                for reference in filter(_is_url, images[i]):
                    places.setdefault(reference, []).append(i)
            rows.append(found)
        if places:
            fetched = await self._fetch_all(places, param, refuse)
            for i in {i for named in places.values() for i in named}:
                got = [fetched.get(reference, image) for reference, image in zip(images[i], rows[i], strict=False)]
                rows[i] = got if all(got) else []
        self._check_size(sum(len(image) for row in rows for image in row), param)
        return rows

    async def _fetch_all(self, places: Mapping[str, Sequence[int]], param: str, refuse: Refuse) -> dict[str, bytes]:
        """The body of each URL that has one, given the indices of the inputs that name it."""
        fetched: dict[str, bytes] = {}
        gate = asyncio.Semaphore(AT_ONCE)

        async def fetch(url: str, named: Sequence[int]) -> None:
            try:
                async with gate:
                    fetched[url] = await self._fetch(url)
            except FetchError as error:
                for i in named:
                    refuse(i, f"Input at index {i}: the image could not be fetched: {error}")
            self._check_size(sum(map(len, fetched.values())), param)

        try:
            async with asyncio.timeout(self._timeout), asyncio.TaskGroup() as group:
                for url, named in places.items():
                    group.create_task(fetch(url, named))
        except TimeoutError:
            raise ApiError(504, f"The images could not be fetched within {self._timeout:g} s") from None
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return fetched

    async def _fetch(self, url: str) -> bytes:
        if self._fetcher is None:
            raise FetchError("this server fetches no URLs, send the image itself in base64")
        if body := await self._fetcher.get(url):
            return body
        raise FetchError("it is empty")  # to the model this would be an input without an image

    def _check_size(self, size: int, param: str) -> None:
        if size > self._max_bytes:
            raise invalid(f"The images of the request are larger than {self._max_bytes} bytes together", param)


def _is_url(reference: str) -> bool:
    return reference[:8].lower().startswith(("http://", "https://"))


def _decode_all(images: Sequence[Sequence[str]]) -> list[list[bytes] | str]:
    """Every image that came with the request, nothing yet in the places of URLs; or what is wrong with an input's."""
    return [_decode_row(row) for row in images]


def _decode_row(references: Sequence[str]) -> list[bytes] | str:
    images = []
    for reference in references:
        if _is_url(reference):
            images.append(b"")
            continue
        try:
            image = _from_base64(_payload(reference))
        except ValueError:
            return "image must be base64, a data: URI in base64 or an http(s) URL"
        if not image:  # to the model this would be an input without an image
            return "the image is empty"
        if len(image) > IMAGE_BYTES:
            return f"the image is larger than {IMAGE_BYTES // 2**20} MiB"
        images.append(image)
    return images


def _payload(reference: str) -> str:
    """What is base64 in a reference. ValueError: a data: URI in another encoding."""
    if reference[:5].lower() != "data:":
        return reference
    head, _, payload = reference.partition(",")
    if not head.lower().endswith(";base64"):
        raise ValueError("not in base64")
    return payload


def _from_base64(text: str) -> bytes:
    """ValueError: it is not. Line breaks are no fault: tools wrap base64."""
    text = "".join(text.split())
    pieces = (text[i : i + PIECE] for i in range(0, len(text), PIECE))
    return b"".join(binascii.a2b_base64(piece, strict_mode=True) for piece in pieces)
