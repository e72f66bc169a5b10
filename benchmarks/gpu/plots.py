"""Plots of the GPU benchmark: attention, fused ops, and the models end to end."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.plots import (
    BASELINE,
    BASELINE_LIGHT,
    LIMIT,
    OURS,
    OURS_LIGHT,
    Result,
    canvas,
    caption,
    group_bars,
    label_bars,
    remove_frame,
)

COLORS = {
    "ours": OURS,
    "sdpa": BASELINE,
    "sdpa-flash": BASELINE,
    "sdpa-cudnn": BASELINE_LIGHT,
    "fa2-varlen": OURS_LIGHT,
    "cudnn-varlen": "#2e8b76",
}


def attention(result: Result) -> Figure | None:
    """Plot TFLOP/s per engine, one group of bars per case."""
    rows = [row for row in _rows(result, "attention") if row.get("right")]
    engines = [name for name in COLORS if any(name in row["tflops"] for row in rows)]
    if not rows:
        return None
    figure, axes = canvas(max(8, 0.7 * len(rows)), 6)
    for i, name in enumerate(engines):
        shown = {x: row["tflops"][name] for x, row in enumerate(rows) if name in row["tflops"]}
        group_bars(axes, shown, i, len(engines), label=name, color=COLORS[name])
    _finish(figure, axes, [f"{row['group']}\n{row['case']}" for row in rows], result, "Attention, bf16", "TFLOP/s")
    figure.legend(loc="outside upper right", ncols=len(engines), frameon=False, fontsize=8)
    return figure


def ops(result: Result) -> Figure | None:
    """Plot memory-bound ops as a share of the copy bandwidth."""
    rows = [row for row in _rows(result, "ops") if row.get("right") and row.get("share_of_copy")]
    if not rows:
        return None
    figure, axes = canvas(max(8, 0.5 * len(rows)), 5)
    bars = axes.bar(range(len(rows)), [100 * row["share_of_copy"] for row in rows], 0.7, color=COLORS["ours"])
    label_bars(axes, bars, [row["gb_s"] for row in rows], 6)
    axes.axhline(85, color=LIMIT, lw=0.8)
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
    figure, axes = canvas(max(8, 2 * len(names)), 5)
    for i, name in enumerate(series):
        rows_by_model = {
            names.index(row["model"]): row for row in rows if _series(row) == name and row["model"] in base
        }
        heights = {x: row["rate"] / base[row["model"]] for x, row in rows_by_model.items()}
        bars = group_bars(axes, heights, i, len(series), label=name)
        label_bars(axes, bars, [row["rate"] for row in rows_by_model.values()], 6)
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
    remove_frame(axes)
    axes.set(title=title, ylabel=unit)
    axes.set_xlabel(caption(result), fontsize=8)


PLOTS = (attention, ops, models)
