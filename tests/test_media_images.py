"""Loading of images: every form of reference, the limits, and the message of each error."""

import asyncio
import base64
import time
from collections.abc import Sequence
from typing import Any

import pytest
from test_safe_fetch import TRUSTS_NO_CERTIFICATE, Page, reply, run, serving

from triton_embed.gateway.errors import ApiError, invalid
from triton_embed.gateway.media import images as media_module
from triton_embed.gateway.media import safe_fetch as fetch_module
from triton_embed.gateway.media.images import Media
from triton_embed.gateway.media.safe_fetch import NOT_PUBLIC, Fetcher

PIXEL = base64.b64decode("R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw==")
BASE64 = base64.b64encode(PIXEL).decode()


def refuse(index: int, message: str) -> None:
    raise invalid(message, "input")


async def load(
    images: Sequence[Sequence[str]], *allowed: str, urls: bool = True, max_bytes: int = 2**25, timeout: float = 10
) -> list[list[bytes]] | ApiError:
    media = Media(Fetcher(allowed, TRUSTS_NO_CERTIFICATE) if urls else None, max_bytes=max_bytes, timeout=timeout)
    try:
        return await media.load(images, "input", refuse)
    except ApiError as error:
        return error
    finally:
        await media.close()


def message_of(result: list[list[bytes]] | ApiError) -> str:
    assert isinstance(result, ApiError)
    assert (result.status, result.param) == (400, "input")
    return result.message


@pytest.mark.parametrize(
    "reference",
    [
        BASE64,
        "\n".join(BASE64[i : i + 20] for i in range(0, len(BASE64), 20)) + "\r\n",
        f"data:image/gif;base64,{BASE64}",
        f"data:;base64,{BASE64}",
        f"DATA:IMAGE/PNG;charset=utf-8;BASE64,{BASE64}",  # the declared type is wrong and is ignored
        BASE64.rstrip("="),
        f"data:image/gif;base64,{BASE64.rstrip('=')}",
    ],
)
def test_base64_images_are_decoded(reference: str) -> None:
    assert run(lambda: load([[], [reference]])) == [[], [PIXEL]]


@pytest.mark.parametrize(
    "reference",
    [
        "/etc/passwd", "./a.png", "a.png", "file:///etc/passwd", "FILE:/etc/passwd", "C:\\a.png", "~/a.png",
        "//host/a.png", "ftp://example.com/a.png", "gopher://x", "javascript:1", "http:/example.com/a.png",
        "data:", "data:,a", "data:image/svg+xml,<svg/>", f"data:image/gif,{BASE64}", "data:image/gif;base64,?",
        f"image/gif;base64,{BASE64}", BASE64[:-1], BASE64 + "=", "-" + BASE64[1:-8] + "+/8=", "日本", "\x00",
    ],
)  # fmt: skip
def test_invalid_image_references(reference: str) -> None:
    message = "Input at index 1: image must be base64, a data: URI in base64 or an http(s) URL"
    assert message_of(run(lambda: load([[BASE64], [BASE64, reference]]))) == message


def test_url_safe_base64_is_decoded() -> None:
    image = bytes(range(256)) * 4
    reference = base64.urlsafe_b64encode(image).decode()
    assert {"-", "_"} < set(reference)
    assert run(lambda: load([[reference], [reference.rstrip("=")]])) == [[image], [image]]


def test_long_base64_is_decoded_outside_the_event_loop() -> None:
    """Decode an odd length that ends within a piece, while another task of the event loop keeps running."""
    image = bytes(range(251)) * 80_000
    reference = base64.b64encode(image).decode()
    pauses = []

    async def tick() -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0)
            pauses.append(time.monotonic() - before)

    async def use() -> None:
        clock = asyncio.create_task(tick())
        assert await load([[reference]]) == [[image]]
        clock.cancel()

    run(use)
    assert len(pauses) > 5


def test_empty_image_is_rejected() -> None:
    assert message_of(run(lambda: load([["data:image/png;base64,"]]))) == "Input at index 0: the image is empty"

    async def use() -> None:
        async with serving({"/": reply(b"")}) as site:
            message = message_of(await load([[BASE64], [f"{site.url}/"]], site.host))
            assert message == "Input at index 1: the image could not be fetched: it is empty"

    run(use)


def test_size_limits_of_base64_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_module, "IMAGE_BYTES", 2**20)
    fits, large = (base64.b64encode(bytes(size)).decode() for size in (2**20, 2**20 + 1))
    assert run(lambda: load([[fits]])) == [[bytes(2**20)]]
    assert message_of(run(lambda: load([[], [large]]))) == "Input at index 1: the image is larger than 1 MiB"
    together = run(lambda: load([[fits], [fits]], max_bytes=2**21 - 1))
    assert message_of(together) == "The images of the request are larger than 2097151 bytes in total"


