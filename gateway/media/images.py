"""Loading of images: base64 is decoded and URLs are fetched. Local files are never read.

The model decides, with Pillow, whether the bytes are an image.
"""

import asyncio
import binascii
from collections.abc import Callable, Mapping, Sequence

from triton_embed.gateway.errors import ApiError, invalid
from triton_embed.gateway.media.safe_fetch import IMAGE_BYTES, Fetcher, FetchError

Refuse = Callable[[int, str], None]  # called with the index of an invalid input and the error message; may raise

MAX_FETCHES = 8  # concurrent fetches per request, so that a long request leaves slots to others
# Longer base64 is decoded in pieces in a thread, because decoding holds the interpreter lock (more than 1 ms per MiB).
PIECE_CHARACTERS = 2**18  # a multiple of 4
MIN_UNPADDED = 40  # characters; what is shorter and not padded is a file's name, not an image
_URL_SAFE = str.maketrans("-_", "+/")


class Media:
    """The image loader of one gateway.

    Args:
        fetcher: Fetches URLs; None refuses them.
        max_bytes: Limit of all images of one request together.
        timeout: Limit of all fetches of one request together, in seconds.
    """

    def __init__(self, fetcher: Fetcher | None, *, max_bytes: int, timeout: float) -> None:
        self._fetcher = fetcher
        self._max_bytes = max_bytes
        self._timeout = timeout

    async def close(self) -> None:
        if self._fetcher is not None:
            await self._fetcher.close()

    async def load(self, images: Sequence[Sequence[str]], param: str, refuse: Refuse) -> list[list[bytes]]:
        """Return the image files of each input, in order; none for an input passed to `refuse`.

        A URL that occurs twice is fetched once.

        Raises:
            ApiError: 400 if the images are too large together; 504 after the timeout.
        """
        small = sum(len(reference) for row in images for reference in row) <= PIECE_CHARACTERS
        decoded = _decode_all(images) if small else await asyncio.to_thread(_decode_all, images)
        rows: list[list[bytes]] = []
        inputs_by_url: dict[str, list[int]] = {}
        for i, row in enumerate(decoded):
            if isinstance(row, str):
                refuse(i, f"Input at index {i}: {row}")
                row = []
            else:
                for reference in filter(_is_url, images[i]):
                    inputs_by_url.setdefault(reference, []).append(i)
            rows.append(row)
        if inputs_by_url:
            fetched = await self._fetch_all(inputs_by_url, param, refuse)
            for i in {i for indices in inputs_by_url.values() for i in indices}:
                row = [fetched.get(reference, image) for reference, image in zip(images[i], rows[i], strict=False)]
                rows[i] = row if all(row) else []  # an image that could not be fetched: the input was refused
        self._check_size(sum(len(image) for row in rows for image in row), param)
        return rows

    async def _fetch_all(
        self, inputs_by_url: Mapping[str, Sequence[int]], param: str, refuse: Refuse
    ) -> dict[str, bytes]:
        """Fetch each URL. Return the bodies by URL, without those that failed."""
        fetched: dict[str, bytes] = {}
        slots = asyncio.Semaphore(MAX_FETCHES)

        async def fetch(url: str, indices: Sequence[int]) -> None:
            try:
                async with slots:
                    fetched[url] = await self._fetch(url)
            except FetchError as error:
                for i in indices:
                    refuse(i, f"Input at index {i}: the image could not be fetched: {error}")
            self._check_size(sum(map(len, fetched.values())), param)

        try:
            async with asyncio.timeout(self._timeout), asyncio.TaskGroup() as group:
                for url, indices in inputs_by_url.items():
                    group.create_task(fetch(url, indices))
        except TimeoutError:
            raise ApiError(504, f"The images could not be fetched within {self._timeout:g} s") from None
        except BaseExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        return fetched

    async def _fetch(self, url: str) -> bytes:
        if self._fetcher is None:
            raise FetchError("this server does not fetch URLs; send the image in base64")
        if body := await self._fetcher.get(url):
            return body
        raise FetchError("it is empty")  # the model would read it as an input without an image

    def _check_size(self, size: int, param: str) -> None:
        if size > self._max_bytes:
            raise invalid(f"The images of the request are larger than {self._max_bytes} bytes in total", param)


def _is_url(reference: str) -> bool:
    return reference[:8].lower().startswith(("http://", "https://"))


def _decode_all(images: Sequence[Sequence[str]]) -> list[list[bytes] | str]:
    """Return, for each input, its decoded images with b"" for URLs, or the text of an error."""
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
        if not image:  # the model would read it as an input without an image
            return "the image is empty"
        if len(image) > IMAGE_BYTES:
            return f"the image is larger than {IMAGE_BYTES // 2**20} MiB"
        images.append(image)
    return images


def _payload(reference: str) -> str:
    """Return the base64 part of a reference.

    Raises:
        ValueError: if it is a data: URI in another encoding.
    """
    if reference[:5].lower() != "data:":
        return reference
    head, _, payload = reference.partition(",")
    if not head.lower().endswith(";base64"):
        raise ValueError("not in base64")
    return payload


def _from_base64(text: str) -> bytes:
    """Decode base64, also with the URL-safe alphabet or without padding, ignoring line breaks: tools differ.

    Raises:
        ValueError: if it is not base64.
    """
    text = "".join(text.split())
    if "+" not in text and "/" not in text:
        text = text.translate(_URL_SAFE)
    if not text.endswith("=") and len(text) >= MIN_UNPADDED:
        text += "=" * (-len(text) % 4)
    pieces = (text[i : i + PIECE_CHARACTERS] for i in range(0, len(text), PIECE_CHARACTERS))
    return b"".join(binascii.a2b_base64(piece, strict_mode=True) for piece in pieces)
