"""tritonserver and the gateway as one thing that stays up.

A dead tritonserver is started again, with a growing pause. A dead stub is not noticed by tritonserver 2.51, which
goes on calling its model ready: its model is unloaded and loaded again, which takes about two seconds and leaves
the other models alone.
"""

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import re
import secrets
import shlex
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import uvicorn
from fastapi import FastAPI

from triton_embed.gateway.app import create_app
from triton_embed.gateway.settings import Settings

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
FIRST_PAUSE, LONGEST_PAUSE, STEADY_SECONDS = 0.5, 30.0, 60.0
DRAIN_SECONDS, STOP_SECONDS = 4.0, 4.0  # together under the ten seconds promised
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Triton's Python backend puts its regions
STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class TritonOptions:
    """How to start tritonserver: which models of which repository, on which loopback ports."""

    repository: Path
    models: tuple[str, ...] = ("*",)
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    address: str = "127.0.0.1"
    verbose: bool = False
    checkpoints: Path | None = None
    # Loading a model runs its Python: only the holder of this key may.
    key: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def repository_header(self) -> str:
        return f"triton-embed={self.key}"

    def command(self) -> list[str]:
        """The command line; `tritonserver` is our launcher, found beside this Python."""
        return [
            str(Path(sys.executable).with_name("tritonserver")),
            f"--model-repository={self.repository}",
            "--model-control-mode=explicit",
            *(f"--load-model={name}" for name in self.models),
            "--exit-on-error=false",
            *(
                f"--{service}-{what}={value}"
                for service, port in (
                    ("http", self.http_port),
                    ("grpc", self.grpc_port),
                    ("metrics", self.metrics_port),
                )
                for what, value in (("address", self.address), ("port", port))
            ),
            f"--http-restricted-api=model-repository:{self.repository_header}",
            f"--grpc-restricted-protocol=model-repository:{self.repository_header}",
            f"--exit-timeout-secs={STOP_SECONDS:.0f}",
        ]


class ServeError(RuntimeError):
    """Serving cannot begin. The message is for the operator."""


def check_ports(settings: Settings, triton: TritonOptions) -> None:
    """ServeError: another program listens on a port that is needed; it names the flag that moves it."""
    wanted = {
        "--port": (settings.host, settings.port),
        "--triton-http-port": (triton.address, triton.http_port),
        "--triton-grpc-port": (triton.address, triton.grpc_port),
        "--triton-metrics-port": (triton.address, triton.metrics_port),
    }
    for flag, (host, port) in wanted.items():
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise ServeError(f"cannot listen on {host}:{port} ({error.strerror}); {flag} changes it") from None


