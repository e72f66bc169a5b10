"""Plots of the families' result file.

`python -m benchmarks.families.plots results/families.json` writes PNGs next to it.
"""

import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cpu import plots
from benchmarks.cpu.plots import plt
from benchmarks.cpu.tables import format_number
from benchmarks.families.tables import EXTRA_MB, FACTOR, Engine, Row

COLORS = {
    Engine("transformers", "float32"): "#9a9a9a",
    Engine("transformers", "bfloat16"): "#d9a441",
    Engine("ours", "float32"): "#7fb3d5",
    Engine("ours", "bfloat16"): "#1f5f99",
}
WIDTH = 0.8 / len(COLORS)


def speed(result: dict[str, Any]) -> Figure:
    """Plot speed relative to transformers fp32: absolute speeds of the shapes differ a hundredfold."""
    figure, axes = plt.subplots(figsize=(11, 5), layout="constrained")
    rows = [row for row in result["rows"] if row["metric"] == "speed"]
    groups = list(dict.fromkeys((row["shape"], row["workload"], row["unit"]) for row in rows))
    for engine, color in COLORS.items():
        engine_rows = {(row["shape"], row["workload"], row["unit"]): row for row in rows if _belongs_to(engine, row)}
        _bars(axes, engine, color, [engine_rows.get(group) for group in groups], "ratio_to_transformers_fp32", "median")
    axes.axhline(1, color="#555", lw=0.6)
    axes.set(title="Speed at real shapes, random weights", ylabel="times transformers fp32 (labels: per second)")
    plots.finish(figure, axes, ["\n".join(group) for group in groups], result, len(COLORS))
    return figure


def memory(result: dict[str, Any]) -> Figure:
    """Plot the peak memory of each process, and the limit of our engine."""
    figure, axes = plt.subplots(figsize=(11, 5), layout="constrained")
    rows = [row for row in result["rows"] if row["metric"] == "weights"]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    for engine, color in COLORS.items():
        engine_rows = {row["shape"]: row for row in rows if _belongs_to(engine, row)}
        _bars(
            axes, engine, color, [engine_rows.get(shape) for shape in shapes], "peak_mb", "peak_mb", label_type="center"
        )
        if engine.name == "ours":
            for x, shape in enumerate(shapes):
                if shape in engine_rows:
                    x_start = x + _slot(engine) - WIDTH / 2
                    axes.hlines(engine_rows[shape]["limit_mb"], x_start, x_start + WIDTH, color="#b03030", lw=1.5)
    title = f"Peak memory (VmHWM) of a process; red: {FACTOR} × weights + {EXTRA_MB} MB"
    axes.set(title=title, ylabel="MB")
    plots.finish(figure, axes, shapes, result, len(COLORS))
    return figure


def _belongs_to(engine: Engine, row: Row) -> bool:
    return (row["engine"], row["dtype"]) == engine


def _bars(
    axes: Axes, engine: Engine, color: str, rows: list[Row | None], height: str, label: str, **label_options: str
) -> None:
    present = {x: row for x, row in enumerate(rows) if row}
    if present:
        positions = [x + _slot(engine) for x in present]
        heights = [row[height] for row in present.values()]
        bars = axes.bar(positions, heights, WIDTH * 0.9, label=engine.label, color=color)
        axes.bar_label(
            bars, [format_number(row[label]) for row in present.values()], fontsize=7, padding=2, **label_options
        )


def _slot(engine: Engine) -> float:
    """Return the x offset of an engine's bar within a group."""
    return (list(COLORS).index(engine) - (len(COLORS) - 1) / 2) * WIDTH


def draw(path: Path) -> None:
    """Write both plots of a result file."""
    plots.draw(path, (speed, memory))


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
