"""Supervision of tritonserver and the gateway.

A tritonserver that ended or lost a model's process is restarted, the first time immediately, then after growing pauses.
The gateway answers 503 meanwhile. It runs in this process, or in several worker processes that are restarted too.
"""

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from prometheus_client.multiprocess import mark_process_dead

from triton_embed.gateway.http.tracing import check_installed
from triton_embed.gateway.process.scratch import scratch_directory
from triton_embed.gateway.process.server import GatewayServer, announcement, raise_file_limit
from triton_embed.gateway.process.triton_process import TritonOptions, TritonProcess, tied_to_this_process
from triton_embed.gateway.settings import Settings, dump_settings, environment

log = logging.getLogger(__name__)

# The pause before a restart doubles each time. A process that ran for STEADY_SECONDS is restarted immediately again.
MIN_PAUSE, MAX_PAUSE, STEADY_SECONDS = 0.5, 30.0, 30.0
LOAD_ATTEMPTS = 3  # for a model whose process dies while it loads; each restarts all models
MAX_WORKER_PAUSE = 2.0  # short, because clients wait in the queue of a worker's socket meanwhile
GATEWAY_SECONDS = 1.2  # after `drain_seconds`: for the gateway to send its 503 responses
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
MIN_OPEN_FILES = 128  # tritonserver opens about 70 and then waits for ever for more
CLOSE_SECONDS = 1.0  # for the gateway to end after Triton has ended, because that ends its last calls


class ServeError(RuntimeError):
    """An error that prevents serving. The message is for the operator."""


