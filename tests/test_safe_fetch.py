"""Fetching of URLs and its SSRF protection, with real servers on the loopback and a scripted name server."""

import asyncio
import gzip
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar

import httpcore2
import pytest

from conftest import free_port
from triton_embed.gateway.media import safe_fetch as fetch_module
from triton_embed.gateway.media.safe_fetch import NOT_PUBLIC, Fetcher, FetchError, is_of_this_machine, is_public

T = TypeVar("T")
Page = bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]

# Faster to create than a context with the system's certificates.
TRUSTS_NO_CERTIFICATE = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
PUBLIC = "93.184.215.14"
# A self-signed certificate of images.test, valid from 2020 to 2120.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg+IwdYycMguE5Zd38
jh2z6+O2EWKpJGPjg7GmvvVi3xGhRANCAASUtAEZRea1rxc5HrI9Nip5qRUeodE3
QXCC3l4198vWXF9727CvRTOzlKdSQpnFptqdWFkUcwzzyNVSNpoXn99h
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBdzCCAR2gAwIBAgIBATAKBggqhkjOPQQDAjAWMRQwEgYDVQQDDAtpbWFnZXMu
dGVzdDAgFw0yMDAxMDEwMDAwMDBaGA8yMTIwMDEwMTAwMDAwMFowFjEUMBIGA1UE
AwwLaW1hZ2VzLnRlc3QwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAASUtAEZRea1
rxc5HrI9Nip5qRUeodE3QXCC3l4198vWXF9727CvRTOzlKdSQpnFptqdWFkUcwzz
yNVSNpoXn99ho1owWDAPBgNVHRMBAf8EBTADAQH/MBYGA1UdEQQPMA2CC2ltYWdl
cy50ZXN0MA4GA1UdDwEB/wQEAwIChDAdBgNVHQ4EFgQUOlQ6zRWNUtomUi53r5ur
OQAexpwwCgYIKoZIzj0EAwIDSAAwRQIhANMbSJFjVBsyJt+/Qy9WOO/myUX8y+Fa
m1P32R3R4wLRAiBg3MPwsH+BjMti35pLL8VoyhqObM+CXTbDRlJb1iWyuA==
-----END CERTIFICATE-----
"""


def reply(body: bytes = b"", status: str = "200 OK", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def redirect(location: str, **headers: str) -> bytes:
    return reply(b"moved", "302 Found", Location=location, **headers)


class Site:
    """A web server with a response per path. It records requests."""

    def __init__(self, pages: dict[str, Page]) -> None:
        self.pages = pages
        self.connections = 0
        self.open = self.max_open = 0
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.port = 0
        self.transports: list[asyncio.WriteTransport] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        self.max_open = max(self.open, self.max_open)
        self.transports.append(writer.transport)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            self.paths.append(head[0].split()[1])
            self.headers.append({line.partition(": ")[0].lower(): line.partition(": ")[2] for line in head[1:] if line})
            page = self.pages[self.paths[-1]]
            if isinstance(page, bytes):
                writer.write(page)
                await writer.drain()
            else:
                await page(writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client has disconnected, or the test is over
        finally:
            self.open -= 1
            writer.close()

    async def hang_up(self) -> None:
        """Cancel every other task, including TLS handshakes, so that no socket outlives the loop."""
        current = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not current]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for transport in self.transports:
            transport.abort()
        await asyncio.sleep(0.01)


@asynccontextmanager
async def serving(pages: dict[str, Page], tls: ssl.SSLContext | None = None) -> AsyncIterator[Site]:
    site = Site(pages)
    server = await asyncio.start_server(site.answer, "127.0.0.1", 0, ssl=tls)
    site.port = server.sockets[0].getsockname()[1]
    async with server:
        try:
            yield site
        finally:
            await site.hang_up()


def run(use: Callable[[], Awaitable[T]]) -> T:
    async def main() -> T:
        return await use()

    return asyncio.run(main())


async def fetched(url: str, *allowed: str, tls: ssl.SSLContext | None = TRUSTS_NO_CERTIFICATE) -> bytes | str:
    """Return the body, or the message of the FetchError. Check that no connection stays open."""
    fetcher = Fetcher(allowed, tls)
    try:
        return await fetcher.get(url)
    except FetchError as error:
        return str(error)
    finally:
        assert fetcher._pool.connections == []
        await fetcher.close()


class Names:
    """A scripted name server. Each lookup of a host returns its next answer; the last one is repeated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._system = socket.getaddrinfo
        self.answers: dict[str, list[list[str]]] = {}
        self.hosts: list[str] = []
        monkeypatch.setattr(socket, "getaddrinfo", self.look_up)

    def look_up(self, host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        self.hosts.append(host)
        if host not in self.answers:
            return self._system(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        answers = self.answers[host]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        kinds = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
        return [
            (kind, socket.SOCK_STREAM, 6, "", (address, port, 0, 0)[: 4 if ":" in address else 2])
            for kind, address in zip(kinds, addresses, strict=True)
        ]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return Names(monkeypatch)


class Wire:
    """A stand-in for the internet: connections to PUBLIC go to a local server, all others are real."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.port = 0
        self.connected: list[str] = []
        system = httpcore2.AnyIOBackend.connect_tcp

        async def connect(backend: Any, host: str, port: int, *args: Any, **kwargs: Any) -> Any:
            self.connected.append(host)
            target = ("127.0.0.1", self.port) if host == PUBLIC else (host, port)
            return await system(backend, *target, *args, **kwargs)

        monkeypatch.setattr(httpcore2.AnyIOBackend, "connect_tcp", connect)


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    return Wire(monkeypatch)


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "1.1.1.1", PUBLIC, "100.63.255.255", "172.32.0.1", "192.0.1.1", "198.20.0.1", "223.255.255.254",
     "2606:4700:4700::1111", "2a00:1450:4001:81b::200e", "2001:200::1", "2003::1", "2400:cb00::1"],
)  # fmt: skip
def test_is_public_accepts_public_addresses(address: str) -> None:
    assert is_public(ip_address(address))


# An address from every block of IANA's special-purpose registries, and from both multicast ranges.
SPECIAL = """
0.0.0.0 0.1.2.3 10.0.0.1 100.64.0.1 100.127.255.255 127.0.0.1 127.255.255.254 169.254.1.1 172.16.0.1 172.31.255.255
192.0.0.1 192.0.0.8 192.0.0.170 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.19.255.255 198.51.100.1 203.0.113.1
224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255
:: ::1 ::ffff:127.0.0.1 ::ffff:8.8.8.8 ::8.8.8.8 ::ffff:0:8.8.8.8 64:ff9b::8.8.8.8 64:ff9b:1::1 100::1 2001::1
2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:2::1 2001:10::1 2001:20::1 2001:db8::1 2002:7f00:1:: 2002:808:808::1
3fff::1 5f00::1 fc00::1 fd12:3456::1 fe80::1 fe80::1%eth0 fec0::1 ff02::1 ff0e::1
"""
# Metadata services of clouds, which reveal a machine's credentials: all, AWS, Alibaba, Oracle, Azure.
METADATA = "169.254.169.254 fd00:ec2::254 100.100.100.200 192.0.0.192 168.63.129.16"


@pytest.mark.parametrize("address", (SPECIAL + METADATA).split())
def test_is_public_rejects_special_addresses(address: str) -> None:
    assert not is_public(ip_address(address))


LOOPBACK = [
    "127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.1", "017700000001", "0x7f.0x0.0x0.0x1",
    "0", "0.0.0.0", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:ffff:7f00:0001]",
    "[::127.0.0.1]", "localhost", "LOCALHOST", "127。0。0。1",
]  # fmt: skip


@pytest.mark.parametrize("host", LOOPBACK)
def test_no_spelling_of_loopback_is_connected_to(names: Names, host: str) -> None:
    names.answers["localhost"] = [["::1", "127.0.0.1"]]

    async def use() -> None:
        async with serving({"/": reply(b"secret")}) as site:
            assert await fetched(f"http://{host}:{site.port}/") == NOT_PUBLIC
            # The error does not reveal which ports are open.
            assert await fetched(f"http://{host}:{free_port()}/") == NOT_PUBLIC
            assert site.connections == 0

    run(use)


@pytest.mark.parametrize(
    "host", ["0177.0.0.1", "[fe80::1%25eth0]", "127.0.0.1%2f", "%31%32%37.0.0.1", "a b", "a..b", "x" * 70]
)
def test_invalid_hosts(names: Names, host: str) -> None:
    assert run(lambda: fetched(f"http://{host}/")) in (NOT_PUBLIC, "its URL cannot be read")


def test_unknown_and_internal_hosts_give_the_same_error(names: Names) -> None:
    names.answers = {"inside.test": [["10.1.2.3"]], "nowhere.test": [[]]}
    assert run(lambda: fetched("http://inside.test/")) == run(lambda: fetched("http://nowhere.test/")) == NOT_PUBLIC


def test_public_address_of_this_machine_is_rejected(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the loopback address pass for a public one of this machine, where services for it alone may listen."""
    monkeypatch.setattr("triton_embed.gateway.media.safe_fetch.is_public", lambda address: True)
    names.answers["own.test"] = [[PUBLIC, "127.0.0.1"]]

    async def use() -> None:
        async with serving({"/": reply(b"secret")}) as site:
            assert await fetched(f"http://own.test:{site.port}/") == NOT_PUBLIC
            assert site.connections == 0

    run(use)
    assert not is_of_this_machine(ip_address(PUBLIC))


def test_one_internal_address_among_public_ones_is_rejected(names: Names, wire: Wire) -> None:
    names.answers["mixed.test"] = [[PUBLIC, "10.1.2.3"]]
    assert run(lambda: fetched("http://mixed.test/")) == NOT_PUBLIC
    assert wire.connected == []


def test_checked_address_is_used_without_a_second_lookup(names: Names, wire: Wire) -> None:
    names.answers["rebinding.test"] = [[PUBLIC], ["127.0.0.1"]]

    async def use() -> None:
        async with serving({"/a.png": reply(b"image")}) as site:
            wire.port = site.port
            assert await fetched("http://rebinding.test/a.png") == b"image"
            assert site.headers[0]["host"] == "rebinding.test"

    run(use)
    assert wire.connected == [PUBLIC]
    assert names.hosts == ["rebinding.test"]


def test_redirects_are_checked_like_the_first_url(names: Names, wire: Wire) -> None:
    names.answers = {"public.test": [[PUBLIC]], "inside.test": [["192.168.0.7"]]}

    async def use() -> None:
        async with serving({"/secret": reply(b"secret")}) as inner, serving({}) as site:
            wire.port = site.port
            for target in (f"http://127.0.0.1:{inner.port}/secret", f"//2130706433:{inner.port}/secret"):
                site.pages["/"] = redirect(target)
                assert await fetched("http://public.test/") == NOT_PUBLIC
            site.pages["/"] = redirect("http://inside.test/")
            assert await fetched("http://public.test/") == NOT_PUBLIC
            assert inner.connections == 0

    run(use)
    assert wire.connected == [PUBLIC] * 3


def test_host_that_becomes_internal_between_redirects_is_rejected(names: Names, wire: Wire) -> None:
    names.answers["turning.test"] = [[PUBLIC], ["127.0.0.1"]]

    async def use() -> None:
        async with serving({"/": redirect("/again"), "/again": reply(b"secret")}) as site:
            wire.port = site.port
            assert await fetched("http://turning.test/") == NOT_PUBLIC
            assert site.paths == ["/"]

    run(use)


def test_at_most_three_redirects_are_followed() -> None:
    async def use() -> None:
        async with serving({f"/{i}": redirect(f"{i - 1}") for i in range(1, 5)}) as site:
            site.pages["/0"] = reply(b"image")
            assert await fetched(f"{site.url}/3", site.host) == b"image"
            assert await fetched(f"{site.url}/4", site.host) == "it was redirected more than 3 times"

    run(use)


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("file:///etc/passwd", "only http and https URLs are fetched"),
        ("ftp://127.0.0.1/a.png", "only http and https URLs are fetched"),
        ("gopher://127.0.0.1:70/_", "only http and https URLs are fetched"),
        ("data:image/png;base64,AAAA", "only http and https URLs are fetched"),
        ("http://user:password@127.0.0.1/", "its URL carries credentials"),
        ("http://0177.0.0.1/", "it was redirected to a URL that cannot be read"),
    ],
)
def test_invalid_redirects(location: str, reason: str) -> None:
    async def use() -> None:
        async with serving({"/": redirect(location)}) as site:
            assert await fetched(f"{site.url}/", "127.0.0.1") == reason
            assert site.connections == 1

    run(use)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://example.com/a.png", "only http and https URLs are fetched"),
        ("http:a.png", "only http and https URLs are fetched"),
        ("https:///etc/passwd", "only http and https URLs are fetched"),
        ("http://user@127.0.0.1/", "its URL carries credentials"),
        ("http://example.com\\@127.0.0.1/", "its URL carries credentials"),
        ("http://127.0.0.1\r\nX: y/", "its URL cannot be read"),
        ("http://127.0.0.1/" + "a" * 70_000, "its URL cannot be read"),
        ("http://127.0.0.1:65536/", "its URL cannot be read"),
        ("https://./", "its URL cannot be read"),
    ],
)
def test_invalid_urls(url: str, reason: str) -> None:
    assert run(lambda: fetched(url)) == reason


