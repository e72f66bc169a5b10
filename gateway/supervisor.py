"""tritonserver and the gateway as one thing that stays up.

A tritonserver that ended, or lost a model's process, is started again: at once the first time, then after a growing
pause. The gateway answers 503 in the meantime. The gateway runs in this process, or in several of their own, each of
which is started again likewise.
"""

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from prometheus_client.multiprocess import mark_process_dead

from triton_embed.gateway import settings as settings_file
from triton_embed.gateway.settings import Settings, dump_settings
from triton_embed.gateway.tracing import check_installed
from triton_embed.gateway.triton_process import TritonOptions, TritonProcess, tied_to_this_process
from triton_embed.gateway.worker import Gateway, allow_connections, announcement

log = logging.getLogger(__name__)

SHORTEST_PAUSE, LONGEST_PAUSE, STEADY_SECONDS = 0.5, 30.0, 30.0
WORKER_PAUSE = 2.0  # the longest: clients wait in a worker's own queue while it is away
GATEWAY_SECONDS = 1.2  # once `drain_seconds` are over: for all to be told so
CLOSE_SECONDS = 1.0  # for the gateway to end after Triton, with which its last calls end


class ServeError(RuntimeError):
    """Serving cannot begin. The message is for the operator."""


class Supervisor:
    """Runs both until stopped."""

    def __init__(self, settings: Settings, triton: TritonOptions) -> None:
        self._options = triton
        self._triton: TritonProcess | None = None
        self._settings = settings.model_copy(
            update={
                "triton_grpc": f"{triton.address}:{triton.grpc_port}",
                "triton_repository_header": triton.repository_header,
                "triton_metrics": f"{triton.address}:{triton.metrics_port}",
            }
        )

    async def run(self) -> None:
        """Serve until SIGINT or SIGTERM; leave no process and no shared memory behind.

        ServeError: a port is taken, or tritonserver cannot start at all. SettingsError: an extra is not installed.
        """
        settings = self._settings
        check_installed(settings)
        check_ports(settings, self._options)
        stopping = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stopping.set)
        sockets = listen(settings.host, settings.port, settings.workers)
        gateway: _Here | _Workers = (
            _Here(settings, sockets[0]) if settings.workers == 1 else _Workers(settings, sockets)
        )
        serving = asyncio.create_task(gateway.serve())
        triton = asyncio.create_task(self._keep_triton_up())
        stop = asyncio.create_task(stopping.wait())
        try:
            await asyncio.wait([serving, triton, stop], return_when=asyncio.FIRST_COMPLETED)
            log.info("stopping")
        finally:
            gateway.stop()
            await asyncio.wait([serving], timeout=settings.drain_seconds + GATEWAY_SECONDS)
            for task in (triton, stop):
                task.cancel()
            await asyncio.wait([triton, stop])
            if self._triton is not None:
                await self._triton.stop()
            await asyncio.wait([serving], timeout=CLOSE_SECONDS)
            gateway.kill()
            serving.cancel()
            outcomes = await asyncio.gather(serving, triton, stop, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    async def _keep_triton_up(self) -> None:
        pause, was_up = 0.0, False
        while True:
            started = time.monotonic()
            self._triton = await TritonProcess.start(self._options)
            reason = await self._triton.end()
            self._triton.kill()
            was_up = was_up or self._triton.was_up
            if not was_up:  # an operator's mistake; later it is an accident, and there may be an end to it
                raise ServeError(f"{reason} before it was up; --log-level debug shows its whole log")
            if time.monotonic() - started > STEADY_SECONDS:
                pause = 0.0
            log.error("%s, starting again%s", reason, f" in {pause:g} s" if pause else "")
            await asyncio.sleep(pause)
            pause = min(max(2 * pause, SHORTEST_PAUSE), LONGEST_PAUSE)


class _Here:
    """The gateway in this process."""

    def __init__(self, settings: Settings, sockets: list[socket.socket]) -> None:
        allow_connections()
        self._settings = settings
        self._sockets = sockets
        self._gateway = Gateway(settings)

    async def serve(self) -> None:
        """Until stopped."""
        port = self._sockets[0].getsockname()[1]

        async def tell() -> None:
            log.info("%s", await announcement(self._gateway.app, self._settings, port))

        announcing = asyncio.create_task(tell())
        try:
            await self._gateway.serve(self._sockets)
        finally:
            announcing.cancel()

    def stop(self) -> None:
        """Begin to."""
        self._gateway.stop()

    def kill(self) -> None:
        """It ends with its task."""


class _Workers:
    """The gateway in processes of their own, each with its own sockets of the same port.

    The kernel deals connections out among such sockets. With one shared socket the first to wake takes a whole burst:
    of 32 clients that connected at once, and stay, one of two workers got 31. All sockets stay open here, so that who
    connects to a worker that just died is answered by the next.
    """

    def __init__(self, settings: Settings, sockets: Sequence[list[socket.socket]]) -> None:
        self._settings = settings
        self._sockets = sockets
        self._stopping = asyncio.Event()
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._announcements = [asyncio.get_running_loop().create_future() for _ in sockets]

    async def serve(self) -> None:
        """Until stopped, and all of them have ended."""
        with tempfile.TemporaryDirectory(prefix="triton-embed-metrics-") as metrics:
            telling = asyncio.create_task(self._tell())
            try:
                await asyncio.gather(*(self._keep_up(i, metrics) for i in range(len(self._sockets))))
            finally:
                telling.cancel()

    def stop(self) -> None:
        """Ask all to. No one connects any more once they have closed their sockets."""
        self._stopping.set()
        for listener in (one for sockets in self._sockets for one in sockets):
            listener.close()
        for process in self._processes.values():
            _signal(process, signal.SIGTERM)

    def kill(self) -> None:
        """End those that have not."""
        for process in self._processes.values():
            _signal(process, signal.SIGKILL)

    async def _tell(self) -> None:
        """That all of them answer: whoever read it may be answered by any."""
        log.info("%s", (await asyncio.gather(*self._announcements))[0])

    async def _keep_up(self, i: int, metrics: str) -> None:
        pause = 0.0
        while not self._stopping.is_set():
            started = time.monotonic()
            process = await self._start(i, metrics)
            assert process.stdout is not None  # noqa: S101 - asked for in `_start`
            while line := await process.stdout.readline():
                if not self._announcements[i].done():
                    self._announcements[i].set_result(line.decode().rstrip())
            code = await process.wait()
            del self._processes[i]
            mark_process_dead(process.pid, metrics)  # type: ignore[no-untyped-call]
            if self._stopping.is_set():
                return
            if time.monotonic() - started > STEADY_SECONDS:
                pause = 0.0
            log.error("worker %d ended with code %d, starting again", i, code)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stopping.wait()
            pause = min(max(2 * pause, SHORTEST_PAUSE), WORKER_PAUSE)

    async def _start(self, i: int, metrics: str) -> asyncio.subprocess.Process:
        command = (sys.executable, "-m", "triton_embed.gateway.worker")
        descriptors = [one.fileno() for one in self._sockets[i]]
        process = await asyncio.create_subprocess_exec(
            *tied_to_this_process([*command, ",".join(map(str, descriptors))]),
            env=settings_file.environment(PROMETHEUS_MULTIPROC_DIR=metrics),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=descriptors,
            start_new_session=True,  # Ctrl-C is for this process, which stops them
        )
        self._processes[i] = process
        assert process.stdin is not None  # noqa: S101 - asked for above
        process.stdin.write(dump_settings(self._settings))
        process.stdin.close()
        if self._stopping.is_set():  # while it was being started
            _signal(process, signal.SIGTERM)
        return process


def _signal(process: asyncio.subprocess.Process, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)


def listen(host: str, port: int, workers: int) -> list[list[socket.socket]]:
    """For each worker a socket at every address of `host`, bound and not yet listening. ServeError: there is none."""
    made: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [(family, address) for family, _, _, _, address in found if _is_ours(family, address)]
        for _ in range(workers):
            for family, address in addresses:
                made.append(_bind(family, (address[0], port, *address[2:]), shared=workers > 1))
                port = made[0].getsockname()[1]  # where 0 asked for any
    except OSError as error:
        for one in made:
            one.close()
        raise ServeError(f"cannot listen on {host}:{port} ({error.strerror}); --host and --port change it") from None
    if not made:
        raise ServeError(f"cannot listen on {host}: no address of it is this machine's; --host changes it")
    count = len(addresses)
    return [made[i : i + count] for i in range(0, len(made), count)]


def _is_ours(family: int, address: tuple[Any, ...]) -> bool:
    """Whether this machine has that address: `localhost` names one of IPv6 even where that is switched off."""
    try:
        _bind(family, (address[0], 0, *address[2:]), shared=False).close()
    except OSError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            return False
        raise
    return True


def _bind(family: int, address: tuple[Any, ...], shared: bool) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    try:
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made


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
