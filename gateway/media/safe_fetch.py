"""GET of URLs that callers name, without giving callers access to this machine's network (SSRF).

Connections go to public addresses only. `PublicNetwork` enforces this where sockets are opened, also for redirects: it
resolves the host once, checks every address, and connects to a checked address, so the name is not resolved again.
Proxies, cookies and credentials are never used; TLS is verified for the host's name.
"""

import asyncio
import socket
import ssl
from collections.abc import Collection, Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import httpcore2
import httpx2

IMAGE_BYTES = 20 * 2**20
TOTAL_SECONDS = 5.0  # from the first name lookup to the last byte, redirects included
ATTEMPT_SECONDS = 2.0  # per address of a host
REDIRECTS = 3
MAX_FETCHES = 16  # concurrent fetches of the whole gateway

REDIRECTED = frozenset({301, 302, 303, 307, 308})
HEADERS = (
    (b"User-Agent", b"triton-embed"),
    (b"Accept", b"image/*,*/*;q=0.5"),
    (b"Accept-Encoding", b"identity"),
)
# One reason for unknown and for private hosts, so that callers cannot learn which internal names and addresses exist.
NOT_PUBLIC = "its host is unknown or not public"
# Networks that `ipaddress` calls global in some or all Python versions, but that hold no public web server.
RESERVED = [
    ip_network(text)
    for text in (
        "192.0.0.0/24",  # IETF assignments; Oracle's metadata service is 192.0.0.192
        "192.88.99.0/24",  # 6to4 relays
        "168.63.129.16/32",  # Azure's platform service, on every Azure machine
        "2001::/23",  # IETF assignments; Teredo, which wraps IPv4
        "2002::/16",  # 6to4, which wraps IPv4
        "3fff::/20",  # documentation
    )
]
# The only allocated part of IPv6. Outside are NAT64, IPv4-mapped and site-local addresses, and future ranges.
GLOBAL_UNICAST = ip_network("2000::/3")


class FetchError(Exception):
    """A failed fetch. The text is one of a few public reasons, in which "it" is the file behind the URL."""


class Fetcher:
    """The fetcher of one gateway.

    Args:
        allowed: Hosts, as `host` or `host:port`, whose addresses need not be public.
        tls: Replaces the default trust settings.
    """

    def __init__(self, allowed: Collection[str] = (), tls: ssl.SSLContext | None = None) -> None:
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=tls or httpcore2.default_ssl_context(),
            max_connections=None,
            max_keepalive_connections=0,  # a reused connection would outlive its check
            network_backend=PublicNetwork(allowed),
        )
        self._slots = asyncio.Semaphore(MAX_FETCHES)

    async def close(self) -> None:
        await self._pool.aclose()

    async def get(self, url: str) -> bytes:
        """Return the body of a URL.

        Raises:
            FetchError: if it is larger than IMAGE_BYTES, takes longer than TOTAL_SECONDS once a fetch slot is
                free, or cannot be fetched.
        """
        async with self._slots:
            try:
                async with asyncio.timeout(TOTAL_SECONDS):
                    return await self._follow(_parse(url))
            except TimeoutError:
                raise FetchError(f"it took longer than {TOTAL_SECONDS:g} s") from None
            except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException, OSError) as error:
                untrusted = any(isinstance(cause, ssl.SSLCertVerificationError) for cause in _causes(error))
                reason = "has no valid certificate" if untrusted else "did not answer"
                raise FetchError(f"its host {reason}") from None

    async def _follow(self, url: httpx2.URL) -> bytes:
        for _ in range(REDIRECTS + 1):
            target = httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
            headers = [(b"Host", url.netloc), *HEADERS]
            async with self._pool.stream("GET", target, headers=headers) as response:
                received = {name.lower(): value for name, value in response.headers}
                if response.status not in REDIRECTED or b"location" not in received:
                    return await _read(response, received)
            url = _redirected(url, received[b"location"].decode(errors="replace"))
        raise FetchError(f"it was redirected more than {REDIRECTS} times")


class PublicNetwork(httpcore2.AsyncNetworkBackend):
    """A network backend that connects to public addresses, and to any address of an allowed host."""

    def __init__(self, allowed: Collection[str] = ()) -> None:
        self._allowed = frozenset(allowed)
        self._sockets = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Connect to the first address that answers.

        Raises:
            FetchError: if the host has no address, or one that is not public.
        """
        name = f"[{host}]" if ":" in host else host
        addresses = await _resolve(host, port)
        allowed = name in self._allowed or f"{name}:{port}" in self._allowed
        if not addresses or not (allowed or all(is_public(a) and not is_of_this_machine(a) for a in addresses)):
            raise FetchError(NOT_PUBLIC)
        for address in addresses[:-1]:
            try:
                return await self._sockets.connect_tcp(str(address), port, ATTEMPT_SECONDS)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                continue
        return await self._sockets.connect_tcp(str(addresses[-1]), port, ATTEMPT_SECONDS)


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Return whether an address is reachable from the public internet.

    The rules are IANA's special-purpose registries, partly through `ipaddress`. IPv6 that wraps IPv4 is never public.
    """
    if address.version == 6 and address not in GLOBAL_UNICAST:
        return False
    return address.is_global and not address.is_multicast and not any(address in network for network in RESERVED)


def is_of_this_machine(address: IPv4Address | IPv6Address) -> bool:
    """Return whether an address is one of this machine's: only then would packets to it have it as their source."""
    with socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((str(address), 9))  # looks up the route; nothing is sent
        except OSError:
            return False  # and it cannot be reached either
        return ip_address(probe.getsockname()[0]) == address


async def _resolve(host: str, port: int) -> list[IPv4Address | IPv6Address]:
    """Return every address of a host, preferred first. Hosts written as decimal, octal or hex numbers resolve too."""
    try:
        entries = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [ip_address(entry[4][0]) for entry in entries]
    except (OSError, ValueError):
        return []


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__context__


def _parse(text: str) -> httpx2.URL:
    try:
        return _checked(httpx2.URL(text))
    except httpx2.InvalidURL:
        raise FetchError("its URL cannot be read") from None


def _redirected(origin: httpx2.URL, location: str) -> httpx2.URL:
    try:
        url = _checked(origin.join(location))
    except httpx2.InvalidURL:
        raise FetchError("it was redirected to a URL that cannot be read") from None
    if (origin.scheme, url.scheme) == ("https", "http"):
        raise FetchError("it was redirected from https to http")
    return url


def _checked(url: httpx2.URL) -> httpx2.URL:
    if url.host.startswith(".") or (url.port or 0) >= 2**16:  # parsers accept these, sockets raise
        raise httpx2.InvalidURL("no such host or port")
    if url.scheme not in ("http", "https") or not url.raw_host:
        raise FetchError("only http and https URLs are fetched")
    if url.userinfo:
        raise FetchError("its URL carries credentials")
    return url


async def _read(response: httpcore2.Response, headers: dict[bytes, bytes]) -> bytes:
    if response.status != 200:
        raise FetchError(f"its host answered with status {response.status}")
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise FetchError("its host sent it compressed without being asked to")
    body = bytearray()
    async for chunk in response.aiter_stream():
        body += chunk
        if len(body) > IMAGE_BYTES:
            raise FetchError(f"it is larger than {IMAGE_BYTES // 2**20} MiB")
    return bytes(body)