def test_each_url_is_fetched_once_and_keeps_its_position() -> None:
    async def use() -> None:
        async with serving({"/a": reply(b"image a"), "/b": reply(b"image b", Content_Type="text/html")}) as site:
            a, b = f"{site.url}/a", f"HTTP{site.url[4:]}/b"
            rows = await load([[a], [], [b, BASE64, a], [a]], site.host)
            assert rows == [[b"image a"], [], [b"image b", PIXEL, b"image a"], [b"image a"]]
            assert sorted(site.paths) == ["/a", "/b"]

    run(use)


def test_failed_fetch_names_its_first_input() -> None:
    async def use() -> None:
        async with serving({"/a": reply(b"image"), "/gone": reply(b"", "404 Not Found")}) as site:
            result = await load([[f"{site.url}/a"], [], [f"{site.url}/gone"], [f"{site.url}/gone"]], site.host)
            reason = "Input at index 2: the image could not be fetched: its host answered with status 404"
            assert message_of(result) == reason
            result = await load([[], [f"{site.url}/a"]])
            assert message_of(result) == f"Input at index 1: the image could not be fetched: {NOT_PUBLIC}"

    run(use)


def test_base64_images_are_checked_before_anything_is_fetched() -> None:
    async def use() -> None:
        async with serving({"/": reply(b"image")}) as site:
            assert "index 1" in message_of(await load([[f"{site.url}/"], ["./a.png"]], site.host))
            assert site.connections == 0

    run(use)


def test_failed_fetch_cancels_the_others() -> None:
    async def wait(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(5)

    async def use() -> None:
        pages: dict[str, Page] = {"/slow": wait, "/gone": reply(b"", "404 Not Found")}
        async with serving(pages) as site:
            start = time.monotonic()
            assert "404" in message_of(await load([[f"{site.url}/slow"], [f"{site.url}/gone"]], site.host))
            assert time.monotonic() - start < 3

    run(use)


def test_urls_are_rejected_without_a_fetcher() -> None:
    message = message_of(run(lambda: load([[BASE64], ["https://example.com/a.png"]], urls=False)))
    assert message.startswith("Input at index 1: the image could not be fetched: this server does not fetch URLs")
    assert run(lambda: load([[BASE64]], urls=False)) == [[PIXEL]]


def test_total_size_of_fetched_images_is_bounded() -> None:
    async def use() -> None:
        async with serving({f"/{i}": reply(bytes(1000)) for i in range(40)}) as site:
            result = await load([[f"{site.url}/{i}"] for i in range(40)], site.host, max_bytes=9999)
            assert message_of(result) == "The images of the request are larger than 9999 bytes in total"
            assert site.connections < 30  # the limit stopped the remaining fetches
            result = await load([[f"{site.url}/0"]] * 10, site.host, max_bytes=9999)
            assert message_of(result) == "The images of the request are larger than 9999 bytes in total"

    run(use)


def test_one_request_does_not_take_every_fetch_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "MAX_FETCHES", 4)
    monkeypatch.setattr(media_module, "MAX_FETCHES", 2)

    async def page(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.05)
        writer.write(reply(b"image"))

    async def use() -> None:
        async with serving({f"/{i}": page for i in range(40)}) as site:
            media = Media(Fetcher([site.host], TRUSTS_NO_CERTIFICATE), max_bytes=2**25, timeout=10)
            large = asyncio.create_task(media.load([[f"{site.url}/{i}"] for i in range(40)], "input", refuse))
            while not site.open:
                await asyncio.sleep(0.001)
            assert await media.load([[f"{site.url}/0"]], "input", refuse) == [[b"image"]]
            assert len(site.paths) < 20
            assert site.max_open <= 3
            assert not large.done()
            large.cancel()
            with pytest.raises(asyncio.CancelledError):
                await large
            await media.close()

    run(use)


def test_fetches_of_a_request_share_one_deadline() -> None:
    async def page(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.05)
        writer.write(reply(b"image"))

    async def use() -> Any:
        async with serving({f"/{i}": page for i in range(200)}) as site:
            return await load([[f"{site.url}/{i}"] for i in range(200)], site.host, timeout=0.2)

    error = run(use)
    assert isinstance(error, ApiError)
    assert (error.status, error.message) == (504, "The images could not be fetched within 0.2 s")


def test_reported_errors_do_not_stop_other_inputs() -> None:
    errors: dict[int, str] = {}

    async def use() -> list[list[bytes]]:
        async with serving({"/a": reply(b"image"), "/gone": reply(b"", "404 Not Found")}) as site:
            a, gone = f"{site.url}/a", f"{site.url}/gone"
            media = Media(Fetcher([site.host], TRUSTS_NO_CERTIFICATE), max_bytes=2**25, timeout=10)
            images = [[a], [gone], ["./a.png"], [BASE64, a], [gone, a], []]
            rows = await media.load(images, "input", errors.__setitem__)
            await media.close()
            return rows

    assert run(use) == [[b"image"], [], [], [PIXEL, b"image"], [], []]
    assert sorted(errors) == [1, 2, 4]
    assert errors[4] == "Input at index 4: the image could not be fetched: its host answered with status 404"
