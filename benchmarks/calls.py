"""An engine called in its own process, as a worker: texts in, vectors out, nothing served."""

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.summary import summary
from benchmarks.worker import Vectors, answer, vectors_reply

Encode = Callable[[list[str]], Vectors]
# How an engine takes calls of so many texts of a workload, and the name of that way where it has several.
Engine = Callable[[str, int], tuple[Encode, str]]
Pools = dict[str, list[str]]  # texts by workload


def read_pools(path: str) -> Pools:
    pools: Pools = json.loads(Path(path).read_text())
    return pools


def measure(encode: Encode, pool: list[str], inputs: int, seconds: float, start: int) -> dict[str, Any]:
    """Calls of `inputs` texts, back to back, until `seconds` have passed; at least one."""
    latencies: list[float] = []
    begin = now = time.perf_counter()
    for first in itertools.count(start, inputs):
        encode([pool[i % len(pool)] for i in range(first, first + inputs)])
        latencies.append(time.perf_counter() - now)
        now = time.perf_counter()
        if now - begin >= seconds:
            break
    return summary(latencies, inputs, now - begin)


def serve(engine: Engine, pools: Pools) -> None:
    """Answer until stdin closes: {"texts"} with vectors, a cell with its figures, {} once the engine is loaded."""

    def handle(*, texts: list[str] | None = None, workload: str = "", **cell: Any) -> dict[str, Any]:
        if texts is not None:
            return vectors_reply(engine("mixed", len(texts))[0](texts))
        if not workload:
            return {}
        del cell["concurrency"]  # in-process there is one caller
        encode, way = engine(workload, cell["inputs"])
        return measure(encode, pools[workload], **cell) | ({"way": way} if way else {})

    answer(handle)
