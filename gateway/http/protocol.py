"""The HTTP protocol of a connection: uvicorn's, with limits that it lacks and with our error body."""

import asyncio

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from triton_embed.gateway.errors import ApiError

HEAD_BYTES = 64 * 2**10
UNREAD_SECONDS = 30.0  # after which a response of which nothing was read is dropped


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol with limits of time and size for request heads, limits for readers, and JSON error bodies.

    uvicorn itself waits for a head forever, accepts a head of any size, keeps a response until it is read, and rejects
    requests in plain text.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _unread_timer: asyncio.TimerHandle | None = None
    _declining_upgrade = False
    _head_bytes = 0  # received since the last complete head or part of a body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_unread_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_unread_timer()

    def resume_writing(self) -> None:
        self._stop_unread_timer()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        self._feed(data)
        if self._head_bytes > HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The request's head is larger than {HEAD_BYTES} bytes")

    def _feed(self, data: bytes) -> None:
        """Parse data as uvicorn's `data_received` does, but decline upgrades and read the body (RFC 9110, 7.8).

        After a head with an Upgrade header, the parser stops, because the rest could be another protocol, and uvicorn
        treats the body as empty. Every request of JDK's HttpClient offers an upgrade to HTTP/2.
        """
        self._unset_keepalive_if_required()
        while data:
            try:
                self.parser.feed_data(data)
                return
            except HttpParserUpgrade as offer:
                self._decline_upgrade()
                data = data[offer.args[0] :]
            except HttpParserError:
                self.logger.warning("Invalid HTTP request received.")
                self.send_400_response("Invalid HTTP request received.")
                return

    def _decline_upgrade(self) -> None:
        """Continue with a new parser, fed with a head that has the same body framing but no upgrade."""
        framing = [pair for pair in self.headers if pair[0] in (b"content-length", b"transfer-encoding")]
        head = b"".join(b"%s: %s\r\n" % pair for pair in framing)
        self.cycle.more_body = True
        self.parser = HttpRequestParser(self)
        self._declining_upgrade = True  # the callbacks ignore the second head: the app already has this request
        try:
            self.parser.feed_data(b"POST / HTTP/1.1\r\n" + head + b"\r\n")
        finally:
            self._declining_upgrade = False

    def on_url(self, url: bytes) -> None:
        if not self._declining_upgrade:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._declining_upgrade:
            super().on_header(name, value)

    def on_message_begin(self) -> None:
        if not self._declining_upgrade:
            self._head_bytes = 0
            self._start_head_timer()
            super().on_message_begin()

    def on_headers_complete(self) -> None:
        if not self._declining_upgrade:
            self._head_bytes = 0
            self._stop_head_timer()
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """Send a 400 with our error body and close the connection.

        A complete request that the app still works on is answered instead; uvicorn closes the connection after it.
        """
        cycle = self.cycle
        in_progress = cycle is not None and not cycle.response_complete
        if in_progress and not cycle.more_body:
            cycle.keep_alive = False
            self.flow.pause_reading()
            return
        if not (in_progress and cycle.response_started):
            error = ApiError(400, msg).response()
            head = [b"HTTP/1.1 400 Bad Request", b"connection: close"]
            head += [b": ".join(header) for header in (*self.server_state.default_headers, *error.raw_headers)]
            self.transport.write(b"\r\n".join(head) + b"\r\n\r\n" + bytes(error.body))
        if in_progress:  # its body is broken
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.close()

    def _start_head_timer(self) -> None:
        self._stop_head_timer()
        self._head_timer = self.loop.call_later(self.timeout_keep_alive, self.transport.close)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _start_unread_timer(self) -> None:
        unread = self.transport.get_write_buffer_size()
        self._unread_timer = self.loop.call_later(UNREAD_SECONDS, self._check_reader, unread)

    def _check_reader(self, unread: int) -> None:
        """Drop the connection if its reader has read nothing since the last check."""
        if self.transport.get_write_buffer_size() < unread:
            self._start_unread_timer()
        else:
            self.transport.abort()

    def _stop_unread_timer(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None
