"""Compare the speed of two checkouts over HTTP, in turns, so that a slow minute of the machine slows both.

    python -m benchmarks.gateway.turns OTHER [--rounds 30]

OTHER is a checkout with an environment of its own (`git worktree add ../other COMMIT`, then `make install` in it). Both
serve MiniLM in fp32. Ratios are this checkout's time divided by the other's: the median and quartiles of the rounds.
"""

import argparse
import http.client
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.processes import exit_on_signal, free_port, running, wait_until_ready
from benchmarks.report import ROOT, machine

CALLERS = 8
STARTS = 5


class Server:
    """A running server, and one open connection per caller."""

    def __init__(self, port: int) -> None:
        self._connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=60) for _ in range(CALLERS)]
        self._numbers = itertools.count()

    def send(self, inputs: int, caller: int = 0) -> float:
        """Send one request of new short texts and return its seconds."""
        body = json.dumps({"input": [f"{next(self._numbers)} a short text about cats" for _ in range(inputs)]})
        connection = self._connections[caller]
        began = time.perf_counter()
        connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read()
        if response.status != 200:
            raise RuntimeError(content.decode())
        return time.perf_counter() - began

    def send_from_all(self) -> float:
        """Send four requests of one text from each caller at once and return the seconds of all."""
        began = time.perf_counter()
        with ThreadPoolExecutor(CALLERS) as pool:
            list(pool.map(lambda caller: [self.send(1, caller) for _ in range(4)], range(CALLERS)))
        return time.perf_counter() - began


MEASURES: dict[str, Callable[[Server], float]] = {
    "1 text": lambda server: statistics.median(server.send(1) for _ in range(12)),
    "32 texts": lambda server: statistics.median(server.send(32) for _ in range(3)),
    f"{CALLERS} callers, 1 text each": Server.send_from_all,
}


@contextmanager
def serving(checkout: Path, log: Path) -> Iterator[tuple[Server, float]]:
    """Serve a checkout; yield the server and the seconds of its start."""
    ports = [free_port() for _ in range(4)]
    names = ("port", "triton-http-port", "triton-grpc-port", "triton-metrics-port")
    flags = [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
    command = [str(checkout / ".venv/bin/triton-embed"), "serve", "--model=minilm", "--dtype=float32", *flags]
    with running(command, log, cwd=checkout) as process:
        seconds = wait_until_ready(f"http://127.0.0.1:{ports[0]}/ready", process, log)
        yield Server(ports[0]), seconds


def start_seconds(checkout: Path, log: Path) -> float:
    with serving(checkout, log) as (_, seconds):
        return seconds


def compare(name: str, measure: Callable[[str], float], rounds: int) -> str:
    """Measure "this" and "other" in turns; return a line of a table."""
    seconds: dict[str, list[float]] = {"this": [], "other": []}
    for i in range(rounds):
        for which in ("this", "other") if i % 2 else ("other", "this"):
            seconds[which].append(measure(which))
    ratios = [this / other for this, other in zip(seconds["this"], seconds["other"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    other, this = (1_000 * statistics.median(seconds[which]) for which in ("other", "this"))
    return f"| {name} | {other:.2f} | {this:.2f} | {middle:.3f} ({low:.3f}-{high:.3f}) |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    exit_on_signal()
    checkouts = {"this": ROOT, "other": options.other.resolve()}
    print(json.dumps(machine()))
    print("| median of the rounds | other, ms | this, ms | ratio (quartiles) |\n|---|---|---|---|")
    with ExitStack() as stack, tempfile.TemporaryDirectory() as logs:
        log = {which: Path(logs, which) for which in checkouts}
        print(compare("start", lambda which: start_seconds(checkouts[which], log[which]), STARTS), flush=True)
        servers = {which: stack.enter_context(serving(path, log[which]))[0] for which, path in checkouts.items()}
        for name, measure in MEASURES.items():
            for server in servers.values():
                measure(server)
            print(compare(name, lambda which, m=measure: m(servers[which]), options.rounds), flush=True)  # type: ignore[misc]


if __name__ == "__main__":
    main()
