"""Plots of the families' result file: speed and memory."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.families.tables import EXTRA_MB, FACTOR, Engine, Row
from benchmarks.plots import (
    BASELINE,
    BASELINE_LIGHT,
    LIMIT,
    OURS,
    OURS_LIGHT,
    Result,
    canvas,
    finish,
    group_bars,
    label_bars,
    slot,
)

COLORS = {
    Engine("transformers", "float32"): BASELINE,
    Engine("transformers", "bfloat16"): BASELINE_LIGHT,
    Engine("ours", "float32"): OURS_LIGHT,
    Engine("ours", "bfloat16"): OURS,
}


def speed(result: Result) -> Figure:
    """Plot speed relative to transformers fp32: absolute speeds of the shapes differ a hundredfold."""
    figure, axes = canvas(11, 5)
    rows = [row for row in result["rows"] if row["metric"] == "speed"]
    groups = list(dict.fromkeys((row["shape"], row["workload"], row["unit"]) for row in rows))
    for engine, color in COLORS.items():
        engine_rows = {(row["shape"], row["workload"], row["unit"]): row for row in rows if _belongs_to(engine, row)}
        _bars(axes, engine, color, [engine_rows.get(group) for group in groups], "ratio_to_transformers_fp32", "median")
    axes.axhline(1, color="#555", lw=0.6)
    axes.set(title="Speed at real shapes, random weights", ylabel="times transformers fp32 (labels: per second)")
    finish(figure, axes, ["\n".join(group) for group in groups], result, len(COLORS))
    return figure


def memory(result: Result) -> Figure:
    """Plot the peak memory of each process, and the limit of our engine."""
    figure, axes = canvas(11, 5)
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
                    offset, width = slot(_number(engine), len(COLORS))
                    limit, start = engine_rows[shape]["limit_mb"], x + offset - width / 2
                    axes.hlines(limit, start, start + width, color=LIMIT, lw=1.5)
    title = f"Peak memory (VmHWM) of a process; red: {FACTOR} × weights + {EXTRA_MB} MB"
    axes.set(title=title, ylabel="MB")
    finish(figure, axes, shapes, result, len(COLORS))
    return figure


def _belongs_to(engine: Engine, row: Row) -> bool:
    return (row["engine"], row["dtype"]) == engine


def _bars(
    axes: Axes, engine: Engine, color: str, rows: list[Row | None], height: str, label: str, **options: str
) -> None:
    present = {x: row for x, row in enumerate(rows) if row}
    if present:
        heights = {x: row[height] for x, row in present.items()}
        bars = group_bars(axes, heights, _number(engine), len(COLORS), label=engine.label, color=color)
        label_bars(axes, bars, [row[label] for row in present.values()], 7, **options)


def _number(engine: Engine) -> int:
    return list(COLORS).index(engine)


PLOTS = (speed, memory)
