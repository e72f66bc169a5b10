"""Images on their way from a request to the model: every form a caller may send, and what ends with which words."""

import asyncio
import base64
import time
from collections.abc import Sequence
from typing import Any

import pytest
from test_fetch import TRUSTS_NOBODY, Answer, reply, run, serving

from triton_embed.gateway import fetch as fetch_module
from triton_embed.gateway import media as media_module
from triton_embed.gateway.errors import ApiError, invalid
from triton_embed.gateway.fetch import NOT_PUBLIC, Fetcher
from triton_embed.gateway.media import Media

PIXEL = base64.b64decode("R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw==")
BASE64 = base64.b64encode(PIXEL).decode()


def refuse(index: int, message: str) -> None:
    raise invalid(message, "input")


async def loaded(
    images: Sequence[Sequence[str]], *allowed: str, urls: bool = True, max_bytes: int = 2**25, timeout: float = 10
) -> list[list[bytes]] | ApiError:
    media = Media(Fetcher(allowed, TRUSTS_NOBODY) if urls else None, max_bytes=max_bytes, timeout=timeout)
    try:
        return await media.load(images, "input", refuse)
    except ApiError as error:
        return error
    finally:
        await media.close()


def refusal(found: list[list[bytes]] | ApiError) -> str:
    assert isinstance(found, ApiError)
    assert (found.status, found.param) == (400, "input")
    return found.message


@pytest.mark.parametrize(
    "reference",
    [
        BASE64,
        "\n".join(BASE64[i : i + 20] for i in range(0, len(BASE64), 20)) + "\r\n",
        f"data:image/gif;base64,{BASE64}",
        f"data:;base64,{BASE64}",
        f"DATA:IMAGE/PNG;charset=utf-8;BASE64,{BASE64}",  # the wrong type too: the bytes themselves say what they are
    ],
)
def test_images_within_the_request(reference: str) -> None:
    assert run(lambda: loaded([[], [reference]])) == [[], [PIXEL]]


@pytest.mark.parametrize(
    "reference",
    [
        "/etc/passwd", "./a.png", "a.png", "file:///etc/passwd", "FILE:/etc/passwd", "C:\\a.png", "~/a.png",
        "//host/a.png", "ftp://example.com/a.png", "gopher://x", "javascript:1", "http:/example.com/a.png",
        "data:", "data:,a", "data:image/svg+xml,<svg/>", f"data:image/gif,{BASE64}", "data:image/gif;base64,?",
        f"image/gif;base64,{BASE64}", BASE64[:-1], BASE64 + "=", BASE64.replace("A", "-"), "日本", "\x00",
    ],
)  # fmt: skip
def test_what_is_no_image_reference(reference: str) -> None:
    message = "Input at index 1: image must be base64, a data: URI in base64 or an http(s) URL"
    assert refusal(run(lambda: loaded([[BASE64], [BASE64, reference]]))) == message


def test_long_base64_is_decoded_whole_and_away_from_the_event_loop() -> None:
    """Both parts of the sentence: an odd length that ends within a piece, and a clock that keeps ticking."""
    image = bytes(range(251)) * 80_000
    reference = base64.b64encode(image).decode()
    gaps = []

    async def tick() -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0)
            gaps.append(time.monotonic() - before)

    async def use() -> None:
        clock = asyncio.create_task(tick())
        assert await loaded([[reference]]) == [[image]]
        clock.cancel()

    run(use)
    assert len(gaps) > 5


def test_an_image_of_no_bytes_is_refused_and_not_taken_for_no_image() -> None:
    assert refusal(run(lambda: loaded([["data:image/png;base64,"]]))) == "Input at index 0: the image is empty"

    async def use() -> None:
        async with serving({"/": reply(b"")}) as site:
            found = refusal(await loaded([[BASE64], [f"{site.url}/"]], site.host))
            assert found == "Input at index 1: the image could not be fetched: it is empty"

    run(use)


def test_limits_within_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_module, "IMAGE_BYTES", 2**20)
    fits, large = (base64.b64encode(bytes(size)).decode() for size in (2**20, 2**20 + 1))
    assert run(lambda: loaded([[fits]])) == [[bytes(2**20)]]
    assert refusal(run(lambda: loaded([[], [large]]))) == "Input at index 1: the image is larger than 1 MiB"
    together = run(lambda: loaded([[fits], [fits]], max_bytes=2**21 - 1))
    assert refusal(together) == "The images of the request are larger than 2097151 bytes together"


def test_urls_are_fetched_into_their_places_and_once() -> None:
    async def use() -> None:
        async with serving({"/a": reply(b"image a"), "/b": reply(b"image b", Content_Type="text/html")}) as site:
            a, b = f"{site.url}/a", f"HTTP{site.url[4:]}/b"
            found = await loaded([[a], [], [b, BASE64, a], [a]], site.host)
            assert found == [[b"image a"], [], [b"image b", PIXEL, b"image a"], [b"image a"]]
            assert sorted(site.asked) == ["/a", "/b"]

    run(use)


