"""The gateway in a process: uvicorn with a drain that answers everyone.

    python -m triton_embed.gateway.worker FD[,FD]

serves on listening sockets that it inherits, with the settings that come as JSON on its standard input, until SIGTERM.
A line on its standard output says that a model answers. The supervisor starts it, or serves in its own process where
one is enough.
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

from triton_embed.gateway import logs
from triton_embed.gateway.app import create_app
from triton_embed.gateway.front import Drain
from triton_embed.gateway.protocol import Protocol
from triton_embed.gateway.settings import Settings, read_settings

log = logging.getLogger("triton_embed.gateway.worker")  # not __name__: it is what is run

ANNOUNCE_SECONDS = 0.1
KEEP_ALIVE_SECONDS = 75  # longer than clients keep an idle connection, or they meet it closed
POLL_SECONDS = 0.02
ACCEPT_SECONDS = 0.05  # what has connected by the time of the signal is accepted: closing the socket would reset it
NOTICE_SECONDS = 0.5  # connections stay open that long, for load balancers to ask and to be told
EXPIRED_SECONDS = 1.0  # for those who waited in vain to read that they did


class Gateway(uvicorn.Server):
    """uvicorn with the app of `settings`, and its own way to stop. Signals are its caller's: see `stop`."""

    def __init__(self, settings: Settings) -> None:
        self.app = create_app(settings)
        self._drain: Drain = self.app.state.drain
        self._drain_seconds = settings.drain_seconds
        self._deadline = 0.0  # of the loop's clock
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
        """None: uvicorn re-raises them before Triton could be stopped."""
        yield

    def stop(self) -> None:
        """Probes are answered 503 from now on; the rest follows."""
        if not self.should_exit:
            self._drain.stopping = self.should_exit = True
            self._deadline = time.monotonic() + self._drain_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer all that was asked: in full within `drain_seconds`, then with a 503."""
        await asyncio.sleep(ACCEPT_SECONDS)
        for server in self.servers:
            server.close()
        for listener in sockets or ():
            listener.close()
        await self._wait(min(self._deadline, time.monotonic() + NOTICE_SECONDS))
        for connection in list(self.server_state.connections):
            connection.shutdown()  # at once where it is idle, else after its answer
        await self._wait(self._deadline)
        self._drain.expire()
        await self._wait(time.monotonic() + EXPIRED_SECONDS)
        await self.lifespan.shutdown()

    async def _wait(self, until: float) -> None:
        """For all connections to end, and all requests."""
        while (self.server_state.connections or self.server_state.tasks) and time.monotonic() < until:
            await asyncio.sleep(POLL_SECONDS)


async def announcement(app: FastAPI, settings: Settings, port: int) -> str:
    """One line when the first model answers, with a request to try. It is looked for more often than later on."""
    while not (hasattr(app.state, "gateway") and app.state.gateway.registry.ready):
        if hasattr(app.state, "gateway"):
            app.state.gateway.registry.suspect()
        await asyncio.sleep(ANNOUNCE_SECONDS)
    registry = app.state.gateway.registry
    ready = [registry.public_name(card) for card in registry.cards if card.info]
    body = json.dumps({"model": ready[0], "input": "Once upon a time"})
    key = " -H 'Authorization: Bearer YOUR_KEY'" if settings.keys else ""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{port}/v1/embeddings"
    return f"ready: {', '.join(ready)}. Try: curl {url}{key} -d {shlex.quote(body)}"


async def serve(settings: Settings, sockets: list[socket.socket]) -> None:
    """Serve on `sockets` until SIGTERM or SIGINT; the announcement goes to standard output."""
    gateway = Gateway(settings)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, gateway.stop)
    port = sockets[0].getsockname()[1]

    async def tell() -> None:
        sys.stdout.write(f"{await announcement(gateway.app, settings, port)}\n")
        sys.stdout.flush()

    telling = asyncio.create_task(tell())
    try:
        await gateway.serve(sockets)
    finally:
        telling.cancel()


def allow_connections() -> None:
    """As many open files as this process may have: each connection is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main(arguments: Sequence[str]) -> None:
    """Exit code 0: stopped as asked."""
    settings = read_settings(**json.load(sys.stdin))
    logs.configure(settings.log_level, settings.log_format)
    allow_connections()
    sockets = [socket.socket(fileno=int(number)) for number in arguments[0].split(",")]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings, sockets))


if __name__ == "__main__":
    main(sys.argv[1:])