def test_host_or_one_port_of_it_can_be_allowed(names: Names) -> None:
    names.answers["intranet.test"] = [["127.0.0.1"]]

    async def use() -> None:
        async with serving({"/a": reply(b"image")}) as site:
            url = f"http://INTRANET.test:{site.port}/a"
            assert await fetched(url, "intranet.test") == b"image"
            assert await fetched(url, f"intranet.test:{site.port}") == b"image"
            assert await fetched(url, f"intranet.test:{site.port + 1}", "test", "127.0.0.1") == NOT_PUBLIC
            assert await fetched(f"{site.url}/a", "intranet.test") == NOT_PUBLIC

    run(use)


def test_ipv6_host_is_allowed_in_brackets(names: Names, wire: Wire) -> None:
    assert run(lambda: fetched(f"http://[::1]:{free_port()}/", "[::1]")) == "its host did not answer"
    assert wire.connected == ["::1"]


def test_next_address_is_tried(names: Names) -> None:
    async def use() -> None:
        async with serving({"/": reply(b"image")}) as site:
            for order in (["127.0.0.2", "127.0.0.1"], ["127.0.0.1", "127.0.0.2"]):
                names.answers["two.test"] = [order]
                assert await fetched(f"http://two.test:{site.port}/", "two.test") == b"image"

    run(use)