def test_a_failed_fetch_names_the_first_input_that_asked_for_it() -> None:
    async def use() -> None:
        async with serving({"/a": reply(b"image"), "/gone": reply(b"", "404 Not Found")}) as site:
            found = await loaded([[f"{site.url}/a"], [], [f"{site.url}/gone"], [f"{site.url}/gone"]], site.host)
            reason = "Input at index 2: the image could not be fetched: its host answered with status 404"
            assert refusal(found) == reason
            found = await loaded([[], [f"{site.url}/a"]])
            assert refusal(found) == f"Input at index 1: the image could not be fetched: {NOT_PUBLIC}"

    run(use)


def test_a_bad_image_within_the_request_is_found_before_anything_is_fetched() -> None:
    async def use() -> None:
        async with serving({"/": reply(b"image")}) as site:
            assert "index 1" in refusal(await loaded([[f"{site.url}/"], ["./a.png"]], site.host))
            assert site.connections == 0

    run(use)


def test_a_failed_fetch_ends_the_others() -> None:
    async def wait(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(5)

    async def use() -> None:
        pages: dict[str, Answer] = {"/slow": wait, "/gone": reply(b"", "404 Not Found")}
        async with serving(pages) as site:
            began = time.monotonic()
            assert "404" in refusal(await loaded([[f"{site.url}/slow"], [f"{site.url}/gone"]], site.host))
            assert time.monotonic() - began < 3

    run(use)


def test_urls_may_be_turned_off() -> None:
    found = refusal(run(lambda: loaded([[BASE64], ["https://example.com/a.png"]], urls=False)))
    assert found.startswith("Input at index 1: the image could not be fetched: this server fetches no URLs")
    assert run(lambda: loaded([[BASE64]], urls=False)) == [[PIXEL]]


def test_what_is_fetched_is_bounded_together() -> None:
    async def use() -> None:
        async with serving({f"/{i}": reply(bytes(1000)) for i in range(40)}) as site:
            found = await loaded([[f"{site.url}/{i}"] for i in range(40)], site.host, max_bytes=9999)
            assert refusal(found) == "The images of the request are larger than 9999 bytes together"
            assert site.connections < 30  # it was noticed on the way
            found = await loaded([[f"{site.url}/0"]] * 10, site.host, max_bytes=9999)
            assert refusal(found) == "The images of the request are larger than 9999 bytes together"

    run(use)


def test_one_request_leaves_slots_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "AT_ONCE", 4)
    monkeypatch.setattr(media_module, "AT_ONCE", 2)

    async def answer(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.05)
        writer.write(reply(b"image"))

    async def use() -> None:
        async with serving({f"/{i}": answer for i in range(40)}) as site:
            media = Media(Fetcher([site.host], TRUSTS_NOBODY), max_bytes=2**25, timeout=10)
            many = asyncio.create_task(media.load([[f"{site.url}/{i}"] for i in range(40)], "input", refuse))
            while not site.open:
                await asyncio.sleep(0.001)
            assert await media.load([[f"{site.url}/0"]], "input", refuse) == [[b"image"]]
            assert len(site.asked) < 20
            assert site.most_open <= 3
            assert not many.done()
            many.cancel()
            with pytest.raises(asyncio.CancelledError):
                await many
            await media.close()

    run(use)


def test_all_fetches_of_a_request_have_one_deadline() -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.05)
        writer.write(reply(b"image"))

    async def use() -> Any:
        async with serving({f"/{i}": answer for i in range(200)}) as site:
            return await loaded([[f"{site.url}/{i}"] for i in range(200)], site.host, timeout=0.2)

    found = run(use)
    assert isinstance(found, ApiError)
    assert (found.status, found.message) == (504, "The images could not be fetched within 0.2 s")


def test_faults_may_be_noted_and_the_others_loaded() -> None:
    noted: dict[int, str] = {}

    async def use() -> list[list[bytes]]:
        async with serving({"/a": reply(b"image"), "/gone": reply(b"", "404 Not Found")}) as site:
            a, gone = f"{site.url}/a", f"{site.url}/gone"
            media = Media(Fetcher([site.host], TRUSTS_NOBODY), max_bytes=2**25, timeout=10)
            images = [[a], [gone], ["./a.png"], [BASE64, a], [gone, a], []]
            found = await media.load(images, "input", noted.__setitem__)
            await media.close()
            return found

    assert run(use) == [[b"image"], [], [], [PIXEL, b"image"], [], []]
    assert sorted(noted) == [1, 2, 4]
    assert noted[4] == "Input at index 4: the image could not be fetched: its host answered with status 404"
