"""Convert the measurements of `benchmarks.families` to result rows, and rows to tables and memory verdicts.

Every row has shape, engine, dtype and metric. `speed` rows: workload and unit; median, minimum and maximum over the
rounds; the lowest cosine to transformers fp32 on the same rows and, for comparison, the highest cosine of two different
rows. `weights` rows: load time in seconds, and in MB the weights in the serving dtype, the peak of the process after
loading and after all work, its anonymous memory at the end, and its limit.
"""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from benchmarks.report import format_number, markdown_table
from benchmarks.worker import Vectors

Row = dict[str, Any]
# Memory limit of a process: FACTOR times its weights, plus EXTRA_MB for Python, libraries and activations.
FACTOR, EXTRA_MB = 1.2, 400


class Engine(NamedTuple):
    """An engine and its dtype."""

    name: str
    dtype: str

    @property
    def label(self) -> str:
        """Name and dtype, as shown in tables."""
        return f"{self.name} {'fp32' if self.dtype == 'float32' else 'bf16'}"


BASELINE = Engine("transformers", "float32")


def speeds(
    shape: str,
    workload: str,
    unit: str,
    size: int,
    rates: Mapping[Engine, Sequence[float]],
    vectors: Mapping[Engine, Vectors],
) -> list[Row]:
    """Return one speed row per engine. `size`: units (tokens, texts, images) per call. Ratios are of medians."""
    reference = vectors[BASELINE].astype(np.float64)
    return [
        {
            "shape": shape,
            "engine": engine.name,
            "dtype": engine.dtype,
            "metric": "speed",
            "workload": workload,
            "unit": unit,
            "size": size,
            "median": median(values),
            "min": min(values),
            "max": max(values),
            "ratio_to_transformers_fp32": median(values) / median(rates[BASELINE]),
            "ratio_to_transformers_same_dtype": median(values) / median(rates[Engine("transformers", engine.dtype)]),
            "cosine_least": float(_cosines(vectors[engine].astype(np.float64), reference).diagonal().min()),
            "cosine_of_different_rows": _closest(_cosines(reference, reference)),
        }
        for engine, values in rates.items()
    ]


def weights(
    shape: str, engine: Engine, count: int, load_s: float, loaded: Mapping[str, float], now: Mapping[str, float]
) -> Row:
    """Return the memory and load time row of an engine. `count`: parameters of the checkpoint."""
    size = count * (4 if engine.dtype == "float32" else 2) / 2**20
    limit = FACTOR * size + EXTRA_MB
    return {
        "shape": shape,
        "engine": engine.name,
        "dtype": engine.dtype,
        "metric": "weights",
        "load_s": load_s,
        "weights_mb": size,
        "peak_loaded_mb": loaded["peak"],
        "peak_mb": now["peak"],
        "anonymous_mb": now["anonymous"],
        "limit_mb": limit,
        "met": now["peak"] <= limit,
    }


def _cosines(a: Vectors, b: Vectors) -> Vectors:
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    cosines: Vectors = a @ b.T
    return cosines


def _closest(cosines: Vectors) -> float | None:
    """Return the highest off-diagonal value; None if there is only one row."""
    return float((cosines - 4 * np.eye(len(cosines))).max()) if len(cosines) > 1 else None


def speed_table(rows: list[Row]) -> str:
    """Return the Markdown table of speeds: the medians, and their ratios to transformers in the same dtype."""
    speed_rows = [row for row in rows if row["metric"] == "speed"]
    engines = list(dict.fromkeys(_engine(row) for row in speed_rows))
    labels = [engine.label for engine in engines]
    lines = [["shape", "workload", *labels, "cosine, least: " + ", ".join(labels[1:]), "of different rows"]]
    for shape, workload in dict.fromkeys((row["shape"], row["workload"]) for row in speed_rows):
        by_engine = {_engine(row): row for row in speed_rows if (row["shape"], row["workload"]) == (shape, workload)}
        baseline = by_engine[BASELINE]
        cosines = ", ".join(f"{by_engine[engine]['cosine_least']:.6f}" for engine in engines[1:])
        highest = baseline["cosine_of_different_rows"]
        figures = [_figure(by_engine[engine]) for engine in engines]
        different = "–" if highest is None else f"{highest:.3f}"
        lines.append([shape, f"{workload}, {baseline['unit']}", *figures, cosines, different])
    return markdown_table(lines)


def _figure(row: Row) -> str:
    ratio = "" if row["engine"] == "transformers" else f" ({row['ratio_to_transformers_same_dtype']:.2f}×)"
    return format_number(row["median"]) + ratio


def weight_table(rows: list[Row]) -> str:
    """Return the Markdown table of memory in MB, and seconds from the start of the process to its first vector."""
    lines = [["shape", "engine", "weights", "peak, loaded", "peak", "anonymous", "peak ÷ weights", "load, s"]]
    for row in rows:
        if row["metric"] == "weights":
            sizes = [row[key] for key in ("weights_mb", "peak_loaded_mb", "peak_mb", "anonymous_mb")]
            factor = f"{row['peak_mb'] / row['weights_mb']:.2f}"
            lines.append([row["shape"], _engine(row).label, *map(format_number, sizes), factor, f"{row['load_s']:.1f}"])
    return markdown_table(lines)


def expectations(rows: list[Row]) -> list[str]:
    """Return one line per process of our engine: its peak memory and the limit."""
    return [
        f"{'met' if row['met'] else 'NOT MET'}: {row['shape']}, {_engine(row).label}: peak {row['peak_mb']:,.0f} MB "
        f"(expected at most {FACTOR} × {row['weights_mb']:,.0f} + {EXTRA_MB} = {row['limit_mb']:,.0f} MB)"
        for row in rows
        if row["metric"] == "weights" and row["engine"] == "ours"
    ]


def _engine(row: Row) -> Engine:
    return Engine(row["engine"], row["dtype"])