def test_headers_sent() -> None:
    """Check that requests send no cookies or credentials, and nothing from the environment."""

    async def use() -> None:
        async with serving({"/": redirect("/a%20b?c=d#e", Set_Cookie="id=7")}) as site:
            site.pages["/a%20b?c=d"] = reply(b"image", Content_Type="text/html")
            assert await fetched(f"{site.url}/", site.host) == b"image"
            assert site.paths == ["/", "/a%20b?c=d"]
            for headers in site.headers:
                assert headers.keys() == {"host", "user-agent", "accept", "accept-encoding"}
                assert (headers["host"], headers["accept-encoding"]) == (site.host, "identity")

    run(use)


def test_environment_proxies_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use() -> None:
        async with serving({"/": reply(b"image")}) as site, serving({}) as proxy:
            for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
                monkeypatch.setenv(name, proxy.url)
            assert await fetched(f"{site.url}/", site.host) == b"image"
            assert proxy.connections == 0

    run(use)


@pytest.mark.parametrize("status", ["404 Not Found", "500 Oops", "204 No Content", "206 Partial Content"])
def test_status_other_than_200_is_an_error(status: str) -> None:
    async def use() -> None:
        async with serving({"/": reply(b"x", status)}) as site:
            assert await fetched(f"{site.url}/", site.host) == f"its host answered with status {status[:3]}"

    run(use)