class Supervisor:
    """Runs both until stopped; `run` returns the exit code."""

    def __init__(self, settings: Settings, triton: TritonOptions) -> None:
        self._settings = settings
        self._triton = triton
        self._process: asyncio.subprocess.Process | None = None
        self._stubs: dict[int, str] = {}  # pid -> model
        self._regions: set[str] = set()  # shared memory our stubs were given
        self._was_up = False
        self._stopping = asyncio.Event()

    async def run(self) -> int:
        """Serve until SIGINT or SIGTERM; leave no process and no shared memory behind."""
        check_ports(self._settings, self._triton)
        app = create_app(self._settings)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stopping.set)
        server = _Gateway(
            uvicorn.Config(
                app,
                host=self._settings.host,
                port=self._settings.port,
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=int(DRAIN_SECONDS),
            )
        )
        work = (server.serve(), self._keep_triton_up(), self._watch_stubs(), self._announce(app))
        tasks = [asyncio.create_task(part) for part in work]
        stop = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait([*tasks[:3], stop], return_when=asyncio.FIRST_COMPLETED)
            failed = not self._stopping.is_set()
            log.info("stopping")
            self._stopping.set()
            server.should_exit = True
            await asyncio.wait(tasks[:1], timeout=DRAIN_SECONDS + 1)
            for task in tasks:
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(outcome, Exception):
                    log.error("%s", outcome or repr(outcome))
        finally:
            await self._stop_triton()
        return int(failed)

    async def _keep_triton_up(self) -> None:
        pause = FIRST_PAUSE
        while not self._stopping.is_set():
            started = time.monotonic()
            environment = dict(os.environ)
            if self._triton.checkpoints is not None:
                environment["TRITON_EMBED_CHECKPOINTS"] = str(self._triton.checkpoints)
            self._process = await asyncio.create_subprocess_exec(
                *self._triton.command(),
                env=environment,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
            await self._relay(self._process)
            code = await self._process.wait()
            self._kill_group()
            if self._stopping.is_set():
                return
            if not self._was_up:
                raise ServeError("tritonserver did not start; --log-level debug shows its whole log")
            if time.monotonic() - started > STEADY_SECONDS:
                pause = FIRST_PAUSE
            log.error("tritonserver ended with code %s, starting it again in %.1f s", code, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _relay(self, process: asyncio.subprocess.Process) -> None:
        """Triton's log until it ends: all of it when verbose, else what a person waits for."""
        assert process.stderr is not None  # noqa: S101 - asked for above
        while line := await process.stderr.readline():
            text = line.decode(errors="replace").rstrip()
            self._was_up = self._was_up or "Started GRPCInferenceService" in text
            if self._triton.verbose:
                log.info("%s", text)
            elif found := _PROGRESS.search(text):
                log.info("%s", next(group for group in found.groups() if group))
            elif text.startswith("E") and not _NOISE.search(text):
                log.error("%s", text)

    async def _announce(self, app: FastAPI) -> None:
        """One line when the first model answers, with a request to try."""
        while not (hasattr(app.state, "gateway") and app.state.gateway.registry.ready):
            if hasattr(app.state, "gateway"):
                app.state.gateway.registry.suspect()
            await asyncio.sleep(POLL_SECONDS)
        registry = app.state.gateway.registry
        ready = [registry.public_name(card) for card in registry.cards if card.info]
        body = json.dumps({"model": ready[0], "input": "Once upon a time"})
        key = " -H 'Authorization: Bearer YOUR_KEY'" if self._settings.api_key.get_secret_value() else ""
        url = f"http://{self._settings.host}:{self._settings.port}/v1/embeddings"
        log.info("ready: %s. Try: curl %s%s -d %s", ", ".join(ready), url, key, shlex.quote(body))

    async def _watch_stubs(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            process = self._process
            if process is None or process.returncode is not None:
                self._stubs.clear()
                continue
            alive = dict(_stubs_of(process.pid))
            self._regions.update(region for _, region in alive.values())
            for pid in [pid for pid in self._stubs if pid not in alive]:
                model = self._stubs.pop(pid)
                await asyncio.sleep(POLL_SECONDS)  # a server that is going down takes its stubs first
                if process.returncode is None and not self._stopping.is_set() and self._process is process:
                    log.error("the process of model %s died, loading it again", model)
                    await asyncio.to_thread(self._reload, model)
            self._stubs.update({pid: model for pid, (model, _) in alive.items()})

    def _reload(self, model: str) -> None:
        """Unload and load one model over Triton's HTTP API; a failure is logged and met again at the next poll."""
        for action in ("unload", "load"):
            url = f"http://{self._triton.address}:{self._triton.http_port}/v2/repository/models/{model}/{action}"
            name, _, value = self._triton.repository_header.partition("=")
            request = urllib.request.Request(url, data=b"{}", headers={name: value}, method="POST")
            try:
                with urllib.request.urlopen(request, timeout=120):  # noqa: S310 - loopback, built above
                    pass
            except (OSError, urllib.error.URLError) as error:
                log.error("could not %s %s: %s", action, model, error)

    async def _stop_triton(self) -> None:
        process = self._process
        if process is not None and process.returncode is None:
            self._regions.update(region for _, region in dict(_stubs_of(process.pid)).values())
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.communicate(), STOP_SECONDS)
        self._kill_group()
        for name in self._regions:
            (SHARED_MEMORY / name).unlink(missing_ok=True)

    def _kill_group(self) -> None:
        """Whatever is left of tritonserver's process group: stubs that outlived it."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


class _Gateway(uvicorn.Server):
    """uvicorn, with the signals left to the supervisor: it re-raises them before Triton could be stopped."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


# tritonserver's words for what a person waits for.
_PROGRESS = re.compile(r"^(tritonserver: .+)|(loading: [\w.-]+)|^[IE].*serve\.py:\d+\] \"(.+)\"$")
_NOISE = re.compile(r"CudaDriverHelper|NVML")  # a machine without a GPU


def _stubs_of(server: int) -> Iterator[tuple[int, tuple[str, str]]]:
    """(pid, (model, shared-memory region)) of each living stub of a server."""
    try:
        children = psutil.Process(server).children()
    except psutil.Error:
        return
    for child in children:
        try:
            words = child.cmdline()
            if words and Path(words[0]).name == STUB and child.status() != psutil.STATUS_ZOMBIE:
                yield child.pid, (Path(words[1]).parent.parent.name, words[2])
        except psutil.Error:
            continue


def _die_with_parent() -> None:
    """Ask Linux to end this process when its parent dies (PR_SET_PDEATHSIG), however that happens."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
