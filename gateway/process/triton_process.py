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
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
STOP_SECONDS = 4.0
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Triton's Python backend puts its regions
STUB = "triton_python_backend_stub"
# Parts of Triton's API that end the server or silence its log. The header that would unlock them cannot be sent: its
# name has upper case, which gRPC does not have, and its value is a line break, which ends a header in HTTP.
_RESTRICTED = "shared-memory,trace,logging:LOCKED=\n"

# Log lines that show progress, and lines that every machine without a GPU produces.
_PROGRESS = re.compile(r"^(tritonserver: .+)|(loading: [\w.-]+)|^[IE].*serve\.py:\d+\] \"(.+)\"$")
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
    """How to start tritonserver: all models of which repository, on which loopback ports."""

    repository: Path
    http_port: int = 8000  # 0: Triton does not serve HTTP
    grpc_port: int = 8001
    metrics_port: int = 8002
    address: str = "127.0.0.1"
    verbose: bool = False
    checkpoints: Path | None = None

    @property
    def ports(self) -> dict[str, int]:
        """The port of each service that is on."""
        http = {"http": self.http_port} if self.http_port else {}
        return {**http, "grpc": self.grpc_port, "metrics": self.metrics_port}

    def command(self) -> list[str]:
        """Return the command line. `tritonserver` is our launcher, in the directory of this Python.

        Without model control nothing can be loaded through the ports: loading a model runs the Python code in the
        request, and a key to restrict it would stand on the command line, which every user of the machine can read.
        """
        return [
            str(Path(sys.executable).with_name("tritonserver")),
            f"--model-repository={self.repository}",
            "--model-control-mode=none",
            "--exit-on-error=false",
            *(f"--{service}-address={self.address}" for service in self.ports),
            *(f"--{service}-port={port}" for service, port in self.ports.items()),
            *(() if self.http_port else ("--allow-http=false",)),
            f"--http-restricted-api={_RESTRICTED}",
            f"--grpc-restricted-protocol={_RESTRICTED}",
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
    """

    def __init__(self, process: asyncio.subprocess.Process, verbose: bool) -> None:
        self.was_up = False
        self.failures: dict[str, str] = {}
        self.died_loading: str | None = None
        self._process = process
        self._verbose = verbose
        self._loaded: set[str] = set()
        self._regions: set[str] = set()  # shared memory of its stubs

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
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        return cls(process, options.verbose)

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
                if self.serves_nothing:
                    reasons = "; ".join(f"{model}: {reason}" for model, reason in self.failures.items())
                    return f"no model can be served ({reasons})"
                await asyncio.wait([relay, ended], timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            return f"tritonserver ended with code {code}"
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
            self._loaded.update(_LOADED.findall(text))
            self.failures.update(_NO_CHECKPOINT.findall(text))
            if failed := _FAILED.search(text):
                self.failures[failed[1]] = failed[2]
                if _DIED.search(failed[2]):
                    self.died_loading = failed[1]
            if "Started GRPCInferenceService" in text:
                self.was_up = True
                if missing := sorted(self.failures.keys() & self._loaded):
                    log.info("not served, because they have no checkpoint: %s", ", ".join(missing))
            if self._verbose:
                log.info("%s", text)
            elif failed:
                log.error("model %s cannot be served: %s", *failed.groups())
            elif match := _PROGRESS.search(text):
                log.info("%s", next(group for group in match.groups() if group))
            elif text.startswith("E") and not _NOISE.search(text):
                log.error("%s", text)

    def _dead_model(self) -> str | None:
        """Return a loaded model without a living stub, if there is one. Record the shared memory of all stubs."""
        stubs = dict(_stubs_of(self._process.pid))
        self._regions.update(stubs.values())
        alive = {Path(script).parent.parent.name for script in stubs}
        return next(iter(self._loaded - alive), None)


def _stubs_of(server: int) -> Iterator[tuple[str, str]]:
    """Yield (model.py, shared-memory region) of each living stub of a server."""
    try:
        children = psutil.Process(server).children()
    except psutil.Error:
        return
    for child in children:
        try:
            words = child.cmdline()
        except psutil.Error:  # gone, or a zombie
            continue
        if words and Path(words[0]).name == STUB:
            yield words[1], words[2]
