"""Worker processes: a Python module run in a separate process that reads JSON lines and writes JSON lines."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.processes import running, tail

Vectors = npt.NDArray[np.float32]  # [texts, dimensions]


class Worker:
    """A running worker process, as seen by the benchmark."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log

    def call(self, **request: Any) -> dict[str, Any]:
        """Send one request and return the reply.

        Raises:
            RuntimeError: The worker has ended; the message holds the end of its log.
        """
        assert self.process.stdin
        assert self.process.stdout
        with suppress(BrokenPipeError):
            print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"Worker {self.log.stem} ended unexpectedly. End of its log:\n{tail(self.log)}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def vectors(self, texts: list[str], **request: Any) -> Vectors:
        """Return the [texts, dimensions] vectors of one call."""
        encoded = self.call(texts=texts, **request)["vectors"]
        return np.stack([np.frombuffer(base64.b64decode(vector), "<f4") for vector in encoded])

    def batched_vectors(self, texts: list[str], batch_size: int, **request: Any) -> Vectors:
        """Return the vectors of `texts`, `batch_size` texts per call: servers limit the texts of one request."""
        batches = (texts[start : start + batch_size] for start in range(0, len(texts), batch_size))
        return np.concatenate([self.vectors(batch, **request) for batch in batches])


def vectors_reply(vectors: Vectors) -> dict[str, Any]:
    """Encode vectors as a JSON-serializable reply: one base64 string of little-endian float32 per vector."""
    return {"vectors": [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]}


@contextmanager
def worker(module: str, *arguments: str, logs: Path, python: str = sys.executable) -> Iterator[Worker]:
    """Run `python -m module arguments` until the block ends. `python` may belong to another environment."""
    log = logs / f"{'-'.join([module, *(Path(a).stem for a in arguments)])}.log"
    command = [python, "-m", module, *arguments]
    with running(command, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Worker(process, log)


def serve_requests(handle: Callable[..., dict[str, Any]]) -> None:
    """Serve inside the worker: write one reply per request until stdin closes. Output of libraries goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(handle(**json.loads(line))), file=replies, flush=True)
