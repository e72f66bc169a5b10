"""HTTP on a connection: uvicorn's, with limits on what it leaves unlimited and refusals in our own form."""

import asyncio

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from triton_embed.gateway.errors import ApiError

HEAD_BYTES = 64 * 2**10


class Protocol(HttpToolsProtocol):
    """uvicorn's, which waits for a request's head for ever and takes one of any size, and refuses in plain text."""

    _patience: asyncio.TimerHandle | None = None
    _declining = False
    _idle_bytes = 0  # that brought neither a whole head nor a piece of a body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_expecting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._idle_bytes += len(data)
        self._feed(data)
        if self._idle_bytes > HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The request's head is larger than {HEAD_BYTES} bytes")

    def _feed(self, data: bytes) -> None:
        """uvicorn's `data_received`, but for an upgrade on offer: it is declined and the body read (RFC 9110, 7.8).

        The parser takes what follows such a head for another protocol, and uvicorn takes the body for empty. Every
        request of JDK's HttpClient offers HTTP/2.
        """
        self._unset_keepalive_if_required()
        while data:
            try:
                self.parser.feed_data(data)
                return
            except HttpParserUpgrade as offer:
                self._decline()
                data = data[offer.args[0] :]
            except HttpParserError:
                self.logger.warning("Invalid HTTP request received.")
                self.send_400_response("Invalid HTTP request received.")
                return

    def _decline(self) -> None:
        """Go on with a parser that has seen the same head without the offer."""
        framing = [pair for pair in self.headers if pair[0] in (b"content-length", b"transfer-encoding")]
        head = b"".join(b"%s: %s\r\n" % pair for pair in framing)
        self.cycle.more_body = True
        self.parser = HttpRequestParser(self)
        self._declining = True  # the app has this request already
        try:
            self.parser.feed_data(b"POST / HTTP/1.1\r\n" + head + b"\r\n")
        finally:
            self._declining = False

    def on_url(self, url: bytes) -> None:
        if not self._declining:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._declining:
            super().on_header(name, value)

    def on_message_begin(self) -> None:
        if not self._declining:
            self._idle_bytes = 0
            self._expect_head()
            super().on_message_begin()

    def on_headers_complete(self) -> None:
        if not self._declining:
            self._idle_bytes = 0
            self._stop_expecting()
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._idle_bytes = 0
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """The error body of every other refusal; a request that was whole before is answered first."""
        cycle = self.cycle
        under_way = cycle is not None and not cycle.response_complete
        if under_way and not cycle.more_body:
            cycle.keep_alive = False
            self.flow.pause_reading()
            return
        if not (under_way and cycle.response_started):
            refusal = ApiError(400, msg).response()
            head = [b"HTTP/1.1 400 Bad Request", b"connection: close"]
            head += [b": ".join(header) for header in (*self.server_state.default_headers, *refusal.raw_headers)]
            self.transport.write(b"\r\n".join(head) + b"\r\n\r\n" + bytes(refusal.body))
        if under_way:  # its body is what is broken
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.close()

    def _expect_head(self) -> None:
        self._stop_expecting()
        self._patience = self.loop.call_later(self.timeout_keep_alive, self.transport.close)

    def _stop_expecting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
