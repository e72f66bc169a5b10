"""The families' result file as pictures: `python -m benchmarks.families_plots results/families.json` writes PNGs
beside it."""

import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import plots
from benchmarks.families_report import EXTRA_MB, FACTOR, Engine, Row
from benchmarks.plots import plt
from benchmarks.report import amount

COLOURS = {
    Engine("transformers", "float32"): "#9a9a9a",
    Engine("transformers", "bfloat16"): "#d9a441",
    Engine("ours", "float32"): "#7fb3d5",
    Engine("ours", "bfloat16"): "#1f5f99",
}
WIDTH = 0.8 / len(COLOURS)


def speed(result: dict[str, Any]) -> Figure:
    """As multiples of transformers fp32, for shapes differ a hundredfold in what they compute a second."""
    figure, axes = plt.subplots(figsize=(11, 5), layout="constrained")
    rows = [row for row in result["rows"] if row["metric"] == "speed"]
    groups = list(dict.fromkeys((row["shape"], row["workload"], row["unit"]) for row in rows))
    for engine, colour in COLOURS.items():
        mine = {(row["shape"], row["workload"], row["unit"]): row for row in rows if _made_by(engine, row)}
        _bars(axes, engine, colour, [mine.get(group) for group in groups], "ratio_to_transformers_fp32", "median")
    axes.axhline(1, color="#555", lw=0.6)
    axes.set(title="Speed at real shapes, random weights", ylabel="times transformers fp32 (labels: a second)")
    plots.finish(figure, axes, ["\n".join(group) for group in groups], result, len(COLOURS))
    return figure


def memory(result: dict[str, Any]) -> Figure:
    """The peak of each process, and what ours may take."""
    figure, axes = plt.subplots(figsize=(11, 5), layout="constrained")
    rows = [row for row in result["rows"] if row["metric"] == "weights"]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    for engine, colour in COLOURS.items():
        mine = {row["shape"]: row for row in rows if _made_by(engine, row)}
        _bars(axes, engine, colour, [mine.get(shape) for shape in shapes], "peak_mb", "peak_mb", label_type="center")
        if engine.name == "ours":
            for x, shape in enumerate(shapes):
                if shape in mine:
                    left = x + _slot(engine) - WIDTH / 2
                    axes.hlines(mine[shape]["limit_mb"], left, left + WIDTH, color="#b03030", lw=1.5)
    title = f"Peak memory (VmHWM) of a process; red: {FACTOR} × weights + {EXTRA_MB} MB"
    axes.set(title=title, ylabel="MB")
    plots.finish(figure, axes, shapes, result, len(COLOURS))
    return figure


def _made_by(engine: Engine, row: Row) -> bool:
    return (row["engine"], row["dtype"]) == engine


def _bars(
    axes: Axes, engine: Engine, colour: str, rows: list[Row | None], height: str, label: str, **placed: str
) -> None:
    shown = {x: row for x, row in enumerate(rows) if row}
    if shown:
        places = [x + _slot(engine) for x in shown]
        heights = [row[height] for row in shown.values()]
        bars = axes.bar(places, heights, WIDTH * 0.9, label=engine.label, color=colour)
        axes.bar_label(bars, [amount(row[label]) for row in shown.values()], fontsize=7, padding=2, **placed)


def _slot(engine: Engine) -> float:
    """Where an engine's bar stands in a group."""
    return (list(COLOURS).index(engine) - (len(COLOURS) - 1) / 2) * WIDTH


def draw(path: Path) -> None:
    plots.draw(path, (speed, memory))


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
