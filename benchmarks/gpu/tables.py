"""Reports of the GPU benchmark: progress lines, and a short table that compares each figure with its target."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.report import format_number, markdown_table

Row = dict[str, Any]
# Ops whose only cost is moving bytes, so that the copy bandwidth is their ceiling.
FUSED = (
    *("add_rms_norm", "add_layer_norm", "post_layer_norm", "qk_norm_rope_", "embed_layer_norm"),
    *("gated_activation", "activation", "segment_pool", "patchify"),
)


@dataclass(frozen=True)
class Target:
    """A target for one figure. `goal` may be None; `must` is None where the goal is only a theoretical estimate."""

    name: str
    find: Callable[[Mapping[str, list[Row]]], "Figure | None"]
    must: float | None
    goal: float | None
    unit: str = "×"
    less_is_better: bool = False

    def verdict(self, value: float) -> str:
        sign = -1 if self.less_is_better else 1
        if self.goal is not None and sign * value >= sign * self.goal:
            return "goal"
        if self.must is None:
            return "below the goal"
        return "met" if sign * value >= sign * self.must else "NOT MET"


@dataclass(frozen=True)
class Figure:
    """A measured figure. `source`: the case it comes from. `right`: whether the results were right."""

    value: float
    source: str = ""
    right: bool = True


Stages = Mapping[str, list[Row]]


def targets() -> list[Target]:
    """Return the project's performance targets."""
    targets = [
        Target("attention d64, S >= 512, to cuDNN", _attention("d64 full", "sdpa-cudnn", 512), 0.95, 1.0),
        Target("attention d128 full, S >= 1k, to cuDNN", _attention("d128 full", "sdpa-cudnn", 1_024), 0.68, 0.85),
        Target("attention d128 causal, S >= 2k, to cuDNN", _attention("d128 causal", "sdpa-cudnn", 2_048), 0.65, 0.80),
        Target("attention d80 vision, to cuDNN", _attention("d80 vision", "sdpa-cudnn"), 0.75, 0.9),
        Target("attention, mixed lengths, to FA2 varlen", _attention("mixed lengths", "fa2-varlen"), 1.1, 1.3),
        Target("attention, short queries, to FA2 varlen", _attention("short queries", "fa2-varlen"), 1.5, 2.5),
        Target("fused ops, share of the copy bandwidth", _share, 85, 92, " %"),
    ]
    for model, must, goal in (
        *(("bge-large", 52, 62), ("qwen3-0.6b", 45, 58), ("gte-qwen2-1.5b", 57, 66), ("qwen3-4b", 63, 71)),
        *(("e5-mistral-7b", 70, 78), ("clip-vit-l-14-336", None, 62), ("gme-qwen2-vl-2b", None, 61)),
    ):
        targets.append(Target(f"{model}: of 800 TFLOP/s", _utilisation(model), must, goal, " %"))
    for model, must, goal in (("bge-large", 2, 2.5), ("qwen3-0.6b", 3, 4), ("e5-mistral-7b", 1.4, 1.7)):
        targets.append(Target(f"{model}: to transformers bf16, batch 32", _to_padded(model, 32), must, goal))
    for model, must in (("bge-large", 1.5), ("qwen3-0.6b", 2), ("e5-mistral-7b", 1.3)):
        targets.append(Target(f"{model}: to its best batch size", _to_padded(model, None), must, None))
    for model, must, goal in (("bge-large", 0.9, 0.6), ("qwen3-0.6b", 1.3, 0.9), ("e5-mistral-7b", 6.2, 5.4)):
        targets.append(Target(f"{model}: one query of 32 tokens, p50", _query(model), must, goal, " ms", True))
    for model in ("qwen3-0.6b", "gte-qwen2-1.5b"):
        targets.append(Target(f"{model}: prefix reuse, queries/s", _prefix(model), 1.8, 2.2))
    return targets


