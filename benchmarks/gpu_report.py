"""The GPU benchmark's rows as lines of progress, and as a short table that puts each figure beside what is wanted."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.report import amount

Row = dict[str, Any]
# What moves as many bytes as a copy would, and nothing else.
FUSED = (
    *("add_rms_norm", "add_layer_norm", "post_layer_norm", "qk_norm_rope_", "embed_layer_norm"),
    *("gated_activation", "activation", "segment_pool", "patchify"),
)


@dataclass(frozen=True)
class Target:
    """`goal` may be absent, and `must` where there is only a model of what is possible."""

    what: str
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
    """`which`: the case it is from, where the worst of several counts. `right`: whether the vectors or values were."""

    value: float
    which: str = ""
    right: bool = True


Stages = Mapping[str, list[Row]]


def targets() -> list[Target]:
    """Those of the project's kernel plan."""
    found = [
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
        found.append(Target(f"{model}: of 800 TFLOP/s", _utilisation(model), must, goal, " %"))
    for model, must, goal in (("bge-large", 2, 2.5), ("qwen3-0.6b", 3, 4), ("e5-mistral-7b", 1.4, 1.7)):
        found.append(Target(f"{model}: to transformers bf16, batch 32", _to_padded(model, 32), must, goal))
    for model, must in (("bge-large", 1.5), ("qwen3-0.6b", 2), ("e5-mistral-7b", 1.3)):
        found.append(Target(f"{model}: to its best batch size", _to_padded(model, None), must, None))
    for model, must, goal in (("bge-large", 0.9, 0.6), ("qwen3-0.6b", 1.3, 0.9), ("e5-mistral-7b", 6.2, 5.4)):
        found.append(Target(f"{model}: one query of 32 tokens, p50", _query(model), must, goal, " ms", True))
    for model in ("qwen3-0.6b", "gte-qwen2-1.5b"):
        found.append(Target(f"{model}: prefix reuse, queries/s", _prefix(model), 1.8, 2.2))
    return found


def table(results: Mapping[str, Any]) -> str:
    """Markdown. A figure of a kernel that is wrong does not count; nothing is made up for what was not measured."""
    stages = {name: stage["rows"] for name, stage in results["stages"].items()}
    lines = ["| what | measured | must | goal | |", "|---|---|---|---|---|"]
    for target in targets():
        found = target.find(stages)
        must, goal = (("–" if x is None else f"{x:g}{target.unit}") for x in (target.must, target.goal))
        if found is None or math.isnan(found.value):
            lines.append(f"| {target.what} | – | {must} | {goal} | not measured |")
            continue
        which = f" ({found.which})" if found.which else ""
        verdict = target.verdict(found.value) if found.right else "WRONG, not counted"
        lines.append(f"| {target.what} | {found.value:.3g}{target.unit}{which} | {must} | {goal} | {verdict} |")
    return "\n".join(lines)


def faults(results: Mapping[str, Any]) -> list[str]:
    """A line for each stage or row that failed, was wrong or was left out."""
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
                    lines.append(f"{where}: {engine} could not be measured: {times['error'][:160]}")
    return lines


def remarks(results: Mapping[str, Any]) -> list[str]:
    """What to judge the figures by: how many kernels are right, and how far one version is from itself."""
    lines = []
    verdicts = [row["right"] for row in results["stages"].get("kernels", {}).get("rows", []) if "right" in row]
    if verdicts:
        lines.append(f"kernels: {sum(verdicts)} of {len(verdicts)} right")
    stages = (results["stages"].get(name, {}).get("rows", []) for name in ("attention", "ops"))
    again = sorted(abs(row["again"] - 1) for rows in stages for row in rows if "again" in row)
    if again:
        middle = again[len(again) // 2]
        lines.append(
            f"one version timed twice differs by {100 * middle:.1f} % (median), {100 * again[-1]:.1f} % at most"
        )
    lines += _of_models(results["stages"].get("models", {}).get("rows", []))
    for what, unit in (("matmul_tflops", "TFLOP/s of dense bf16"), ("copy_gb_s", "GB/s of a copy")):
        if what in results["ceilings"]:
            lines.append(f"ceiling: {amount(results['ceilings'][what])} {unit}")
    return lines


def _of_models(rows: list[Row]) -> Iterator[str]:
    """A line a model and engine: its rate, and how long one query takes."""
    for model, engine, batch in dict.fromkeys((r["model"], r.get("engine"), r.get("batch")) for r in rows):
        found = {
            row["metric"]: row
            for row in rows
            if (row["model"], row.get("engine"), row.get("batch")) == (model, engine, batch) and "median_ms" in row
        }
        parts = [f"{amount(row['rate'])} {row['unit']}" for row in found.values() if "rate" in row]
        if "one query" in found:
            parts.append(f"one query {found['one query']['median_ms']:.2f} ms")
        if parts:
            yield f"{model}: {engine}{f', batch {batch}' if batch else ''}: {', '.join(parts)}"


def line(row: Row) -> str:
    """A row in a few words, for whoever watches."""
    parts = [_label(row)]
    if "error" in row:
        parts.append(f"FAILED: {row['error'][:160]}")
    elif "skipped" in row:
        parts.append(f"skipped: {row['skipped']}")
    if "right" in row:
        parts.append("right" if row["right"] else f"WRONG {_judged(row)}")
    for key, unit in (("tflops", "TFLOP/s"), ("gb_s", "GB/s"), ("rate", str(row.get("unit", "")))):
        if isinstance(row.get(key), float):
            parts.append(f"{amount(row[key])} {unit}")
    if isinstance(row.get("tflops"), dict):
        parts.append(", ".join(f"{name} {amount(value)}" for name, value in row["tflops"].items()) + " TFLOP/s")
    if row.get("share_of_copy"):
        parts.append(f"{100 * row['share_of_copy']:.0f} % of a copy")
    if "median_ms" in row:
        parts.append(f"{amount(row['median_ms'])} ms")
    if "utilisation" in row:
        parts.append(f"{100 * row['utilisation']:.0f} %")
    if "changed" in row and row["old_ms"]:
        parts.append(f"{row['old']} {amount(row['old_ms'])} ms -> {row['new']} {amount(row['new_ms'])} ms")
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
    """How many times as fast as the rival, in the worst case of a group."""

    def find(stages: Stages) -> Figure | None:
        found = []
        for row in stages.get("attention", []):
            if row["group"] == group and rival in row.get("ours_times", {}) and row["longest"] >= shortest:
                found.append(Figure(row["ours_times"][rival], row["case"], row["right"]))
        return _worst(found)

    return find


def _share(stages: Stages) -> Figure | None:
    rows = [row for row in stages.get("ops", []) if row["op"] in FUSED and row.get("share_of_copy")]
    return _worst([Figure(100 * row["share_of_copy"], f"{row['op']} {row['case']}", row["right"]) for row in rows])


def _worst(found: list[Figure]) -> Figure | None:
    """A wrong one before all others."""
    return min(found, key=lambda figure: (figure.right, figure.value), default=None)


def _rows(stages: Stages, model: str, **wanted: Any) -> Iterator[Row]:
    for row in stages.get("models", []):
        if row["model"] == model and "median_ms" in row and wanted.items() <= row.items():
            yield row


def _right(stages: Stages, model: str) -> bool:
    """Whether the vectors were, as far as they were compared."""
    rows = (row for row in stages.get("models", []) if row["model"] == model)
    return all(row.get("right", True) for row in rows)


def _utilisation(model: str) -> Find:
    def find(stages: Stages) -> Figure | None:
        row = next(_rows(stages, model, metric="corpus", engine="ours"), None)
        return row and Figure(100 * row["utilisation"], right=_right(stages, model))

    return find


def _to_padded(model: str, batch: int | None) -> Find:
    """`batch` None: the best of those tried."""

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
        with_it = next(_rows(stages, model, metric="queries", engine="ours"), None)
        without = next(_rows(stages, model, metric="queries", engine="no prefix reuse"), None)
        if with_it is None or without is None:
            return None
        return Figure(with_it["rate"] / without["rate"], right=_right(stages, model))

    return find