@pytest.mark.parametrize(
    "page",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\n" * 9**5,
    ],
    ids=["nothing", "another protocol", "half", "endless head"],
)
def test_responses_that_are_not_http(page: bytes) -> None:
    async def use() -> None:
        async with serving({"/": page}) as site:
            assert await fetched(f"{site.url}/", site.host) == "its host did not answer"

    run(use)


def test_closed_port_is_an_error() -> None:
    assert run(lambda: fetched(f"http://127.0.0.1:{free_port()}/", "127.0.0.1")) == "its host did not answer"


def test_compressed_body_is_rejected() -> None:
    async def use() -> None:
        async with serving({"/": reply(gzip.compress(bytes(10**6)), Content_Encoding="gzip")}) as site:
            assert await fetched(f"{site.url}/", site.host) == "its host sent it compressed without being asked to"

    run(use)


def test_body_size_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "IMAGE_BYTES", 2**20)
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

    async def use() -> None:
        pages: dict[str, Page] = {"/fits": reply(bytes(2**20)), "/large": reply(bytes(2**20 + 1))}
        pages["/chunks"] = chunked + b"4000\r\n" + bytes(2**14) + b"\r\n0\r\n\r\n"
        async with serving(pages) as site:
            assert await fetched(f"{site.url}/fits", site.host) == bytes(2**20)
            assert await fetched(f"{site.url}/chunks", site.host) == bytes(2**14)
            assert await fetched(f"{site.url}/large", site.host) == "it is larger than 1 MiB"

    run(use)


