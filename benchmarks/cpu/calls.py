"""In-process engines: a worker that calls an engine directly, without a server in between."""

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report import summary
from benchmarks.worker import Vectors, serve_requests, vectors_reply

Encode = Callable[[list[str]], Vectors]
# (workload, texts per call) -> the function that encodes such calls, and the name of its execution mode or "".
SelectEncode = Callable[[str, int], tuple[Encode, str]]
Pools = dict[str, list[str]]  # texts by workload


def read_pools(path: str) -> Pools:
    """Read the texts of each workload from a JSON file."""
    pools: Pools = json.loads(Path(path).read_text())
    return pools


def measure(encode: Encode, pool: list[str], inputs: int, seconds: float, start: int) -> dict[str, Any]:
    """Make calls of `inputs` texts back to back until `seconds` have passed; at least one. `start`: first text."""
    latencies: list[float] = []
    begin = now = time.perf_counter()
    for first in itertools.count(start, inputs):
        encode([pool[i % len(pool)] for i in range(first, first + inputs)])
        latencies.append(time.perf_counter() - now)
        now = time.perf_counter()
        if now - begin >= seconds:
            break
    return summary(latencies, inputs, now - begin)


def serve(select: SelectEncode, pools: Pools) -> None:
    """Serve until stdin closes: {"texts"} returns vectors, a cell its figures, {} confirms that the engine is up."""

    def handle(*, texts: list[str] | None = None, workload: str = "", **cell: Any) -> dict[str, Any]:
        if texts is not None:
            return vectors_reply(select("mixed", len(texts))[0](texts))
        if not workload:
            return {}
        del cell["concurrency"]  # always 1 in-process
        encode, mode = select(workload, cell["inputs"])
        return measure(encode, pools[workload], **cell) | ({"way": mode} if mode else {})

    serve_requests(handle)
