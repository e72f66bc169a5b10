"""The result file as pictures: `python -m benchmarks.plots results/cpu.json` writes PNGs beside it."""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report import MANY, Cell, Place, amount, find, many, places

mpl.use("Agg")
import matplotlib.pyplot as plt

# By what an engine's name begins with: greys and browns for others, blue for ours.
COLOURS = {
    "sentence-transformers": "#9a9a9a",
    "padded-fastapi": "#6b6b6b",
    "infinity-emb": "#c7a252",
    "onnxruntime": "#c58b6b",
    "openvino": "#8a6fae",
    "ours": "#1f5f99",
}
SHADES = {"fp32": 0.45, "bf16": 0.75, "int8": 1.0}  # of the colour, by what a name ends with
HATCHES = {"bare": "", "http": "//", "grpc": ".."}
WORKLOADS = {
    "short": "short: 5–20 tokens",
    "mixed": "mixed: 8–256 tokens",
    "long": "256 tokens",
    "full": "512 tokens",
}


def style(place: Place) -> dict[str, Any]:
    colour = next((c for name, c in COLOURS.items() if place.engine.startswith(name)), "#444444")
    return {"color": colour, "alpha": SHADES.get(place.engine.rpartition("-")[2], 1.0)}


def throughput(result: dict[str, Any]) -> Figure:
    """A panel a workload, an engine a bar: sentences/s, with the spread of the rounds."""
    rows = result["rows"]
    known = [w for w in WORKLOADS if any(r["workload"] == w and r["metric"] == "sentences_per_s" for r in rows)]
    figure, panels = plt.subplots(1, len(known), figsize=(3 + 3.2 * len(known), 6), layout="constrained", sharey=True)
    every = places(rows)[::-1]
    for axes, workload in zip([panels] if len(known) == 1 else panels, known, strict=True):
        for y, place in enumerate(every):
            row = find(rows, place, "sentences_per_s", many(place, workload))
            if row is None:
                continue
            error = [[row["median"] - row["min"]], [row["max"] - row["median"]]]
            bar = axes.barh(y, row["median"], 0.8, xerr=error, hatch=HATCHES[place.where], **style(place))
            times = f" ({row['ratio_to_st_fp32']:.1f}×)" if row["ratio_to_st_fp32"] else ""
            axes.bar_label(bar, [f"{amount(row['median'])}{times}"], fontsize=7, padding=4)
        axes.set_yticks(range(len(every)), [", ".join(place) for place in every], fontsize=8)
        axes.set_title(WORKLOADS[workload], fontsize=9)
        axes.margins(x=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Sentences/s (× sentence-transformers fp32): {MANY} texts a call in-process, 32 of 512 tokens;"
        " served 32 a request and 8 in flight",
        fontsize=10,
    )
    _signed(figure, result)
    return figure


def latency(result: dict[str, Any]) -> Figure:
    """One text a request: p50 as a dot, a line to p99, by how many are in flight."""
    rows = result["rows"]
    labels = {
        ("short", 1): "one short text",
        ("short", 8): "short, 8 in flight",
        ("short", 32): "short, 32 in flight",
        ("long", 1): "one of 256 tokens",
    }
    every = places(rows)
    figure, axes = plt.subplots(figsize=(11, 6), layout="constrained")
    for number, place in enumerate(every):
        dots: dict[float, float] = {}
        for x, (workload, concurrency) in enumerate(labels):
            cell = Cell(workload, 1, concurrency)
            middle, high = (find(rows, place, metric, cell) for metric in ("p50_ms", "p99_ms"))
            if middle and high:
                at = x + 0.85 * ((number + 0.5) / len(every) - 0.5)
                dots[at] = middle["median"]
                axes.plot([at, at], [middle["median"], high["median"]], lw=1.5, **style(place))
                axes.annotate(amount(middle["median"]), (at, middle["median"] * 0.93), size=6, va="top", ha="center")
        marker = {"bare": "o", "http": "s", "grpc": "D"}[place.where]
        axes.plot(list(dots), list(dots.values()), marker, label=", ".join(place), **style(place))
    axes.set(title="Latency of one text: mark p50, line to p99", ylabel="ms, log scale", yscale="log")
    finish(figure, axes, list(labels.values()), result, 4)
    return figure


def accuracy(result: dict[str, Any]) -> Figure:
    """Speed on the mixed texts to the right, error upwards: the best is below on the right."""
    rows = result["rows"]
    figure, axes = plt.subplots(figsize=(11, 7), layout="constrained")
    for place in places(rows):
        speed = find(rows, place, "sentences_per_s", many(place, "mixed"))
        cosine = find(rows, place, "cosine_mean")
        if speed and cosine:
            error = max(1e-8, 1 - cosine["median"])  # an error of none has no place on a log scale
            axes.scatter(
                speed["median"], error, 60, marker={"bare": "o", "http": "s", "grpc": "D"}[place.where], **style(place)
            )
            text = place.engine if place.where == "bare" else ", ".join(place)
            at, turned = (speed["median"], error), {"rotation": 30, "rotation_mode": "anchor", "va": "center"}
            axes.annotate(text, at, xytext=(6, 5), textcoords="offset points", size=7, **turned)
    axes.set(xscale="log", yscale="log", xlabel="sentences/s, mixed texts, log scale")
    axes.set_ylabel("1 − mean cosine to sentence-transformers fp32, log scale")
    axes.set_title("Accuracy against speed: below is more exact, right is faster")
    axes.margins(x=0.2, y=0.15)  # for the labels, which rise to the right
    axes.spines[["top", "right"]].set_visible(False)
    _signed(figure, result)
    return figure


def finish(figure: Figure, axes: Axes, labels: list[str], result: dict[str, Any], columns: int) -> None:
    """What every plot of groups has: its groups named, the machine and the day, the legend below."""
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(_machine(result), fontsize=8)
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _signed(figure: Figure, result: dict[str, Any]) -> None:
    figure.supxlabel(_machine(result), fontsize=8)


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores, {result['timestamp'][:10]}"


def draw(path: Path, plots: Iterable[Callable[[dict[str, Any]], Figure]] | None = None) -> None:
    """A PNG beside the result file for each plot."""
    result = json.loads(path.read_text())
    for plot in plots or (throughput, latency, accuracy):
        target = path.with_name(f"{path.stem}-{plot.__name__}.png")
        plot(result).savefig(target, dpi=150)
        print(f"written: {target}")


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
