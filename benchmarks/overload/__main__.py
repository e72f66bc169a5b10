"""Goodput under overload: requests of four sizes arrive at 1, 2, 5 and 10 times the rate that can be served.

    python -m benchmarks.overload [--quick]

Goodput is the useful work per second: each answered request counts the seconds it takes when callers send that size
only. The peak is the goodput of the whole mix from a fixed number of callers, and the sustainable rate is what they are
served at. Then requests arrive at random times at multiples of that rate (an open loop: more arrive however many wait),
some of them with slow readers. Measuring begins after the first sixth, when as much is answered as is accepted: the
time from which no request has an answer yet would count as lost. After each load, single queries show when the server
is as fast as before, and the next load begins when all requests have an answer. The load is generated on the same
cores.
"""

import argparse
import asyncio
import collections
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import report, workloads
from benchmarks.overload.load import KINDS, Kind, Load, Reply, prepare
from benchmarks.processes import Stack, cpu_seconds_elsewhere, exit_on_signal, memory, serving_minilm

Row = dict[str, Any]

MULTIPLES = (1, 2, 5, 10)
CALLERS = 16  # of the closed loop
MAX_P99_RATIO = 3.0  # target: p99 of an accepted query, to its idle p99
MAX_RECOVERY_SECONDS = 2.0  # target
MEMORY_SECONDS = 5.0  # between two measurements


def milliseconds(replies: Sequence[Reply], q: float) -> float | None:
    """Return a percentile of the latencies of answered requests."""
    latencies = [1_000 * (reply.answered - reply.sent) for reply in replies if reply.status == "200"]
    return round(report.percentile(latencies, q), 2) if latencies else None


def work(replies: Sequence[Reply], capacity: dict[str, float], begin: float, end: float) -> float:
    """Return the goodput of the requests answered from `begin` until `end`: seconds of useful work per second."""
    answered = [reply.kind for reply in replies if reply.status == "200" and begin <= reply.answered < end]
    return sum(1 / capacity[kind] for kind in answered) / (end - begin)


def describe(replies: Sequence[Reply], kinds: Sequence[Kind]) -> Row:
    """Return the outcomes and latencies of each kind of request."""
    row: Row = {}
    for kind in kinds:
        of_kind = [reply for reply in replies if reply.kind == kind.name]
        row[kind.name] = {
            "statuses": dict(sorted(collections.Counter(reply.status for reply in of_kind).items())),
            "p50_ms": milliseconds(of_kind, 0.5),
            "p99_ms": milliseconds(of_kind, 0.99),
        }
    return row


async def megabytes(pid: int) -> float:
    """Return the memory of the server's processes; pages that they share count once."""
    usage = await asyncio.to_thread(memory, pid)
    return round(sum(process["pss"] for process in usage.values()), 1)


async def sample_memory(pid: int, samples: list[float]) -> None:
    """Measure memory until cancelled."""
    while True:
        samples.append(await megabytes(pid))
        await asyncio.sleep(MEMORY_SECONDS)


async def measure(stack: Stack, kinds: Sequence[Kind], seconds: float, multiples: Sequence[int]) -> Row:
    """Measure the idle latency, the capacity and the peak, and each multiple of the sustainable rate."""
    load = Load(stack.port, prepare(kinds, workloads.texts(512)))
    await load.closed(CALLERS, seconds / 16)  # warm-up
    await asyncio.sleep(1)
    begin = load.now()
    await load.queries(seconds / 8)
    idle = load.since(begin, load.now())
    capacity = {}
    for kind in kinds:
        begin = load.now()
        await load.closed(max(1, min(CALLERS, 256 // kind.inputs)), seconds / 8, kind.name)
        answered = sum(reply.status == "200" for reply in load.since(begin, load.now()))
        capacity[kind.name] = answered / (load.now() - begin)
    begin = load.now()
    await load.closed(CALLERS, seconds / 2)
    end = load.now()
    peak = work(load.since(begin, end), capacity, begin, end)
    rate = peak / sum(kind.share / capacity[kind.name] for kind in kinds)
    result: Row = {
        "idle_query": {"p50_ms": milliseconds(idle, 0.5), "p99_ms": milliseconds(idle, 0.99)},
        "capacity_requests_per_s": {kind: round(value, 2) for kind, value in capacity.items()},
        "peak": round(peak, 3),
        "sustainable_requests_per_s": round(rate, 1),
        "rows": [],
    }
    print(result, flush=True)
    for multiple in multiples:
        row = await overload(load, stack, multiple * rate, seconds, capacity, result)
        result["rows"].append({"multiple": multiple, **row})
        print(f"{multiple}x: {result['rows'][-1]}", flush=True)
    return result


async def overload(
    load: Load, stack: Stack, rate: float, seconds: float, capacity: dict[str, float], result: Row
) -> Row:
    """Measure one rate."""
    samples: list[float] = []
    other_cpu = cpu_seconds_elsewhere()
    sampling = asyncio.create_task(sample_memory(stack.process.pid, samples))
    waiting = await load.open(rate, seconds / 6)
    begin = load.now()
    waiting += await load.open(rate, seconds)
    end = load.now()
    sampling.cancel()
    other_cpu = cpu_seconds_elsewhere() - other_cpu
    await load.queries(2 * MAX_RECOVERY_SECONDS)
    queries = load.since(end, load.now())
    await asyncio.gather(*waiting)
    replies = load.since(begin, end)
    limit = MAX_P99_RATIO * result["idle_query"]["p99_ms"] / 1_000
    slow = [reply.answered - end for reply in queries if reply.status != "200" or reply.answered - reply.sent > limit]
    goodput = work(load.replies, capacity, begin, end)
    outcomes = describe(replies, load.requests.kinds)
    p99 = outcomes["query"]["p99_ms"]
    return {
        "requests_per_s": round(rate, 1),
        "goodput_to_peak": round(goodput / result["peak"], 3),
        "query_p99_to_idle": p99 and round(p99 / result["idle_query"]["p99_ms"], 2),
        "recovered_after_s": round(max(slow, default=0.0), 2),
        "timed_out": sum(reply.status in ("504", "timeout") for reply in replies),
        "memory_mb": samples,
        "kinds": outcomes,
        "goodput_by_second": [
            round(work(load.replies, capacity, begin + second, begin + second + 1), 3) for second in range(int(seconds))
        ],
        "cpu_percent_elsewhere": round(100 * other_cpu / (end - begin)),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overload", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="functional test: a few seconds of small requests, one multiple")
    add("--seconds", type=float, default=120.0, help="of each load (default: %(default)g)")
    add("--multiples", type=int, nargs="+", default=MULTIPLES, help="of the sustainable rate (default: 1 2 5 10)")
    add("--out", type=Path, default=report.RESULTS / "overload.json", help="result file (default: %(default)s)")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.multiples = 2.0, (20,)
    return options


def main() -> None:
    options = arguments()
    exit_on_signal()
    kinds = [kind._replace(inputs=max(1, kind.inputs // 8), workload="short") for kind in KINDS]
    kinds = kinds if options.quick else [*KINDS]
    header = report.header()
    with (
        tempfile.TemporaryDirectory() as scratch,
        serving_minilm(Path(scratch)) as stack,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        result = runner.run(measure(stack, kinds, options.seconds, options.multiples))
    report.write(options.out, header | {"seconds": options.seconds, "mix": [kind._asdict() for kind in kinds]} | result)
    from benchmarks.overload.plots import PLOTS  # imported here: only the plots need matplotlib
    from benchmarks.plots import draw

    draw(options.out, PLOTS)


if __name__ == "__main__":
    main()