class Supervisor:
    """Runs tritonserver and the gateway until stopped."""

    def __init__(self, settings: Settings, triton: TritonOptions) -> None:
        self._options = triton
        self._triton: TritonProcess | None = None
        self._settings = settings.model_copy(
            update={
                "triton_grpc": f"{triton.address}:{triton.grpc_port}",
                "triton_metrics": f"{triton.address}:{triton.metrics_port}",
            }
        )

    async def run(self) -> None:
        """Serve until a signal of STOP_SIGNALS. Leave no process and no shared memory behind.

        Raises:
            ServeError: if a port is taken or tritonserver cannot start at all.
            SettingsError: if `otlp_endpoint` is set but OpenTelemetry is not installed.
        """
        settings = self._settings
        check_installed(settings)
        check_file_limit()
        stopping = asyncio.Event()
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
                asyncio.get_running_loop().add_signal_handler(number, stopping.set)
        sockets = listen(settings.host, settings.port, settings.workers)
        check_ports(self._options, sockets[0])
        gateway: _InProcess | _Workers = (
            _InProcess(settings, sockets[0]) if settings.workers == 1 else _Workers(settings, sockets)
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
        deaths: Counter[str] = Counter()  # of models while they loaded
        while True:
            started = time.monotonic()
            given_up = {model for model, count in deaths.items() if count >= LOAD_ATTEMPTS}
            self._triton = await TritonProcess.start(self._options)
            reason = await self._triton.wait_for_end(given_up)
            self._triton.kill()
            was_up = was_up or self._triton.was_up
            if self._triton.refusal:
                raise ServeError(reason)
            if not was_up:  # most likely a configuration error; later failures may be temporary
                raise ServeError(f"{reason} before it was ready; --log-level debug shows its whole log")
            died = self._triton.died_loading
            if died is not None and died not in given_up:
                deaths[died] += 1
            elif self._triton.serves_nothing:
                raise ServeError(reason)
            else:
                deaths.clear()
            if time.monotonic() - started > STEADY_SECONDS:
                pause = 0.0
            log.error("%s, restarting%s", reason, f" in {pause:g} s" if pause else "")
            await asyncio.sleep(pause)
            pause = min(max(2 * pause, MIN_PAUSE), MAX_PAUSE)


class _InProcess:
    """The gateway inside this process."""

    def __init__(self, settings: Settings, sockets: list[socket.socket]) -> None:
        self._settings = settings
        self._sockets = sockets
        self._gateway = GatewayServer(settings)

    async def serve(self) -> None:
        """Serve until stopped."""
        port = self._sockets[0].getsockname()[1]

        async def announce() -> None:
            log.info("%s", await announcement(self._gateway.app, self._settings, port))

        announcing = asyncio.create_task(announce())
        try:
            await self._gateway.serve(self._sockets)
        finally:
            announcing.cancel()

    def stop(self) -> None:
        """Start the shutdown without waiting."""
        self._gateway.stop()

    def kill(self) -> None:
        """Do nothing: the gateway ends with its asyncio task."""


class _Workers:
    """Gateway processes, each with separate sockets on the same port.

    The kernel distributes connections among such sockets. With one shared socket, the first process to wake accepts a
    whole burst (measured: of 32 clients that connected at once, one of two workers got 31). All sockets stay open in
    this process, so that a client that connects to a worker that just died is answered by its successor.
    """

    def __init__(self, settings: Settings, sockets: Sequence[list[socket.socket]]) -> None:
        self._settings = settings
        self._sockets = sockets
        self._stopping = asyncio.Event()
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._announcements = [asyncio.get_running_loop().create_future() for _ in sockets]

    async def serve(self) -> None:
        """Serve until stopped and all workers have ended."""
        with scratch_directory("metrics-") as metrics_directory:
            announcing = asyncio.create_task(self._announce())
            try:
                await asyncio.gather(*(self._keep_up(i, str(metrics_directory)) for i in range(len(self._sockets))))
            finally:
                announcing.cancel()

    def stop(self) -> None:
        """Start the shutdown of all workers. Nothing can connect once they have closed their sockets."""
        self._stopping.set()
        for listener in (listener for sockets in self._sockets for listener in sockets):
            listener.close()
        for process in self._processes.values():
            _signal(process, signal.SIGTERM)

    def kill(self) -> None:
        """Kill the workers that have not ended."""
        for process in self._processes.values():
            _signal(process, signal.SIGKILL)

    async def _announce(self) -> None:
        """Log the announcement once every worker is ready: any of them may get the next request."""
        log.info("%s", (await asyncio.gather(*self._announcements))[0])

    async def _keep_up(self, i: int, metrics_directory: str) -> None:
        pause = 0.0
        while not self._stopping.is_set():
            started = time.monotonic()
            process = await self._start(i, metrics_directory)
            assert process.stdout is not None  # noqa: S101 - `_start` requests a pipe
            while line := await process.stdout.readline():
                if not self._announcements[i].done():
                    self._announcements[i].set_result(line.decode().rstrip())
            code = await process.wait()
            del self._processes[i]
            mark_process_dead(process.pid, metrics_directory)  # type: ignore[no-untyped-call]
            if self._stopping.is_set():
                return
            if time.monotonic() - started > STEADY_SECONDS:
                pause = 0.0
            log.error("worker %d ended with code %d, restarting", i, code)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stopping.wait()
            pause = min(max(2 * pause, MIN_PAUSE), MAX_WORKER_PAUSE)

    async def _start(self, i: int, metrics_directory: str) -> asyncio.subprocess.Process:
        # -P: not from the current directory, which others may be able to write to
        command = (sys.executable, "-Pm", "triton_embed.gateway.process.server")
        descriptors = [listener.fileno() for listener in self._sockets[i]]
        process = await asyncio.create_subprocess_exec(
            *tied_to_this_process([*command, ",".join(map(str, descriptors))]),
            env=environment(PROMETHEUS_MULTIPROC_DIR=metrics_directory),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=descriptors,
            start_new_session=True,  # Ctrl-C must reach this process only, which stops the workers
        )
        self._processes[i] = process
        assert process.stdin is not None  # noqa: S101 - requested above
        process.stdin.write(dump_settings(self._settings))
        process.stdin.close()
        if self._stopping.is_set():  # `stop` was called before the process was in the table
            _signal(process, signal.SIGTERM)
        return process


def _signal(process: asyncio.subprocess.Process, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)


def listen(host: str, port: int, workers: int) -> list[list[socket.socket]]:
    """Return, for each worker, a socket bound to every address of `host`, not yet listening.

    Host `::` means every address of this machine, IPv4 and IPv6.

    Raises:
        ServeError: if `host` is no address of this machine, or its port is taken.
    """
    try:
        resolved = socket.getaddrinfo(
            None if host == "::" else host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a host name"
        raise ServeError(f"cannot listen on {host} ({reason}); choose another with --host") from None
    bound: list[socket.socket] = []
    try:
        addresses = [(family, address) for family, _, _, _, address in resolved if _is_local(family, address)]
        for _ in range(workers):
            for family, address in addresses:
                bound.append(_bind(family, (address[0], port, *address[2:]), shared=workers > 1))
                port = bound[0].getsockname()[1]  # port 0 means any free port
    except OSError as error:
        for listener in bound:
            listener.close()
        raise ServeError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another with --host or --port"
        ) from None
    if not bound:
        raise ServeError(f"cannot listen on {host}: this machine has no such address; choose another with --host")
    count = len(addresses)
    return [bound[i : i + count] for i in range(0, len(bound), count)]


def _is_local(family: int, address: tuple[Any, ...]) -> bool:
    """Return whether this machine has an address: `localhost` resolves to IPv6 even if IPv6 is disabled.

    Raises:
        OSError: if its port is taken, which a socket that shares its port with other workers would not notice.
    """
    try:
        _bind(family, address, shared=False).close()
    except OSError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            return False
        raise
    return True


def _bind(family: int, address: tuple[Any, ...], shared: bool) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    try:
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def check_ports(triton: TritonOptions, gateway: Sequence[socket.socket]) -> None:
    """Check that all ports of tritonserver are free.

    Args:
        gateway: Sockets that are bound already.

    Raises:
        ServeError: naming the flag that changes a port.
    """
    bound = [listener.getsockname() for listener in gateway]
    flags = {port: "--port" for host, port, *_ in bound if host in (triton.address, "0.0.0.0")}  # noqa: S104
    for service, port in triton.ports.items():
        flag = f"--triton-{service}-port"
        if not 0 < port < 2**16:
            raise ServeError(f"{flag} is {port}; it must be between 1 and 65535")
        if port in flags:
            raise ServeError(f"{flags[port]} and {flag} are both {port}; choose another for one of them")
        flags[port] = flag
        try:
            _bind(socket.AF_INET, (triton.address, port), shared=False).close()
        except OSError as error:
            where = f"{triton.address}:{port}"
            raise ServeError(f"cannot listen on {where} ({error.strerror}); choose another with {flag}") from None


def check_file_limit() -> None:
    """Raise the limit of open files as far as possible, for the child processes too.

    Raises:
        ServeError: if it stays too small.
    """
    limit = raise_file_limit()
    if limit < MIN_OPEN_FILES:
        raise ServeError(
            f"this process may open only {limit} files; allow it at least {MIN_OPEN_FILES}, as with ulimit -n"
        )
