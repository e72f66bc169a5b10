"""One tritonserver process: start it, relay its log, notice its death or that of a stub, and clean up.

tritonserver 2.51 never restarts a dead stub and keeps reporting its model as ready. Unloading and loading the model
restores it but loses requests in flight (measured: in 4 kills, 7 requests hung until their deadline, and the server
crashed once). So the death of a stub ends the server: every call in flight fails at once, and all models restart.
"""

import asyncio
import contextlib
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
STOP_SECONDS = 4.0
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Triton's Python backend puts its regions
STUB = "triton_python_backend_stub"
# A name and a value. No HTTP/1 or HTTP/2 header name contains a colon; Triton shows the name in its refusal.
IMPOSSIBLE_HEADER = "none: triton-embed serve closes it=-"

# Log lines that show progress, and lines that every machine without a GPU produces.
_LOADING = re.compile(r"\"loading: ([\w.-]+):\d+\"")
_PROGRESS = re.compile(r"(loading: [\w.-]+)|^[IE].*serve\.py:\d+\] \"(.+)\"$")
_REFUSAL = "tritonserver: "  # begins the launcher's one sentence
_NOISE = re.compile(r"CudaDriverHelper|NVML")
_LOADED = re.compile(r"successfully loaded '([^']+)'")
# A model that did not load, and one that loaded without a checkpoint: its name and the reason.
_FAILED = re.compile(r"failed to load '([^']+)' version \d+: (?:Internal: )?(?:\w+Error: )?(.+?)(?:\\n\\nAt:|\"$|$)")
_NO_CHECKPOINT = re.compile(r"\"Model '([^']+)' has (no checkpoint\. .+?)\\n")
_DIED = re.compile(r"[Ss]tub process.* (not healthy|exited|died)")


# Sets PR_SET_PDEATHSIG, which survives execv. Not in `preexec_fn`: Python code between fork and exec can crash in a
# process with gRPC's threads.
_TIE = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, int(sys.argv[1]))
if os.getppid() == int(sys.argv[2]):
    os.execv(sys.argv[3], sys.argv[3:])
"""


def tied_to_this_process(command: Sequence[str]) -> list[str]:
    """Return a command that runs `command` and gets SIGTERM from Linux when this process ends for any reason."""
    return [sys.executable, "-ISc", _TIE, str(int(signal.SIGTERM)), str(os.getpid()), *command]


@dataclass(frozen=True)
class TritonOptions:
    """How to start tritonserver: all models of which repository, on which loopback ports.

    `http_port` may be 0: then tritonserver does not serve HTTP, which the gateway does not need.
    """

    repository: Path
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    address: str = "127.0.0.1"
    verbose: bool = False
    checkpoints: Path | None = None
    allow_shared_memory: bool = False
    load_seconds: float = 600.0  # without progress, after which a model counts as hanging

    @property
    def ports(self) -> dict[str, int]:
        """The port of each service that is open."""
        http = {"http": self.http_port} if self.http_port else {}
        return {**http, "grpc": self.grpc_port, "metrics": self.metrics_port}

    def command(self) -> list[str]:
        """Return the command line. `tritonserver` is our launcher, in the directory of this Python.

        Without model control nothing can be loaded through the ports: loading a model runs the Python code in the
        request, and a key to restrict it would stand on the command line, which every user of the machine can read.

        By name and for anybody, the shared-memory API maps memory of this user, the logging API writes what callers
        send to the log, and the trace API slows the server down. They are restricted to requests with a header that no
        request can have.
        """
        closed = ["trace", "logging"] + ["shared-memory"] * (not self.allow_shared_memory)
        restriction = f"{','.join(closed)}:{IMPOSSIBLE_HEADER}"
        return [
            str(Path(sys.executable).with_name("tritonserver")),
            f"--model-repository={self.repository}",
            "--model-control-mode=none",
            "--exit-on-error=false",
            f"--allow-http={str(bool(self.http_port)).lower()}",
            f"--http-restricted-api={restriction}",
            f"--grpc-restricted-protocol={restriction}",
            *(f"--{service}-address={self.address}" for service in self.ports),
            *(f"--{service}-port={port}" for service, port in self.ports.items()),
            f"--exit-timeout-secs={STOP_SECONDS:.0f}",
        ]

    def environment(self) -> dict[str, str]:
        """Return this process's environment with the location of checkpoints."""
        added = {} if self.checkpoints is None else {"TRITON_EMBED_CHECKPOINTS": str(self.checkpoints)}
        return {**os.environ, **added}


