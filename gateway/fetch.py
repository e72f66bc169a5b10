"""GET of URLs that strangers name, without lending them this machine's place in the network.

Only public addresses are connected to. The rule sits where sockets are opened: whatever a URL, a redirect or a name
server says, the host is resolved there once, every address is judged, and the connection goes to a judged address
and not to the name again. Proxies, cookies and credentials are never used; TLS is checked against the host's name.
"""

import asyncio
import socket
import ssl
from collections.abc import Collection, Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import httpcore2
import httpx2

IMAGE_BYTES = 20 * 2**20
TOTAL_SECONDS = 5.0  # from the first look-up to the last byte, redirects included
ATTEMPT_SECONDS = 2.0  # for one address of a host that has several
REDIRECTS = 3
AT_ONCE = 16  # fetches of the whole gateway

REDIRECTED = frozenset({301, 302, 303, 307, 308})
HEADERS = (
    (b"User-Agent", b"triton-embed"),
    (b"Accept", b"image/*,*/*;q=0.5"),
    (b"Accept-Encoding", b"identity"),
)
# One reason for both, so that nobody learns which names and addresses exist inside.
NOT_PUBLIC = "its host is unknown or not public"
# Global to `ipaddress`, on some Python or all, and yet no place of a public web server.
RESERVED = [
    ip_network(text)
    for text in (
        "192.0.0.0/24",  # IETF assignments; Oracle's metadata service is 192.0.0.192
        "192.88.99.0/24",  # 6to4 relays
        "168.63.129.16/32",  # Azure's platform service, in every machine of theirs
        "2001::/23",  # IETF assignments; Teredo, which wraps IPv4
        "2002::/16",  # 6to4, which wraps IPv4
        "3fff::/20",  # documentation
    )
]
# The only part of IPv6 that is handed out: outside lie NAT64, IPv4-mapped, site-local and what may yet come.
GLOBAL_UNICAST = ip_network("2000::/3")


class FetchError(Exception):
    """Nothing was fetched. The text is one of a few reasons, with `it` for what the URL names; callers may see it."""


class Fetcher:
    """One for each gateway. `allowed` names hosts, as `host` or `host:port`, whose addresses need not be public."""

    def __init__(self, allowed: Collection[str] = (), tls: ssl.SSLContext | None = None) -> None:
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=tls or httpcore2.default_ssl_context(),
            max_connections=None,
            max_keepalive_connections=0,  # a connection kept open would outlive its check
            network_backend=PublicNetwork(allowed),
        )
        self._slots = asyncio.Semaphore(AT_ONCE)

    async def close(self) -> None:
        await self._pool.aclose()

    async def get(self, url: str) -> bytes:
        """The body, at most IMAGE_BYTES of it, within TOTAL_SECONDS of its turn. FetchError otherwise."""
        async with self._slots:
            try:
                async with asyncio.timeout(TOTAL_SECONDS):
                    return await self._follow(_parse(url))
            except TimeoutError:
                raise FetchError(f"it took longer than {TOTAL_SECONDS:g} s") from None
            except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException, OSError) as error:
                distrusted = any(isinstance(cause, ssl.SSLCertVerificationError) for cause in _causes(error))
                reason = "could not prove who it is" if distrusted else "did not answer"
                raise FetchError(f"its host {reason}") from None

    async def _follow(self, url: httpx2.URL) -> bytes:
        for _ in range(REDIRECTS + 1):
            target = httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
            headers = [(b"Host", url.netloc), *HEADERS]
            async with self._pool.stream("GET", target, headers=headers) as response:
                told = {name.lower(): value for name, value in response.headers}
                if response.status not in REDIRECTED or b"location" not in told:
                    return await _read(response, told)
            url = _redirected(url, told[b"location"].decode(errors="replace"))
        raise FetchError(f"it was redirected more than {REDIRECTS} times")


class PublicNetwork(httpcore2.AsyncNetworkBackend):
    """Opens connections to public addresses, and to any address of an allowed host."""

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
        """A connection to the first address that answers. FetchError: one of them is not public, or there is none."""
        name = f"[{host}]" if ":" in host else host
        addresses = await _resolve(host, port)
        allowed = name in self._allowed or f"{name}:{port}" in self._allowed
        if not addresses or not (allowed or all(map(is_public, addresses))):
            raise FetchError(NOT_PUBLIC)
        for address in addresses[:-1]:
            try:
                return await self._sockets.connect_tcp(str(address), port, ATTEMPT_SECONDS)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                continue
        return await self._sockets.connect_tcp(str(addresses[-1]), port, ATTEMPT_SECONDS)


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether a stranger could reach this address without us.

    IANA's special-purpose registries, by way of `ipaddress` where it knows them; IPv6 that wraps IPv4 never is.
    """
    if address.version == 6 and address not in GLOBAL_UNICAST:
        return False
    return address.is_global and not address.is_multicast and not any(address in network for network in RESERVED)


async def _resolve(host: str, port: int) -> list[IPv4Address | IPv6Address]:
    """Every address of a host, the system's favourite first; also of one written as decimal, octal or hex."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [ip_address(entry[4][0]) for entry in found]
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
    if url.host.startswith(".") or (url.port or 0) >= 2**16:  # no parser's business, but sockets raise for them
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
        raise FetchError("its host sent it compressed, unasked")
    body = bytearray()
    async for chunk in response.aiter_stream():
        body += chunk
        if len(body) > IMAGE_BYTES:
            raise FetchError(f"it is larger than {IMAGE_BYTES // 2**20} MiB")
    return bytes(body)
