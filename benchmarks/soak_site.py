"""A site of pictures that the gateway is allowed to fetch from, and one beside it that it must never reach."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

ENDLESS = 5.5  # seconds for which /endless drips: longer than a fetch may take


class Site:
    def __init__(self, pictures: Mapping[str, bytes], port: int, forbidden_port: int) -> None:
        self.pictures, self.port, self.forbidden_port = pictures, port, forbidden_port
        self.trespasses = 0  # connections to the forbidden one

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

    @property
    def forbidden(self) -> str:
        return f"http://127.0.0.1:{self.forbidden_port}/0.png"

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        allowed = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        forbidden = await asyncio.start_server(self._trespass, "127.0.0.1", self.forbidden_port)
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
                for _ in range(int(ENDLESS / 0.1)):
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.1)
            elif (picture := self.pictures.get(name)) is not None:
                writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(picture)}\r\n\r\n".encode() + picture)
            else:
                writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
        writer.close()

    async def _trespass(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.trespasses += 1
        writer.close()
