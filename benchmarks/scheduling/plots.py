"""Plots of the scheduling result file.

`python -m benchmarks.scheduling.plots results/scheduling.json` writes a PNG next to it for each measured stage.
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.cpu import plots
from benchmarks.cpu.plots import plt
from benchmarks.cpu.tables import format_number

IDLE, BUSY = "#9a9a9a", "#1f5f99"


def fairness(result: dict[str, Any]) -> Figure:
    """Plot queries alone and under bulk load: dot p50, line to p99, red the limit of p99."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    rows = [row for row in result["rows"] if row["stage"] == "fairness" and "p50_ms" in row]
    idle = {(row["budget"], row["callers"]): row["p50_ms"] for row in rows if row["what"] == "idle"}
    for x, row in enumerate(rows):
        color = IDLE if row["what"] == "idle" else BUSY
        axes.plot([x, x], [row["p50_ms"], row["p99_ms"]], color=color, lw=2)
        axes.plot([x], [row["p50_ms"]], "o", color=color)
        for value in (row["p50_ms"], row["p99_ms"]):
            axes.annotate(format_number(value), (x + 0.06, value), size=7, va="center")
        if "target" in row:
            axes.hlines(
                row["target"] * idle[row["budget"], row["callers"]], x - 0.25, x + 0.25, color="#b03030", lw=1.5
            )
    title = "One short query: dot p50, line to p99; red: three times the idle p50"
    axes.set(title=title, ylabel="ms, log scale", yscale="log")
    for color, label in ((IDLE, "alone"), (BUSY, "under bulk load")):
        axes.plot([], [], "o-", color=color, label=label)
    labels = [
        f"{row['budget'] or 'default'}\ntokens per pass\n{row.get('priority', '')}\n{row['callers']} callers"
        for row in rows
    ]
    plots.finish(figure, axes, labels, result, 2)
    return figure


def budget(result: dict[str, Any]) -> Figure:
    """Plot the throughput of each cell relative to the best configuration."""
    figure, axes = plt.subplots(figsize=(11, 5), layout="constrained")
    rows = [row for row in result["rows"] if row["stage"] == "budget"]
    cells = list(dict.fromkeys((row["inputs"], row["workload"], row["callers"]) for row in rows))
    configs = list(dict.fromkeys((row["budget"], row["wait_us"]) for row in rows))
    speeds = {((row["budget"], row["wait_us"]), cells.index(_cell(row))): row["inputs_per_s"] for row in rows}
    width = 0.8 / len(configs)
    for number, config in enumerate(configs):
        throughputs = {x: speeds[config, x] for x in range(len(cells)) if (config, x) in speeds}
        best = [max(speed for (_, cell), speed in speeds.items() if cell == x) for x in throughputs]
        positions = [x + (number - (len(configs) - 1) / 2) * width for x in throughputs]
        label = f"{config[0] or 'default'} tokens" + (f", {config[1]} µs" if config[1] else "")
        shares = [speed / maximum for speed, maximum in zip(throughputs.values(), best, strict=True)]
        bars = axes.bar(
            positions, shares, width * 0.9, label=label, color=plt.get_cmap("viridis")(number / len(configs))
        )
        axes.bar_label(
            bars, [format_number(speed) for speed in throughputs.values()], fontsize=6, padding=2, rotation=90
        )
    axes.set(title="Token budget and queue delay", ylabel="share of the fastest (labels: inputs/s)", ylim=(0, 1.15))
    labels = [f"{inputs} {workload}\n{callers} callers" for inputs, workload, callers in cells]
    plots.finish(figure, axes, labels, result, len(configs))
    return figure


def _cell(row: dict[str, Any]) -> tuple[int, str, int]:
    return row["inputs"], row["workload"], row["callers"]


def draw(path: Path) -> None:
    """Write a plot of each measured stage of a result file."""
    stages = {row["stage"] for row in json.loads(path.read_text())["rows"]}
    if stage_plots := [plot for plot in (fairness, budget) if plot.__name__ in stages]:
        plots.draw(path, stage_plots)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