class TritonProcess:
    """A running tritonserver. Create it with `start`, then await `wait_for_end`.

    Attributes:
        was_up: Whether all models were loaded or had failed to load, and the server answered.
        failures: Why each of the other models cannot serve.
        died_loading: The model whose process died while it loaded, which may succeed when it is tried again.
        refusal: Why the launcher did not start the server; empty if it did.
    """

    def __init__(self, process: asyncio.subprocess.Process, options: TritonOptions) -> None:
        self.was_up = False
        self.failures: dict[str, str] = {}
        self.died_loading: str | None = None
        self.refusal = ""
        self._process = process
        self._verbose = options.verbose
        self._load_seconds = options.load_seconds
        self._progress = time.monotonic()  # of the last line of the log
        self._loading: set[str] = set()
        self._hanging: set[str] = set()  # killed for it
        self._loaded: set[str] = set()
        self._regions: set[str] = set()  # shared memory of its stubs
        self._stubs: dict[str, set[psutil.Process]] = {}  # of each model that has loaded

    @property
    def serves_nothing(self) -> bool:
        """Whether the server is up and no model can serve."""
        return self.was_up and not self._loaded - self.failures.keys()

    @classmethod
    async def start(cls, options: TritonOptions) -> "TritonProcess":
        """Start tritonserver in a new process group. It ends when this process ends for any reason."""
        process = await asyncio.create_subprocess_exec(
            *tied_to_this_process(options.command()),
            env=options.environment(),
            cwd="/",  # stubs import modules from it before all others: it must not be a directory that others write to
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        return cls(process, options)

    async def wait_for_end(self, given_up: Collection[str] = ()) -> str:
        """Wait until the server or the stub of a model ends, or no model can serve.

        Args:
            given_up: Models that may die while they load without an end of the server.

        Returns:
            What happened, as a clause for a message.
        """
        relay = asyncio.create_task(self._relay())
        ended = asyncio.create_task(self._process.wait())
        try:
            # Poll, because the end of stderr does not show that the server ended: surviving stubs keep the pipe open.
            while (code := self._process.returncode) is None:
                if (model := self._dead_model()) is not None and self._process.returncode is None:
                    return f"the process of model {model} died"
                if self.was_up and self.died_loading not in (None, *given_up):
                    return f"the process of model {self.died_loading} died while it loaded"
                hangs = not self.was_up and time.monotonic() - self._progress > self._load_seconds
                if hangs and not self._kill_hanging():
                    return f"tritonserver made no progress in {self._load_seconds:g} s"
                if self.serves_nothing:
                    reasons = "; ".join(f"{model}: {reason}" for model, reason in self.failures.items())
                    return f"no model can be served ({reasons})"
                await asyncio.wait([relay, ended], timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait([relay], timeout=POLL_SECONDS)
            return self.refusal or f"tritonserver ended with code {code}"
        finally:
            relay.cancel()
            ended.cancel()

    async def stop(self) -> None:
        """Stop the server, drained if that takes less than STOP_SECONDS. Remove its processes and shared memory."""
        self._dead_model()  # for its record of the shared memory, which `kill` removes
        if self._process.returncode is None:
            self._process.terminate()
            relay = asyncio.create_task(self._relay())  # a full pipe would block the server
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
            relay.cancel()
        self.kill()
        await self._process.wait()

    def kill(self) -> None:
        """Kill the server and its stubs at once, and remove their shared memory."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for name in self._regions:
            (SHARED_MEMORY / name).unlink(missing_ok=True)

    async def _relay(self) -> None:
        """Log the server's output until it ends: everything if verbose, else progress and errors."""
        assert self._process.stderr is not None  # noqa: S101 - `start` requests a pipe
        while line := await self._process.stderr.readline():
            text = line.decode(errors="replace").rstrip()
            self._progress = time.monotonic()
            self._loading.update(_LOADING.findall(text))
            self._loaded.update(_LOADED.findall(text))
            self.failures.update(_NO_CHECKPOINT.findall(text))
            if failed := _FAILED.search(text):
                self._record_failure(*failed.groups())
            if "Started GRPCInferenceService" in text:
                self.was_up = True
                if missing := sorted(self.failures.keys() & self._loaded):
                    log.info("not served, because they have no checkpoint: %s", ", ".join(missing))
            if text.startswith(_REFUSAL):
                self.refusal = text.removeprefix(_REFUSAL)
            elif self._verbose:
                log.info("%s", text)
            elif failed:
                log.error("model %s cannot be served: %s", failed[1], self.failures[failed[1]])
            elif match := _PROGRESS.search(text):
                log.info("%s", next(group for group in match.groups() if group))
            elif text.startswith("E") and not _NOISE.search(text):
                log.error("%s", text)

    def _record_failure(self, model: str, reason: str) -> None:
        if model in self._hanging:
            reason = f"it made no progress in {self._load_seconds:g} s; TRITON_EMBED_LOAD_TIMEOUT allows more"
        elif _DIED.search(reason):
            reason = "its process died while it loaded, most often because memory ran out"
            self.died_loading = model
        self.failures[model] = reason

    def _kill_hanging(self) -> bool:
        """Kill the process of each model that is still loading, so that Triton goes on. Return whether there is one."""
        self._progress = time.monotonic()
        self._hanging |= self._loading - self._loaded - self.failures.keys()
        stubs = [stub for stub, (model, _) in _stubs_of(self._process.pid) if model in self._hanging]
        for stub in stubs:
            with contextlib.suppress(psutil.NoSuchProcess):
                stub.kill()
        return bool(stubs)

    def _dead_model(self) -> str | None:
        """Return a loaded model one of whose stubs has ended, if there is one. Record the shared memory of all stubs.

        A model has a stub for each of its instances; tritonserver goes on without one that ends.
        """
        alive: dict[str, set[psutil.Process]] = {model: set() for model in self._loaded}
        for stub, (model, region) in _stubs_of(self._process.pid):
            self._regions.add(region)
            if model in alive:
                alive[model].add(stub)
        for model, stubs in alive.items():
            seen = self._stubs.setdefault(model, set())
            seen |= stubs
            if not stubs or stubs < seen:
                return model
        return None


def _stubs_of(server: int) -> Iterator[tuple[psutil.Process, tuple[str, str]]]:
    """Yield each living stub of a server, with its model and its shared-memory region."""
    try:
        children = psutil.Process(server).children()
    except psutil.Error:
        return
    for child in children:
        try:
            words = child.cmdline()
        except psutil.Error:  # gone, or a zombie
            continue
        if len(words) > 2 and Path(words[0]).name == STUB:  # without arguments it is only tested
            yield child, (Path(words[1]).parent.parent.name, words[2])
