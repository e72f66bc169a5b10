"""The gateway process: uvicorn with a shutdown that answers every request.

    python -m triton_embed.gateway.process.server FD[,FD]

serves on inherited listening sockets until SIGTERM, with settings read as JSON from standard input. A line on standard
output announces the first ready model. The supervisor starts this process, or serves in its own if one is enough.
"""

import asyncio
import contextlib
import json
import logging
import resource
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence

import uvicorn
import uvloop
from fastapi import FastAPI

from triton_embed.gateway.app import create_app
from triton_embed.gateway.http import logs
from triton_embed.gateway.http.middleware import Drain
from triton_embed.gateway.http.protocol import Protocol
from triton_embed.gateway.settings import Settings, read_settings

log = logging.getLogger("triton_embed.gateway.process.server")  # not __name__, which is __main__

ANNOUNCE_SECONDS = 0.1
KEEP_ALIVE_SECONDS = 75  # longer than clients keep idle connections, which they would find closed
POLL_SECONDS = 0.02
ACCEPT_SECONDS = 0.05  # for connections that wait to be accepted: closing the listening socket would reset them
NOTICE_SECONDS = 0.5  # connections stay open this long, so that load balancers see failing probes
EXPIRED_SECONDS = 1.0  # for clients to read the final 503


class GatewayServer(uvicorn.Server):
    """uvicorn with the app of `settings` and a draining shutdown. The caller handles signals: see `stop`."""

    def __init__(self, settings: Settings) -> None:
        self.app = create_app(settings)
        self._drain: Drain = self.app.state.drain
        self._drain_seconds = settings.drain_seconds
        self._deadline = 0.0  # on the monotonic clock
        super().__init__(
            uvicorn.Config(
                self.app,
                http=Protocol,
                ws="none",
                log_config=None,
                log_level="warning",
                access_log=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture no signals: uvicorn would re-raise them before Triton is stopped."""
        yield

    def stop(self) -> None:
        """Start the shutdown: probes fail from now on."""
        if not self.should_exit:
            self._drain.stopping = self.should_exit = True
            self._deadline = time.monotonic() + self._drain_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer every request: normally within `drain_seconds`, afterwards with a 503."""
        await asyncio.sleep(ACCEPT_SECONDS)
        for server in self.servers:
            server.close()
        for listener in sockets or ():
            listener.close()
        await self._wait(min(self._deadline, time.monotonic() + NOTICE_SECONDS))
        for connection in list(self.server_state.connections):
            connection.shutdown()  # at once if it is idle, else after its response
        await self._wait(self._deadline)
        self._drain.expire()
        await self._wait(time.monotonic() + EXPIRED_SECONDS)
        await self.lifespan.shutdown()

    async def _wait(self, until: float) -> None:
        """Wait until every connection and request has ended, or until `until` on the monotonic clock."""
        while (self.server_state.connections or self.server_state.tasks) and time.monotonic() < until:
            await asyncio.sleep(POLL_SECONDS)


async def announcement(app: FastAPI, settings: Settings, port: int) -> str:
    """Wait for the first ready model, refreshing the registry often, and return a line with a request to try."""
    while not (hasattr(app.state, "gateway") and app.state.gateway.registry.ready):
        if hasattr(app.state, "gateway"):
            app.state.gateway.registry.refresh_soon()
        await asyncio.sleep(ANNOUNCE_SECONDS)
    registry = app.state.gateway.registry
    ready = [registry.public_name(entry) for entry in registry.entries if entry.info]
    body = json.dumps({"model": ready[0], "input": "Once upon a time"})
    key = " -H 'Authorization: Bearer YOUR_KEY'" if settings.keys else ""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{port}/v1/embeddings"
    return f"ready: {', '.join(ready)}. Try: curl {url}{key} -d {shlex.quote(body)}"


async def serve(settings: Settings, sockets: list[socket.socket]) -> None:
    """Serve on `sockets` until SIGTERM or SIGINT. Write the announcement to standard output."""
    server = GatewayServer(settings)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, server.stop)
    port = sockets[0].getsockname()[1]

    async def announce() -> None:
        sys.stdout.write(f"{await announcement(server.app, settings, port)}\n")
        sys.stdout.flush()

    announcing = asyncio.create_task(announce())
    try:
        await server.serve(sockets)
    finally:
        announcing.cancel()


def raise_file_limit() -> int:
    """Raise the soft limit of open files to the hard limit, because each connection is an open file. Return it."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    return hard_limit


def main(arguments: Sequence[str]) -> None:
    """Run the gateway process. Exit code 0: stopped by a signal."""
    settings = read_settings(**json.load(sys.stdin))
    logs.configure(settings.log_level, settings.log_format)
    raise_file_limit()
    sockets = [socket.socket(fileno=int(number)) for number in arguments[0].split(",")]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings, sockets))


if __name__ == "__main__":
    main(sys.argv[1:])
