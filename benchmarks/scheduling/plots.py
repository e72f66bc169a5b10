"""Plots of the scheduling result file: fairness and token budgets."""

from typing import Any

from matplotlib.figure import Figure

from benchmarks.plots import BASELINE, LIMIT, OURS, Result, canvas, finish, group_bars, label_bars, plt
from benchmarks.report import format_number

IDLE, BUSY = BASELINE, OURS


def fairness(result: Result) -> Figure | None:
    """Plot queries alone and under bulk load: dot p50, line to p99, red the limit of p99."""
    rows = [row for row in result["rows"] if row["stage"] == "fairness" and "p50_ms" in row]
    if not rows:
        return None
    figure, axes = canvas(9, 5)
    idle = {(row["budget"], row["callers"]): row["p50_ms"] for row in rows if row["what"] == "idle"}
    for x, row in enumerate(rows):
        color = IDLE if row["what"] == "idle" else BUSY
        axes.plot([x, x], [row["p50_ms"], row["p99_ms"]], color=color, lw=2)
        axes.plot([x], [row["p50_ms"]], "o", color=color)
        for value in (row["p50_ms"], row["p99_ms"]):
            axes.annotate(format_number(value), (x + 0.06, value), size=7, va="center")
        if "target" in row:
            axes.hlines(row["target"] * idle[row["budget"], row["callers"]], x - 0.25, x + 0.25, color=LIMIT, lw=1.5)
    title = "One short query: dot p50, line to p99; red: three times the idle p50"
    axes.set(title=title, ylabel="ms, log scale", yscale="log")
    for color, label in ((IDLE, "alone"), (BUSY, "under bulk load")):
        axes.plot([], [], "o-", color=color, label=label)
    labels = [
        f"{row['budget'] or 'default'}\ntokens per pass\n{row.get('priority', '')}\n{row['callers']} callers"
        for row in rows
    ]
    finish(figure, axes, labels, result, 2)
    return figure


def budget(result: Result) -> Figure | None:
    """Plot the throughput of each cell relative to the best configuration."""
    rows = [row for row in result["rows"] if row["stage"] == "budget"]
    if not rows:
        return None
    figure, axes = canvas(11, 5)
    cells = list(dict.fromkeys((row["inputs"], row["workload"], row["callers"]) for row in rows))
    configs = list(dict.fromkeys((row["budget"], row["wait_us"]) for row in rows))
    speeds = {((row["budget"], row["wait_us"]), cells.index(_cell(row))): row["inputs_per_s"] for row in rows}
    for number, config in enumerate(configs):
        throughputs = {x: speeds[config, x] for x in range(len(cells)) if (config, x) in speeds}
        best = {x: max(speed for (_, cell), speed in speeds.items() if cell == x) for x in throughputs}
        shares = {x: speed / best[x] for x, speed in throughputs.items()}
        label = f"{config[0] or 'default'} tokens" + (f", {config[1]} µs" if config[1] else "")
        color = plt.get_cmap("viridis")(number / len(configs))
        bars = group_bars(axes, shares, number, len(configs), label=label, color=color)
        label_bars(axes, bars, throughputs.values(), 6, rotation=90)
    axes.set(title="Token budget and queue delay", ylabel="share of the fastest (labels: inputs/s)", ylim=(0, 1.15))
    labels = [f"{inputs} {workload}\n{callers} callers" for inputs, workload, callers in cells]
    finish(figure, axes, labels, result, len(configs))
    return figure


def _cell(row: dict[str, Any]) -> tuple[int, str, int]:
    return row["inputs"], row["workload"], row["callers"]


PLOTS = (fairness, budget)