def test_endless_body_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "IMAGE_BYTES", 2**20)
    sent = 0

    async def pour(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(bytes(2**16))
            await writer.drain()
            sent += 2**16

    async def use() -> None:
        async with serving({"/": pour}) as site:
            assert await fetched(f"{site.url}/", site.host) == "it is larger than 1 MiB"

    run(use)
    assert 2**20 <= sent < 2**24  # more than the limit by what the socket buffers hold


async def _send_head_slowly(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    for i in range(10**6):
        writer.write(f"X-{i}: y\r\n".encode())
        await writer.drain()
        await asyncio.sleep(0.02)


async def _send_body_slowly(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    for _ in range(10**6):
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.02)


async def _send_nothing(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(10)


async def _send_informational_responses_forever(writer: asyncio.StreamWriter) -> None:
    for _ in range(10**6):
        writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.02)


async def _redirect_slowly(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0.15)
    writer.write(redirect("/"))


@pytest.mark.parametrize(
    "page",
    [_send_head_slowly, _send_body_slowly, _send_nothing, _send_informational_responses_forever, _redirect_slowly],
)
def test_slow_server_times_out(monkeypatch: pytest.MonkeyPatch, page: Page) -> None:
    monkeypatch.setattr(fetch_module, "TOTAL_SECONDS", 0.4)

    async def use() -> None:
        async with serving({"/": page}) as site:
            start = time.monotonic()
            assert await fetched(f"{site.url}/", site.host) == "it took longer than 0.4 s"
            assert time.monotonic() - start < 3

    run(use)


def test_slow_name_server_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "TOTAL_SECONDS", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(1.2))

    async def use() -> float:
        start = time.monotonic()
        assert await fetched("http://slow.test/") == "it took longer than 0.2 s"
        return time.monotonic() - start

    assert run(use) < 1


def test_concurrent_fetches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "MAX_FETCHES", 3)

    async def page(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.05)
        writer.write(reply(b"image"))

    async def use() -> None:
        async with serving({"/": page}) as site:
            fetcher = Fetcher([site.host])
            assert await asyncio.gather(*(fetcher.get(f"{site.url}/") for _ in range(9))) == [b"image"] * 9
            assert (site.max_open, site.connections) == (3, 9)
            await fetcher.close()

    run(use)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    path = tmp_path / "certificate.pem"
    path.write_text(CERTIFICATE)
    return path


def tls_server(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def test_certificate_is_verified_for_the_host_name(names: Names, certificate: Path) -> None:
    names.answers = {"images.test": [["127.0.0.1"]], "other.test": [["127.0.0.1"]]}
    trusting_context = ssl.create_default_context(cafile=certificate)

    async def use() -> None:
        async with serving({"/": reply(b"image")}, tls_server(certificate)) as site:
            valid_url, invalid_url = f"https://images.test:{site.port}/", f"https://other.test:{site.port}/"
            assert await fetched(valid_url, "images.test", tls=trusting_context) == b"image"
            error = "its host has no valid certificate"
            assert await fetched(invalid_url, "other.test", tls=trusting_context) == error
            assert await fetched(f"https://{site.host}/", site.host, tls=trusting_context) == error
            assert await fetched(valid_url, "images.test", tls=None) == error  # self-signed
            assert site.paths == ["/"]

    run(use)


def test_broken_tls_record_is_an_error(names: Names, certificate: Path) -> None:
    names.answers["images.test"] = [["127.0.0.1"]]

    async def garble(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        await writer.drain()
        os.write(writer.get_extra_info("socket").fileno(), b"\x17\x03\x03\x00\x20" + bytes(32))
        await asyncio.sleep(0.5)

    async def use() -> None:
        async with serving({"/": garble}, tls_server(certificate)) as site:
            trusting_context = ssl.create_default_context(cafile=certificate)
            url = f"https://images.test:{site.port}/"
            assert await fetched(url, "images.test", tls=trusting_context) == "its host did not answer"

    run(use)


def test_redirect_from_https_to_http_is_rejected(names: Names, certificate: Path) -> None:
    names.answers["images.test"] = [["127.0.0.1"]]
    trusting_context = ssl.create_default_context(cafile=certificate)

    async def use() -> None:
        async with serving({"/": reply(b"image")}) as plain, serving({}, tls_server(certificate)) as site:
            site.pages["/"] = redirect(f"http://images.test:{plain.port}/")
            url = f"https://images.test:{site.port}/"
            assert await fetched(url, "images.test", tls=trusting_context) == "it was redirected from https to http"
            assert plain.connections == 0
            plain.pages["/"] = redirect(f"{url}image")
            site.pages["/image"] = reply(b"image")
            assert await fetched(f"http://images.test:{plain.port}/", "images.test", tls=trusting_context) == b"image"

    run(use)