def table(results: Mapping[str, Any]) -> str:
    """Format the targets as a Markdown table; wrong results do not count, and missing figures are marked as such."""
    stages = {name: stage["rows"] for name, stage in results["stages"].items()}
    lines = [["what", "measured", "must", "goal", ""]]
    for target in targets():
        figure = target.find(stages)
        must, goal = (("–" if x is None else f"{x:g}{target.unit}") for x in (target.must, target.goal))
        if figure is None or math.isnan(figure.value):
            lines.append([target.name, "–", must, goal, "not measured"])
            continue
        source = f" ({figure.source})" if figure.source else ""
        verdict = target.verdict(figure.value) if figure.right else "WRONG, not counted"
        lines.append([target.name, f"{figure.value:.3g}{target.unit}{source}", must, goal, verdict])
    return markdown_table(lines)


def failures(results: Mapping[str, Any]) -> list[str]:
    """Return one line for each stage or row that failed, was wrong or was skipped."""
    lines = []
    for name, stage in results["stages"].items():
        if "error" in stage:
            lines.append(f"{name} FAILED: {stage['error'].strip().splitlines()[-1]}")
        for row in stage["rows"]:
            where = f"{name}: {_label(row)}"
            if "error" in row:
                lines.append(f"{where} FAILED: {row['error']}")
            elif row.get("right") is False:
                lines.append(f"{where} WRONG: {_judged(row)}")
            elif "skipped" in row:
                lines.append(f"{where} skipped: {row['skipped']}")
            for engine, times in row.get("times", {}).items():
                if "error" in times:
                    lines.append(f"{where}: {engine} not measured: {times['error'][:160]}")
    return lines


def summary(results: Mapping[str, Any]) -> list[str]:
    """Return lines that put the figures in context: kernels that are right, repeatability, rates and ceilings."""
    lines = []
    verdicts = [row["right"] for row in results["stages"].get("kernels", {}).get("rows", []) if "right" in row]
    if verdicts:
        lines.append(f"kernels: {sum(verdicts)} of {len(verdicts)} right")
    stages = (results["stages"].get(name, {}).get("rows", []) for name in ("attention", "ops"))
    again = sorted(abs(row["again"] - 1) for rows in stages for row in rows if "again" in row)
    if again:
        median = again[len(again) // 2]
        lines.append(f"repeated timings differ by {100 * median:.1f} % (median), {100 * again[-1]:.1f} % (maximum)")
    lines += _model_lines(results["stages"].get("models", {}).get("rows", []))
    for ceiling, unit in (("matmul_tflops", "TFLOP/s of dense bf16"), ("copy_gb_s", "GB/s of a copy")):
        if ceiling in results["ceilings"]:
            lines.append(f"ceiling: {format_number(results['ceilings'][ceiling])} {unit}")
    return lines


def _model_lines(rows: list[Row]) -> Iterator[str]:
    """Yield one line per model and engine: its rate, and the latency of one query."""
    for model, engine, batch in dict.fromkeys((r["model"], r.get("engine"), r.get("batch")) for r in rows):
        metrics = {
            row["metric"]: row
            for row in rows
            if (row["model"], row.get("engine"), row.get("batch")) == (model, engine, batch) and "median_ms" in row
        }
        parts = [f"{format_number(row['rate'])} {row['unit']}" for row in metrics.values() if "rate" in row]
        if "one query" in metrics:
            parts.append(f"one query {metrics['one query']['median_ms']:.2f} ms")
        if parts:
            yield f"{model}: {engine}{f', batch {batch}' if batch else ''}: {', '.join(parts)}"


def line(row: Row) -> str:
    """Format a row as one short line of progress."""
    parts = [_label(row)]
    if "error" in row:
        parts.append(f"FAILED: {row['error'][:160]}")
    elif "skipped" in row:
        parts.append(f"skipped: {row['skipped']}")
    if "right" in row:
        parts.append("right" if row["right"] else f"WRONG {_judged(row)}")
    for key, unit in (("tflops", "TFLOP/s"), ("gb_s", "GB/s"), ("rate", str(row.get("unit", "")))):
        if isinstance(row.get(key), float):
            parts.append(f"{format_number(row[key])} {unit}")
    if isinstance(row.get("tflops"), dict):
        parts.append(", ".join(f"{name} {format_number(value)}" for name, value in row["tflops"].items()) + " TFLOP/s")
    if row.get("share_of_copy"):
        parts.append(f"{100 * row['share_of_copy']:.0f} % of a copy")
    if "median_ms" in row:
        parts.append(f"{format_number(row['median_ms'])} ms")
    if "utilisation" in row:
        parts.append(f"{100 * row['utilisation']:.0f} %")
    if "changed" in row and row["old_ms"]:
        old_ms, new_ms = format_number(row["old_ms"]), format_number(row["new_ms"])
        parts.append(f"{row['old']} {old_ms} ms -> {row['new']} {new_ms} ms")
    return "  ".join(parts)


def _label(row: Row) -> str:
    keys = ("what", "op", "kernel", "group", "case", "up_to", "dtype", "model", "metric", "engine", "batch")
    return " ".join(str(row[key]) for key in keys if key in row)


def _judged(row: Row) -> str:
    keys = ("reason", "error_to_exact", "worst_row", "allowed", "cosine", "distance", "transformers_distance")
    values = {key: row[key] for key in keys if key in row}
    return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else str(value) for key, value in values.items())


