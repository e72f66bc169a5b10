"""tritonserver and the gateway as one thing that stays up.

A tritonserver that ended, or lost a model's process, is started again: at once the first time, then after a growing
pause. The gateway answers 503 in the meantime.
"""

import asyncio
import contextlib
import json
import logging
import shlex
import signal
import socket
import time
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from triton_embed.gateway.app import create_app
from triton_embed.gateway.settings import Settings
from triton_embed.gateway.triton_process import TritonOptions, TritonProcess

log = logging.getLogger(__name__)

SHORTEST_PAUSE, LONGEST_PAUSE, STEADY_SECONDS = 0.5, 30.0, 30.0
DRAIN_SECONDS = 4  # for HTTP requests; with tritonserver's own this is under the ten seconds promised
ANNOUNCE_SECONDS = 0.1
KEEP_ALIVE_SECONDS = 75  # longer than clients keep an idle connection, or they meet it closed


class ServeError(RuntimeError):
    """Serving cannot begin. The message is for the operator."""


class Supervisor:
    """Runs both until stopped."""

    def __init__(self, settings: Settings, triton: TritonOptions) -> None:
        self._settings = settings
        self._options = triton
        self._triton: TritonProcess | None = None

    async def run(self) -> None:
        """Serve until SIGINT or SIGTERM; leave no process and no shared memory behind.

        ServeError: a port is taken, or tritonserver cannot start at all.
        """
        check_ports(self._settings, self._options)
        stopping = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stopping.set)
        app = create_app(self._settings)
        config = uvicorn.Config(
            app,
            host=self._settings.host,
            port=self._settings.port,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=DRAIN_SECONDS,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
        )
        server = _Gateway(config)
        serving = asyncio.create_task(server.serve())
        triton = asyncio.create_task(self._keep_triton_up())
        announcing = asyncio.create_task(self._announce(app))
        stop = asyncio.create_task(stopping.wait())
        try:
            await asyncio.wait([serving, triton, stop], return_when=asyncio.FIRST_COMPLETED)
            log.info("stopping")
        finally:
            server.should_exit = True
            await asyncio.wait([serving], timeout=DRAIN_SECONDS + 1)
            others = (triton, announcing, stop)
            for task in (*others, serving):
                task.cancel()
            outcomes = await asyncio.gather(serving, *others, return_exceptions=True)
            if self._triton is not None:
                await self._triton.stop()
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    async def _keep_triton_up(self) -> None:
        pause = 0.0
        while True:
            started = time.monotonic()
            self._triton = await TritonProcess.start(self._options)
            reason = await self._triton.end()
            self._triton.kill()
            if not self._triton.was_up:
                raise ServeError(f"{reason} before it was up; --log-level debug shows its whole log")
            if time.monotonic() - started > STEADY_SECONDS:
                pause = 0.0
            log.error("%s, starting again%s", reason, f" in {pause:g} s" if pause else "")
            await asyncio.sleep(pause)
            pause = min(max(2 * pause, SHORTEST_PAUSE), LONGEST_PAUSE)

    async def _announce(self, app: FastAPI) -> None:
        """One line when the first model answers, with a request to try."""
        while not (hasattr(app.state, "gateway") and app.state.gateway.registry.ready):
            if hasattr(app.state, "gateway"):
                app.state.gateway.registry.suspect()
            await asyncio.sleep(ANNOUNCE_SECONDS)
        registry = app.state.gateway.registry
        ready = [registry.public_name(card) for card in registry.cards if card.info]
        body = json.dumps({"model": ready[0], "input": "Once upon a time"})
        key = " -H 'Authorization: Bearer YOUR_KEY'" if self._settings.api_key.get_secret_value() else ""
        url = f"http://{self._settings.host}:{self._settings.port}/v1/embeddings"
        log.info("ready: %s. Try: curl %s%s -d %s", ", ".join(ready), url, key, shlex.quote(body))


class _Gateway(uvicorn.Server):
    """uvicorn, with the signals left to the supervisor: it re-raises them before Triton could be stopped."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def check_ports(settings: Settings, triton: TritonOptions) -> None:
    """ServeError: another program listens on a port that is needed; it names the flag that moves it."""
    wanted = {"--port": (settings.host, settings.port)}
    wanted |= {f"--triton-{service}-port": (triton.address, port) for service, port in triton.ports.items()}
    for flag, (host, port) in wanted.items():
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise ServeError(f"cannot listen on {host}:{port} ({error.strerror}); {flag} changes it") from None
