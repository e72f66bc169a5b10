"""A Python module in a process of its own that answers questions: JSON lines in, JSON lines out."""

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
    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log

    def ask(self, **question: Any) -> dict[str, Any]:
        """RuntimeError with the end of its log when the worker has ended."""
        assert self.process.stdin
        assert self.process.stdout
        with suppress(BrokenPipeError):
            print(json.dumps(question), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.log.stem} ended; its log ends\n{tail(self.log)}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def vectors(self, texts: list[str], **question: Any) -> Vectors:
        encoded = self.ask(texts=texts, **question)["vectors"]
        return np.stack([np.frombuffer(base64.b64decode(vector), "<f4") for vector in encoded])

    def many_vectors(self, texts: list[str], at_a_time: int, **question: Any) -> Vectors:
        """In several questions: a server limits the texts of one."""
        parts = (texts[first : first + at_a_time] for first in range(0, len(texts), at_a_time))
        return np.concatenate([self.vectors(part, **question) for part in parts])


def vectors_reply(vectors: Vectors) -> dict[str, Any]:
    return {"vectors": [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]}


@contextmanager
def worker(module: str, *arguments: str, logs: Path, python: str = sys.executable) -> Iterator[Worker]:
    """`python -m module arguments`, ended with the block; `python` may be that of another environment."""
    log = logs / f"{'-'.join([module, *(Path(a).stem for a in arguments)])}.log"
    command = [python, "-m", module, *arguments]
    with running(command, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Worker(process, log)


def answer(handle: Callable[..., dict[str, Any]]) -> None:
    """The worker's side: one reply a question until stdin closes. What libraries print goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(handle(**json.loads(line))), file=replies, flush=True)
