"""Plots of the CPU result file: throughput, latency, and accuracy against speed."""

from typing import Any

from matplotlib.figure import Figure

from benchmarks.cpu.tables import LARGE_CALL, Cell, Contender, find_row, list_contenders, throughput_cell
from benchmarks.plots import BASELINE, OURS, Result, canvas, caption, finish, plt, remove_frame
from benchmarks.report import format_number

# By prefix of the engine's name: gray and brown for others, blue for ours.
COLORS = {
    "sentence-transformers": BASELINE,
    "padded-fastapi": "#6b6b6b",
    "infinity-emb": "#c7a252",
    "onnxruntime": "#c58b6b",
    "openvino": "#8a6fae",
    "ours": OURS,
}
SHADES = {"fp32": 0.45, "bf16": 0.75, "int8": 1.0}  # opacity of the color, by suffix of the engine's name
HATCHES = {"bare": "", "http": "//", "grpc": ".."}
MARKERS = {"bare": "o", "http": "s", "grpc": "D"}
WORKLOADS = {
    "short": "short: 5–20 tokens",
    "mixed": "mixed: 8–256 tokens",
    "long": "256 tokens",
    "full": "512 tokens",
}


def style(contender: Contender) -> dict[str, Any]:
    """Return the color and opacity of a contender."""
    color = next((c for name, c in COLORS.items() if contender.engine.startswith(name)), "#444444")
    return {"color": color, "alpha": SHADES.get(contender.engine.rpartition("-")[2], 1.0)}


def throughput(result: Result) -> Figure:
    """Plot sentences/s with the spread over the rounds: one panel per workload, one bar per contender."""
    rows = result["rows"]
    workloads = [w for w in WORKLOADS if any(r["workload"] == w and r["metric"] == "sentences_per_s" for r in rows)]
    figure, panels = plt.subplots(
        1, len(workloads), figsize=(3 + 3.2 * len(workloads), 6), layout="constrained", sharey=True
    )
    contenders = list_contenders(rows)[::-1]
    for axes, workload in zip([panels] if len(workloads) == 1 else panels, workloads, strict=True):
        for y, contender in enumerate(contenders):
            row = find_row(rows, contender, "sentences_per_s", throughput_cell(contender, workload))
            if row is None:
                continue
            error = [[row["median"] - row["min"]], [row["max"] - row["median"]]]
            bar = axes.barh(y, row["median"], 0.8, xerr=error, hatch=HATCHES[contender.where], **style(contender))
            ratio = f" ({row['ratio_to_st_fp32']:.1f}×)" if row["ratio_to_st_fp32"] else ""
            axes.bar_label(bar, [f"{format_number(row['median'])}{ratio}"], fontsize=7, padding=4)
        axes.set_yticks(range(len(contenders)), [", ".join(contender) for contender in contenders], fontsize=8)
        axes.set_title(WORKLOADS[workload], fontsize=9)
        axes.margins(x=0.3)
        remove_frame(axes)
    figure.suptitle(
        f"Sentences/s (× sentence-transformers fp32): {LARGE_CALL} texts per call in-process, 32 of 512 tokens;"
        " served 32 per request and 8 in flight",
        fontsize=10,
    )
    figure.supxlabel(caption(result), fontsize=8)
    return figure


def latency(result: Result) -> Figure:
    """Plot the latency of one text per request: a mark at p50 and a line to p99, by requests in flight."""
    rows = result["rows"]
    labels = {
        ("short", 1): "one short text",
        ("short", 8): "short, 8 in flight",
        ("short", 32): "short, 32 in flight",
        ("long", 1): "one of 256 tokens",
    }
    contenders = list_contenders(rows)
    figure, axes = canvas(11, 6)
    for number, contender in enumerate(contenders):
        medians: dict[float, float] = {}
        for x, (workload, concurrency) in enumerate(labels):
            cell = Cell(workload, 1, concurrency)
            p50, p99 = (find_row(rows, contender, metric, cell) for metric in ("p50_ms", "p99_ms"))
            if p50 and p99:
                slot = x + 0.85 * ((number + 0.5) / len(contenders) - 0.5)
                medians[slot] = p50["median"]
                axes.plot([slot, slot], [p50["median"], p99["median"]], lw=1.5, **style(contender))
                axes.annotate(format_number(p50["median"]), (slot, p50["median"] * 0.93), size=6, va="top", ha="center")
        axes.plot(
            list(medians),
            list(medians.values()),
            MARKERS[contender.where],
            label=", ".join(contender),
            **style(contender),
        )
    axes.set(title="Latency of one text: mark p50, line to p99", ylabel="ms, log scale", yscale="log")
    finish(figure, axes, list(labels.values()), result, 4)
    return figure


def accuracy(result: Result) -> Figure:
    """Plot error against speed on the mixed texts: best is at the bottom right."""
    rows = result["rows"]
    figure, axes = canvas(11, 7)
    for contender in list_contenders(rows):
        speed = find_row(rows, contender, "sentences_per_s", throughput_cell(contender, "mixed"))
        cosine = find_row(rows, contender, "cosine_mean")
        if speed and cosine:
            error = max(1e-8, 1 - cosine["median"])  # zero cannot be shown on a log scale
            axes.scatter(
                speed["median"],
                error,
                60,
                marker=MARKERS[contender.where],
                **style(contender),
            )
            label = contender.engine if contender.where == "bare" else ", ".join(contender)
            point, rotated = (speed["median"], error), {"rotation": 30, "rotation_mode": "anchor", "va": "center"}
            axes.annotate(label, point, xytext=(6, 5), textcoords="offset points", size=7, **rotated)
    axes.set(xscale="log", yscale="log", xlabel="sentences/s, mixed texts, log scale")
    axes.set_ylabel("1 − mean cosine to sentence-transformers fp32, log scale")
    axes.set_title("Accuracy against speed: lower is more exact, right is faster")
    axes.margins(x=0.2, y=0.15)  # room for the rotated labels
    remove_frame(axes)
    figure.supxlabel(caption(result), fontsize=8)
    return figure


PLOTS = (throughput, latency, accuracy)