Find = Callable[[Stages], Figure | None]


def _attention(group: str, rival: str, shortest: int = 0) -> Find:
    """Return a finder of our speed relative to the rival's, in the worst case of a group."""

    def find(stages: Stages) -> Figure | None:
        figures = []
        for row in stages.get("attention", []):
            if row["group"] == group and rival in row.get("ours_times", {}) and row["longest"] >= shortest:
                figures.append(Figure(row["ours_times"][rival], row["case"], row["right"]))
        return _worst(figures)

    return find


def _share(stages: Stages) -> Figure | None:
    rows = [row for row in stages.get("ops", []) if row["op"] in FUSED and row.get("share_of_copy")]
    return _worst([Figure(100 * row["share_of_copy"], f"{row['op']} {row['case']}", row["right"]) for row in rows])


def _worst(figures: list[Figure]) -> Figure | None:
    """Return the worst figure; a wrong result ranks below any right one."""
    return min(figures, key=lambda figure: (figure.right, figure.value), default=None)


def _rows(stages: Stages, model: str, **criteria: Any) -> Iterator[Row]:
    for row in stages.get("models", []):
        if row["model"] == model and "median_ms" in row and criteria.items() <= row.items():
            yield row


def _right(stages: Stages, model: str) -> bool:
    """Return whether all compared vectors of the model were right."""
    rows = (row for row in stages.get("models", []) if row["model"] == model)
    return all(row.get("right", True) for row in rows)


def _utilisation(model: str) -> Find:
    def find(stages: Stages) -> Figure | None:
        row = next(_rows(stages, model, metric="corpus", engine="ours"), None)
        return row and Figure(100 * row["utilisation"], right=_right(stages, model))

    return find


def _to_padded(model: str, batch: int | None) -> Find:
    """Return a finder of our throughput relative to transformers; `batch` None: at its best batch size."""

    def find(stages: Stages) -> Figure | None:
        ours = next(_rows(stages, model, metric="corpus", engine="ours"), None)
        theirs = list(_rows(stages, model, metric="corpus", engine="transformers"))
        theirs = [row for row in theirs if batch in (None, row["batch"])]
        if ours is None or not theirs:
            return None
        best = max(theirs, key=lambda row: float(row["rate"]))
        return Figure(ours["rate"] / best["rate"], f"batch {best['batch']}", _right(stages, model))

    return find


def _query(model: str) -> Find:
    def find(stages: Stages) -> Figure | None:
        row = next(_rows(stages, model, metric="one query", engine="ours"), None)
        return row and Figure(row["median_ms"], right=_right(stages, model))

    return find


def _prefix(model: str) -> Find:
    def find(stages: Stages) -> Figure | None:
        with_reuse = next(_rows(stages, model, metric="queries", engine="ours"), None)
        without_reuse = next(_rows(stages, model, metric="queries", engine="no prefix reuse"), None)
        if with_reuse is None or without_reuse is None:
            return None
        return Figure(with_reuse["rate"] / without_reuse["rate"], right=_right(stages, model))

    return find
