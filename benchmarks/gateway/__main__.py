"""Benchmark of the gateway alone, with an echo model: time spent in the gateway per request, and requests per second.

    python -m benchmarks.gateway [--seconds 5] [--workers 1 2]

The gateway's own time is measured in one process, on the ASGI app without a socket: the total time of a request minus
the wait for the model (stage `triton` of Server-Timing). The same request is sent by tritonclient alone, in turns.
Rates are measured over HTTP, with load, gateway and echo model in separate processes.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
from pathlib import Path

import uvloop

from benchmarks import report
from benchmarks.gateway.in_process import SHAPES, shares
from benchmarks.gateway.rates import rate, workers
from benchmarks.processes import exit_on_signal, free_port, running


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway", description=__doc__)
    parser.add_argument(
        "--count", type=int, default=1_000, help="requests per model that measure the gateway's own time"
    )
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--callers", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--out", type=Path, default=report.RESULTS / "gateway.json")
    options = parser.parse_args()
    exit_on_signal()
    result = report.header()
    with tempfile.TemporaryDirectory() as folder:
        logs, port = Path(folder), free_port()
        with running([sys.executable, "-m", "benchmarks.gateway.echo", str(port)], logs / "echo.log"):
            print("the gateway's own time, in process:", flush=True)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                result["share"] = runner.run(shares(port, options.count))
            for model, row in result["share"].items():
                own = f"own {row['own_ms']:.2f} ms (p99 {row['own_p99_ms']:.2f}, budget {row['budget_ms']})"
                bare = f"bare tritonclient {row['bare_tritonclient_ms']:.2f}"
                print(f"  {model}: {own}, total {row['whole_ms']:.2f}, {bare}", flush=True)
            result["rates"] = []
            for count in options.workers:
                with workers(count, port, logs) as http:
                    for model in SHAPES:
                        rounds = [rate(http, model, options.callers, options.seconds) for _ in range(options.rounds)]
                        row = {"workers": count, "model": model, "callers": options.callers} | {
                            key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]
                        }
                        result["rates"].append(row)
                        figures = f"{row['requests_per_s']:,.0f} requests/s, p50 {row['p50_ms']:.1f} ms"
                        print(f"  {count} worker(s), {model}: {figures}", flush=True)
    report.write(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
