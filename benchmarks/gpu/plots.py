"""Plots of the GPU benchmark: `python -m benchmarks.gpu.plots results/gpu.json` writes PNGs next to the result file."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cpu.tables import format_number

mpl.use("Agg")
import matplotlib.pyplot as plt

COLORS = {
    "ours": "#1f5f99",
    "sdpa": "#9a9a9a",
    "sdpa-flash": "#9a9a9a",
    "sdpa-cudnn": "#d9a441",
    "fa2-varlen": "#7fb3d5",
    "cudnn-varlen": "#2e8b76",
}
Result = dict[str, Any]


def attention(result: Result) -> Figure | None:
    """Plot TFLOP/s per engine, one group of bars per case."""
    rows = [row for row in _rows(result, "attention") if row.get("right")]
    engines = [name for name in COLORS if any(name in row["tflops"] for row in rows)]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(max(8, 0.7 * len(rows)), 6), layout="constrained")
    width = 0.8 / len(engines)
    for i, name in enumerate(engines):
        shown = {x: row["tflops"][name] for x, row in enumerate(rows) if name in row["tflops"]}
        positions = [x + (i - (len(engines) - 1) / 2) * width for x in shown]
        axes.bar(positions, list(shown.values()), width * 0.9, label=name, color=COLORS[name])
    _finish(figure, axes, [f"{row['group']}\n{row['case']}" for row in rows], result, "Attention, bf16", "TFLOP/s")
    figure.legend(loc="outside upper right", ncols=len(engines), frameon=False, fontsize=8)
    return figure


def ops(result: Result) -> Figure | None:
    """Plot memory-bound ops as a share of the copy bandwidth."""
    rows = [row for row in _rows(result, "ops") if row.get("right") and row.get("share_of_copy")]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(max(8, 0.5 * len(rows)), 5), layout="constrained")
    bars = axes.bar(range(len(rows)), [100 * row["share_of_copy"] for row in rows], 0.7, color=COLORS["ours"])
    axes.bar_label(bars, [format_number(row["gb_s"]) for row in rows], fontsize=6, padding=2)
    axes.axhline(85, color="#b03030", lw=0.8)
    labels = [f"{row['op']}\n{row['case']}" for row in rows]
    _finish(figure, axes, labels, result, "Fused ops (labels: GB/s; red: target)", "% of the copy bandwidth")
    return figure


def models(result: Result) -> Figure | None:
    """Plot throughput as a multiple of transformers at batch size 32."""
    rows = [row for row in _rows(result, "models") if row.get("metric") == "corpus" and "rate" in row]
    names = list(dict.fromkeys(row["model"] for row in rows))
    base = {row["model"]: row["rate"] for row in rows if row.get("batch") == 32}
    names = [name for name in names if name in base]
    if not names:
        return None
    series = list(dict.fromkeys(_series(row) for row in rows))
    figure, axes = plt.subplots(figsize=(max(8, 2 * len(names)), 5), layout="constrained")
    width = 0.8 / len(series)
    for i, name in enumerate(series):
        rows_by_model = {
            names.index(row["model"]): row for row in rows if _series(row) == name and row["model"] in base
        }
        positions = [x + (i - (len(series) - 1) / 2) * width for x in rows_by_model]
        heights = [row["rate"] / base[row["model"]] for row in rows_by_model.values()]
        bars = axes.bar(positions, heights, width * 0.9, label=name)
        axes.bar_label(bars, [format_number(row["rate"]) for row in rows_by_model.values()], fontsize=6, padding=2)
    axes.axhline(1, color="#555", lw=0.6)
    title = "End to end, random weights, bf16 (labels: tokens or images per second)"
    _finish(figure, axes, names, result, title, "times transformers, batch 32")
    figure.legend(loc="outside upper right", ncols=len(series), frameon=False, fontsize=8)
    return figure


def _series(row: Result) -> str:
    return f"{row['engine']}, batch {row['batch']}" if "batch" in row else str(row["engine"])


def _rows(result: Result, stage: str) -> list[Result]:
    rows: list[Result] = [row for row in result["stages"].get(stage, {}).get("rows", []) if "error" not in row]
    return rows


def _finish(figure: Figure, axes: Axes, labels: list[str], result: Result, title: str, unit: str) -> None:
    axes.set_xticks(range(len(labels)), labels, rotation=60 if len(labels) > 8 else 0, ha="right", fontsize=6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(title=title, ylabel=unit)
    axes.set_xlabel(f"{result['gpu']['name']}, {result['timestamp'][:10]}", fontsize=8)


def draw(path: Path) -> Iterator[Path]:
    """Write a PNG next to the result file for each plot that has data; yield the paths."""
    result = json.loads(path.read_text())
    for plot in (attention, ops, models):
        figure = plot(result)
        if figure is not None:
            target = path.with_name(f"{path.stem}-{plot.__name__}.png")
            figure.savefig(target, dpi=130)
            plt.close(figure)
            yield target


if __name__ == "__main__":
    for plot_path in draw(Path(sys.argv[1])):
        print(f"written: {plot_path}")
