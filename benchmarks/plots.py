"""The result file as pictures: `python -m benchmarks.plots results/cpu.json` writes PNGs beside it."""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report import MANY, Cell, Place, Row, amount, find

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    Place("sentence-transformers-fp32", "bare"): "#9a9a9a",
    Place("padded-fastapi", "http"): "#d9a441",
    Place("ours", "bare"): "#7fb3d5",
    Place("ours", "http"): "#1f5f99",
    Place("ours", "grpc"): "#2e8b76",
}
WIDTH = 0.8 / len(COLOURS)
WORKLOADS = {"short": "short\n5–20 tokens", "mixed": "mixed\n8–256 tokens", "long": "long\n256 tokens"}


def throughput(result: dict[str, Any]) -> Figure:
    """As multiples of sentence-transformers in-process, for workloads differ 30-fold in sentences/s."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for place, colour in COLOURS.items():
        cells = [Cell(w, *((MANY, 1) if place.where == "bare" else (32, 8))) for w in WORKLOADS]
        rows = _rows(result, place, "sentences_per_s", cells)
        if shown := {x: row for x, row in rows.items() if row["ratio_to_st_fp32"]}:
            heights = [row["ratio_to_st_fp32"] for row in shown.values()]
            bars = axes.bar(list(shown), heights, WIDTH * 0.9, label=", ".join(place), color=colour)
            axes.bar_label(bars, [amount(row["median"]) for row in shown.values()], fontsize=7, padding=2)
    axes.axhline(1, color="#555", lw=0.6)
    title = f"Throughput: {MANY} texts a call in-process, 32 a request and 8 in flight served"
    axes.set(title=title, ylabel="times sentence-transformers fp32 (labels: sentences/s)")
    finish(figure, axes, list(WORKLOADS.values()), result, len(COLOURS))
    return figure


def latency(result: dict[str, Any]) -> Figure:
    """One text a request: p50 as a dot, a line up to p99."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    labels = {(w, c): f"{w}\n{c} in flight" for w in WORKLOADS if w != "mixed" for c in (1, 8)}
    for place, colour in COLOURS.items():
        cells = [Cell(w, 1, c) for w, c in labels]
        middle, high = (_rows(result, place, metric, cells) for metric in ("p50_ms", "p99_ms"))
        for x, row in middle.items():
            axes.plot([x, x], [row["median"], high[x]["median"]], color=colour, lw=1.5)
            axes.annotate(amount(row["median"]), (x + 0.03, row["median"]), size=7, va="top")
        if middle:
            dots = [row["median"] for row in middle.values()]
            axes.plot(list(middle), dots, "o", label=", ".join(place), color=colour)
    axes.set(title="Latency of one text: dot p50, line to p99", ylabel="ms, log scale", yscale="log")
    finish(figure, axes, list(labels.values()), result, len(COLOURS))
    return figure


def _rows(result: dict[str, Any], place: Place, metric: str, cells: list[Cell]) -> dict[float, Row]:
    """By x position: a group a cell, in it a slot a place."""
    slot = (list(COLOURS).index(place) - (len(COLOURS) - 1) / 2) * WIDTH
    found = {x + slot: find(result["rows"], place, metric, cell) for x, cell in enumerate(cells)}
    return {x: row for x, row in found.items() if row}


def finish(figure: Figure, axes: Axes, labels: list[str], result: dict[str, Any], engines: int) -> None:
    """What every plot has: its groups named, the machine and the day, the legend below."""
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.spines[["top", "right"]].set_visible(False)
    machine = result["machine"]
    axes.set_xlabel(f"{machine['cpu']}, {machine['cores']} cores, {result['timestamp'][:10]}", fontsize=8)
    figure.legend(loc="outside lower center", ncols=engines, frameon=False, fontsize=8)


def draw(path: Path, plots: Iterable[Callable[[dict[str, Any]], Figure]] | None = None) -> None:
    """A PNG beside the result file for each plot."""
    result = json.loads(path.read_text())
    for plot in plots or (throughput, latency):
        target = path.with_name(f"{path.stem}-{plot.__name__}.png")
        plot(result).savefig(target, dpi=150)
        print(f"written: {target}")


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
