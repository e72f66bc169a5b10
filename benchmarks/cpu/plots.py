"""Plots of the CPU result file: `python -m benchmarks.cpu.plots results/cpu.json` writes PNGs next to it."""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cpu.tables import LARGE_CALL, Cell, Contender, find_row, format_number, list_contenders, throughput_cell

mpl.use("Agg")
import matplotlib.pyplot as plt

# By prefix of the engine's name: gray and brown for others, blue for ours.
COLORS = {
    "sentence-transformers": "#9a9a9a",
    "padded-fastapi": "#6b6b6b",
    "infinity-emb": "#c7a252",
    "onnxruntime": "#c58b6b",
    "openvino": "#8a6fae",
    "ours": "#1f5f99",
}
SHADES = {"fp32": 0.45, "bf16": 0.75, "int8": 1.0}  # opacity of the color, by suffix of the engine's name
HATCHES = {"bare": "", "http": "//", "grpc": ".."}
WORKLOADS = {
    "short": "short: 5–20 tokens",
    "mixed": "mixed: 8–256 tokens",
    "long": "256 tokens",
    "full": "512 tokens",
}


def style(contender: Contender) -> dict[str, Any]:
    """Return the color and opacity of a contender."""
    color = next((c for name, c in COLORS.items() if contender.engine.startswith(name)), "#444444")
    return {"color": color, "alpha": SHADES.get(contender.engine.rpartition("-")[2], 1.0)}


def throughput(result: dict[str, Any]) -> Figure:
    """Plot sentences/s with the spread over the rounds: one panel per workload, one bar per contender."""
    rows = result["rows"]
    workloads = [w for w in WORKLOADS if any(r["workload"] == w and r["metric"] == "sentences_per_s" for r in rows)]
    figure, panels = plt.subplots(
        1, len(workloads), figsize=(3 + 3.2 * len(workloads), 6), layout="constrained", sharey=True
    )
    contenders = list_contenders(rows)[::-1]
    for axes, workload in zip([panels] if len(workloads) == 1 else panels, workloads, strict=True):
        for y, contender in enumerate(contenders):
            row = find_row(rows, contender, "sentences_per_s", throughput_cell(contender, workload))
            if row is None:
                continue
            error = [[row["median"] - row["min"]], [row["max"] - row["median"]]]
            bar = axes.barh(y, row["median"], 0.8, xerr=error, hatch=HATCHES[contender.where], **style(contender))
            ratio = f" ({row['ratio_to_st_fp32']:.1f}×)" if row["ratio_to_st_fp32"] else ""
            axes.bar_label(bar, [f"{format_number(row['median'])}{ratio}"], fontsize=7, padding=4)
        axes.set_yticks(range(len(contenders)), [", ".join(contender) for contender in contenders], fontsize=8)
        axes.set_title(WORKLOADS[workload], fontsize=9)
        axes.margins(x=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Sentences/s (× sentence-transformers fp32): {LARGE_CALL} texts per call in-process, 32 of 512 tokens;"
        " served 32 per request and 8 in flight",
        fontsize=10,
    )
    _add_machine(figure, result)
    return figure


def latency(result: dict[str, Any]) -> Figure:
    """Plot the latency of one text per request: a mark at p50 and a line to p99, by requests in flight."""
    rows = result["rows"]
    labels = {
        ("short", 1): "one short text",
        ("short", 8): "short, 8 in flight",
        ("short", 32): "short, 32 in flight",
        ("long", 1): "one of 256 tokens",
    }
    contenders = list_contenders(rows)
    figure, axes = plt.subplots(figsize=(11, 6), layout="constrained")
    for number, contender in enumerate(contenders):
        medians: dict[float, float] = {}
        for x, (workload, concurrency) in enumerate(labels):
            cell = Cell(workload, 1, concurrency)
            p50, p99 = (find_row(rows, contender, metric, cell) for metric in ("p50_ms", "p99_ms"))
            if p50 and p99:
                slot = x + 0.85 * ((number + 0.5) / len(contenders) - 0.5)
                medians[slot] = p50["median"]
                axes.plot([slot, slot], [p50["median"], p99["median"]], lw=1.5, **style(contender))
                axes.annotate(format_number(p50["median"]), (slot, p50["median"] * 0.93), size=6, va="top", ha="center")
        marker = {"bare": "o", "http": "s", "grpc": "D"}[contender.where]
        axes.plot(list(medians), list(medians.values()), marker, label=", ".join(contender), **style(contender))
    axes.set(title="Latency of one text: mark p50, line to p99", ylabel="ms, log scale", yscale="log")
    finish(figure, axes, list(labels.values()), result, 4)
    return figure


def accuracy(result: dict[str, Any]) -> Figure:
    """Plot error against speed on the mixed texts: best is at the bottom right."""
    rows = result["rows"]
    figure, axes = plt.subplots(figsize=(11, 7), layout="constrained")
    for contender in list_contenders(rows):
        speed = find_row(rows, contender, "sentences_per_s", throughput_cell(contender, "mixed"))
        cosine = find_row(rows, contender, "cosine_mean")
        if speed and cosine:
            error = max(1e-8, 1 - cosine["median"])  # zero cannot be shown on a log scale
            axes.scatter(
                speed["median"],
                error,
                60,
                marker={"bare": "o", "http": "s", "grpc": "D"}[contender.where],
                **style(contender),
            )
            label = contender.engine if contender.where == "bare" else ", ".join(contender)
            point, rotated = (speed["median"], error), {"rotation": 30, "rotation_mode": "anchor", "va": "center"}
            axes.annotate(label, point, xytext=(6, 5), textcoords="offset points", size=7, **rotated)
    axes.set(xscale="log", yscale="log", xlabel="sentences/s, mixed texts, log scale")
    axes.set_ylabel("1 − mean cosine to sentence-transformers fp32, log scale")
    axes.set_title("Accuracy against speed: lower is more exact, right is faster")
    axes.margins(x=0.2, y=0.15)  # room for the rotated labels
    axes.spines[["top", "right"]].set_visible(False)
    _add_machine(figure, result)
    return figure


def finish(figure: Figure, axes: Axes, labels: list[str], result: dict[str, Any], columns: int) -> None:
    """Finish a grouped plot: group labels, machine and date, legend below."""
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(_machine(result), fontsize=8)
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _add_machine(figure: Figure, result: dict[str, Any]) -> None:
    figure.supxlabel(_machine(result), fontsize=8)


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores, {result['timestamp'][:10]}"


def draw(path: Path, plots: Iterable[Callable[[dict[str, Any]], Figure]] | None = None) -> None:
    """Write a PNG next to the result file for each plot."""
    result = json.loads(path.read_text())
    for plot in plots or (throughput, latency, accuracy):
        target = path.with_name(f"{path.stem}-{plot.__name__}.png")
        plot(result).savefig(target, dpi=150)
        print(f"Wrote {target}")


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
