"""docs/benchmarks.md, written from the result files: `python -m benchmarks.document`.

Every benchmark calls `write` after it has written its result file, so the page never disagrees with `results/`.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.cpu import tables as cpu_tables
from benchmarks.cpu import targets
from benchmarks.families import tables as families_tables
from benchmarks.report import RESULTS, ROOT, markdown_table

PAGE = ROOT / "docs" / "benchmarks.md"

Result = dict[str, Any]

INTRODUCTION = """# Benchmarks

<!-- Written by `python -m benchmarks.document` from benchmarks/results/*.json. Do not edit. -->

Every figure below comes from one run of the command next to it, on the machine and versions next to it. Competitors run
in the same run, in turns with this server, on the same weights and texts, each with the batch size that suits it best.
Figures are medians; ratios are computed per round. Small requests vary by half from run to run on a shared machine.

**No GPU has run this server yet**, so there is no GPU figure. Real weights were used for all-MiniLM-L6-v2 alone; the
other shapes have random weights.
"""


def write(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Write the page."""
    page.write_text(render(results))


def render(results: Path = RESULTS) -> str:
    """Return the page: one section per result file."""
    parts = [INTRODUCTION]
    for name, (title, section) in SECTIONS.items():
        result = json.loads((results / f"{name}.json").read_text())
        parts.append(f"## {title}\n\n{_provenance(name, result)}\n\n{section(result)}\n")
    return "\n".join(parts)


def _provenance(name: str, result: Result) -> str:
    """Return the hardware, versions, command and commit of a result."""
    machine = result["machine"]
    versions = result["versions"].get(".venv", result["versions"])  # one environment, or several by directory
    packages = ", ".join(f"{package} {versions[package]}" for package in ("torch", "transformers", "tritonclient"))
    features = ", ".join(machine["features"])
    return (
        f"`{result['command']}`, commit {result['commit']}, {result['timestamp'][:10]}. {machine['cores']} cores of "
        f"{machine['cpu']} ({features}), {machine['memory_gb']:.0f} GB; Python {versions['python']}, {packages}. "
        f"Everything measured: [`{name}.json`](../benchmarks/results/{name}.json)."
    )


def _cpu(result: Result) -> str:
    rows = result["rows"]
    met = "\n".join(f"- {line}" for line in targets.expectations(rows, result["machine"]))
    return "\n\n".join(
        [
            "In brackets: the ratio to sentence-transformers in fp32 with its lowest and highest round. Cosines and "
            "neighbors (the share of the ten nearest that agree) are against sentence-transformers on 1,000 texts.",
            cpu_tables.table(rows),
            cpu_tables.served_table(rows),
            _image("Throughput by workload", "cpu-throughput"),
            _image("Accuracy against speed", "cpu-accuracy"),
            _image("Latency", "cpu-latency"),
            f"Targets of this run:\n\n{met}",
        ]
    )


def _ceiling(result: Result) -> str:
    lines = [["shape", "workload", "products alone, GFLOP/s", "tokens/s", "share of it", "with attention's products"]]
    for row in result["rows"]:
        figures = [f"{row[key]['median']:,.0f}" for key in ("gemm_gflop_per_s", "tokens_per_s")]
        shares = [_spread(row[key]) for key in ("share", "share_with_attention")]
        lines.append([row["shape"], f"{row['workload']}, {row['dtype']}", *figures, *shares])
    text = "How much of what oneDNN's matrix products reach alone a whole forward pass reaches."
    return f"{text}\n\n{markdown_table(lines)}"


def _scheduling(result: Result) -> str:
    lines = [["tokens per pass", "load", "bulk priority", "callers", "p50, ms", "p99, ms", "bulk inputs/s"]]
    for row in result["rows"]:
        if row["stage"] == "fairness":
            budget = f"{row['budget']:,}" if row["budget"] else "default"
            times = [f"{row[key]:.1f}" if key in row else "–" for key in ("p50_ms", "p99_ms")]
            bulk = f"{row['inputs_per_s']:.0f}" if "inputs_per_s" in row else "–"
            priority, callers = row.get("priority", "–"), str(row.get("callers", "–"))
            lines.append([budget, row["what"], priority, callers, *times, bulk])
    pictures = [_image("Fairness", "scheduling-fairness"), _image("Token budgets", "scheduling-budget")]
    text = "One short query after another, while requests of 2,048 inputs come back to back."
    return "\n\n".join([text, markdown_table(lines), *pictures])


def _families(result: Result) -> str:
    rows = result["rows"]
    return "\n\n".join(
        [
            "Real shapes with random weights. Ratios are to transformers in the same dtype, with rows sorted and "
            "padded in small batches on its side.",
            families_tables.speed_table(rows),
            "Memory in MB, and seconds from the start of the process to its first vector:",
            families_tables.weight_table(rows),
            _image("Speed of the families", "families-speed"),
            _image("Memory of the families", "families-memory"),
        ]
    )


def _prefix(result: Result) -> str:
    lines = [["queries × (instruction + query) tokens", "dtype", "computed whole, ms", "prefix reused, ms", "speedup"]]
    for row in result["rows"]:
        low, high = row["ratio_range"]
        shape = f"{row['queries']} × ({row['instruction']} + {row['query']})"
        times = [f"{row[key]:,.0f}" for key in ("whole_ms", "behind_ms")]
        lines.append([shape, row["dtype"], *times, f"{row['ratio']:.2f}× ({low:.2f}–{high:.2f})"])
    cosine = min(row["least_cosine"] for row in result["rows"])
    return (
        "An instruction that was computed before is reused (`prefix_reuse`, causal families): Qwen3-Embedding-0.6B's "
        f"shape. The vectors agree to a cosine of {cosine:.5f} or more.\n\n{markdown_table(lines)}"
    )


def _gateway(result: Result) -> str:
    own = [["inputs", "gateway's own time, ms", "p99", "whole request, ms", "bare tritonclient call, ms"]]
    for row in result["share"].values():
        keys = ("own_ms", "own_p99_ms", "whole_ms", "bare_tritonclient_ms")
        own.append([str(row["inputs"]), *(f"{row[key]:.2f}" for key in keys)])
    rates = [["workers", "inputs", "callers", "requests/s", "p50, ms"]]
    for row in result["rates"]:
        inputs = str(result["share"][row["model"]]["inputs"])
        speed = f"{row['requests_per_s']:,.0f}"
        rates.append([str(row["workers"]), inputs, str(row["callers"]), speed, f"{row['p50_ms']:.1f}"])
    return (
        "Load and a model that computes nothing run on the same cores. 32 inputs are answered as base64 of 1,024 "
        f"values each.\n\n{markdown_table(own)}\n\n{markdown_table(rates)}"
    )


def _faults(result: Result) -> str:
    lines = [["killed", "answers again after, s", "longest request, s", "statuses"]]
    for row in result["kills"]:
        statuses = ", ".join(f"{status}: {count}" for status, count in row["statuses"].items())
        times = [f"{row[key]:.1f}" for key in ("answers_again_after_s", "longest_request_s")]
        lines.append([row["killed"], *times, statuses])
    left = len(result["processes_left"]) + len(result["shared_memory_left"])
    return (
        f"`kill -9` under the load of eight callers. The stop afterwards took {result['stop_seconds']:.1f} s and left "
        f"{left} processes or shared memory segments.\n\n{markdown_table(lines)}"
    )


def _soak(result: Result) -> str:
    statuses = ", ".join(f"{status}: {count:,}" for status, count in result["statuses"].items())
    return (
        f"{result['seconds'] / 60:.0f} minutes of {result['callers']} callers mixing good and bad traffic at "
        f"{', '.join(result['models'])}: {result['requests']:,} requests, {result['vectors_checked']:,} vectors "
        f"compared with sentence-transformers or transformers (lowest cosine {result['worst_cosine']:.7f}), "
        f"{len(result['failed'])} failures. Answers by status: {statuses}."
    )


def _overload(result: Result) -> str:
    lines = [["load", "requests/s", "goodput, share of the peak", "p99 of a query, share of its idle p99"]]
    lines[0] += [
        "fast again after, s",
        "accepted and timed out",
        "answered / refused: query",
        "page",
        "document",
        "bulk",
    ]
    for row in result["rows"]:
        ratio = "–" if row["query_p99_to_idle"] is None else f"{row['query_p99_to_idle']:.1f}"
        figures = [f"{row['requests_per_s']:.0f}", f"{row['goodput_to_peak']:.2f}", ratio]
        outcomes = [
            f"{kind['statuses'].get('200', 0):,} / {kind['statuses'].get('429', 0):,}" for kind in row["kinds"].values()
        ]
        recovered, late = f"{row['recovered_after_s']:.1f}", str(row["timed_out"])
        lines.append([f"{row['multiple']}×", *figures, recovered, late, *outcomes])
    mix = ", ".join(f"{kind['share']:.0%} of {kind['inputs']}" for kind in result["mix"])
    memory = [row["memory_mb"] for row in result["rows"]]
    return (
        f"Requests arrive at random for {result['seconds']:.0f} s at multiples of the rate that can be served, however "
        f"many wait: {mix} inputs. Goodput counts an answered request as the time that it takes when only requests of "
        f"its size are sent. One query takes {result['idle_query']['p50_ms']:.1f} ms on the idle server (p99 "
        f"{result['idle_query']['p99_ms']:.1f} ms). Memory of all processes: {memory[0][0]:,.0f} MB at the start, "
        f"{memory[-1][-1]:,.0f} MB at the end, {max(map(max, memory)):,.0f} MB at most.\n\n{markdown_table(lines)}\n\n"
        f"{_image('Goodput under overload', 'overload-goodput')}"
    )


def _image(title: str, name: str) -> str:
    return f"![{title}](../benchmarks/results/{name}.png)"


def _spread(figure: Mapping[str, float]) -> str:
    return f"{figure['median']:.2f} ({figure['min']:.2f}–{figure['max']:.2f})"


SECTIONS: dict[str, tuple[str, Callable[[Result], str]]] = {
    "cpu": ("One machine's CPU, next to its competitors", _cpu),
    "families": ("The families at their real shapes", _families),
    "ceiling": ("Share of the machine's ceiling", _ceiling),
    "scheduling": ("Queries under bulk load", _scheduling),
    "overload": ("Under overload", _overload),
    "prefix": ("Reuse of instructions", _prefix),
    "gateway": ("The gateway alone", _gateway),
    "faults": ("After a crash", _faults),
    "soak": ("Soak", _soak),
}

if __name__ == "__main__":
    write()
