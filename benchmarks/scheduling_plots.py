"""Scheduling's result file as pictures: `python -m benchmarks.scheduling_plots results/scheduling.json` writes PNGs
beside it, of the stages that were measured."""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import plots
from benchmarks.plots import plt
from benchmarks.report import amount

IDLE, BUSY = "#9a9a9a", "#1f5f99"


def fairness(result: dict[str, Any]) -> Figure:
    """Queries alone, and while bulk requests come: dot p50, line to p99, red what p99 may be."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    rows = [row for row in result["rows"] if row["stage"] == "fairness" and "p50_ms" in row]
    idle = {(row["budget"], row["callers"]): row["p50_ms"] for row in rows if row["what"] == "idle"}
    for x, row in enumerate(rows):
        colour = IDLE if row["what"] == "idle" else BUSY
        axes.plot([x, x], [row["p50_ms"], row["p99_ms"]], color=colour, lw=2)
        axes.plot([x], [row["p50_ms"]], "o", color=colour)
        for value in (row["p50_ms"], row["p99_ms"]):
            axes.annotate(amount(value), (x + 0.06, value), size=7, va="center")
        if "target" in row:
            axes.hlines(
                row["target"] * idle[row["budget"], row["callers"]], x - 0.25, x + 0.25, color="#b03030", lw=1.5
            )
    title = "One short query: dot p50, line to p99; red: three times the idle p50"
    axes.set(title=title, ylabel="ms, log scale", yscale="log")
    for colour, label in ((IDLE, "alone"), (BUSY, "while bulk requests come")):
        axes.plot([], [], "o-", color=colour, label=label)
    labels = [
        f"{row['budget'] or 'default'}\ntokens a pass\n{row.get('priority', '')}\n{row['callers']} callers"
        for row in rows
    ]
    plots.finish(figure, axes, labels, result, 2)
    return figure


def budget(result: dict[str, Any]) -> Figure:
    """Each cell's throughput against the best configuration's."""
    figure, axes = plt.subplots(figsize=(11, 5), layout="constrained")
    rows = [row for row in result["rows"] if row["stage"] == "budget"]
    cells = list(dict.fromkeys((row["inputs"], row["workload"], row["callers"]) for row in rows))
    configs = list(dict.fromkeys((row["budget"], row["wait_us"]) for row in rows))
    speeds = {((row["budget"], row["wait_us"]), cells.index(_cell(row))): row["inputs_per_s"] for row in rows}
    width = 0.8 / len(configs)
    for number, config in enumerate(configs):
        mine = {x: speeds[config, x] for x in range(len(cells)) if (config, x) in speeds}
        best = [max(speed for (_, cell), speed in speeds.items() if cell == x) for x in mine]
        places = [x + (number - (len(configs) - 1) / 2) * width for x in mine]
        label = f"{config[0] or 'default'} tokens" + (f", {config[1]} µs" if config[1] else "")
        shares = [speed / most for speed, most in zip(mine.values(), best, strict=True)]
        bars = axes.bar(places, shares, width * 0.9, label=label, color=plt.get_cmap("viridis")(number / len(configs)))
        axes.bar_label(bars, [amount(speed) for speed in mine.values()], fontsize=6, padding=2, rotation=90)
    axes.set(title="Token budget and gather wait", ylabel="of the fastest (labels: inputs/s)", ylim=(0, 1.15))
    labels = [f"{inputs} {workload}\n{callers} callers" for inputs, workload, callers in cells]
    plots.finish(figure, axes, labels, result, len(configs))
    return figure


def _cell(row: dict[str, Any]) -> tuple[int, str, int]:
    return row["inputs"], row["workload"], row["callers"]


def draw(path: Path) -> None:
    stages = {row["stage"] for row in json.loads(path.read_text())["rows"]}
    if measured := [plot for plot in (fairness, budget) if plot.__name__ in stages]:
        plots.draw(path, measured)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
