"""Image servers of the soak: one that the gateway may fetch from, and one that it must never reach."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

ENDLESS_SECONDS = 5.5  # duration of the response of /endless: longer than the fetch timeout


class ImageSite:
    """Both servers, on loopback ports."""

    def __init__(self, images: Mapping[str, bytes], port: int, forbidden_port: int) -> None:
        self.images, self.port, self.forbidden_port = images, port, forbidden_port
        self.forbidden_connections = 0

    def url(self, path: str) -> str:
        """Return a URL of the allowed server."""
        return f"http://127.0.0.1:{self.port}/{path}"

    @property
    def forbidden(self) -> str:
        """A URL of the forbidden server."""
        return f"http://127.0.0.1:{self.forbidden_port}/0.png"

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Serve until the block ends."""
        allowed = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        forbidden = await asyncio.start_server(self._count_forbidden, "127.0.0.1", self.forbidden_port)
        async with allowed, forbidden:
            yield

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(EOFError, OSError):
            head = await reader.readuntil(b"\r\n\r\n")
            name = head.split()[1].decode().lstrip("/")
            if name == "inside":
                writer.write(f"HTTP/1.1 302 Found\r\nLocation: {self.forbidden}\r\nContent-Length: 0\r\n\r\n".encode())
            elif name == "endless":
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
                for _ in range(int(ENDLESS_SECONDS / 0.1)):
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.1)
            elif (image := self.images.get(name)) is not None:
                writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(image)}\r\n\r\n".encode() + image)
            else:
                writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
        writer.close()

    async def _count_forbidden(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.forbidden_connections += 1
        writer.close()
