"""From what `benchmarks.families` measured to rows, from rows to tables and what was expected.

A row: shape, engine, dtype, metric, and its figures. `speed` rows: workload and unit, the median, least and most of the
rounds, the least cosine to transformers fp32 on the same rows and, to judge that by, the greatest of two different
rows. `weights` rows: seconds of the load, and MB: the weights in the serving dtype, the process's peak once loaded and
after all work, its anonymous memory then, and what it may take.
"""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from benchmarks.report import amount
from benchmarks.worker import Vectors

Row = dict[str, Any]
# The memory a process may take: so many times its weights, and so many MB for Python, the libraries and the work.
FACTOR, EXTRA_MB = 1.2, 400


class Engine(NamedTuple):
    name: str
    dtype: str

    @property
    def label(self) -> str:
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
    """A row an engine. `size`: how many of the unit a call computes. Ratios are of medians."""
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
            "median": median(found),
            "min": min(found),
            "max": max(found),
            "ratio_to_transformers_fp32": median(found) / median(rates[BASELINE]),
            "ratio_to_transformers_same_dtype": median(found) / median(rates[Engine("transformers", engine.dtype)]),
            "cosine_least": float(_cosines(vectors[engine].astype(np.float64), reference).diagonal().min()),
            "cosine_of_different_rows": _closest(_cosines(reference, reference)),
        }
        for engine, found in rates.items()
    ]


def weights(
    shape: str, engine: Engine, count: int, load_s: float, loaded: Mapping[str, float], now: Mapping[str, float]
) -> Row:
    """`count` numbers in the checkpoint."""
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
    found: Vectors = a @ b.T
    return found


def _closest(cosines: Vectors) -> float | None:
    """The greatest off the diagonal; None where there is one row."""
    return float((cosines - 4 * np.eye(len(cosines))).max()) if len(cosines) > 1 else None


def speed_table(rows: list[Row]) -> str:
    """Markdown, a line a workload: the median, and how many times transformers' in the same dtype."""
    found = [row for row in rows if row["metric"] == "speed"]
    engines = list(dict.fromkeys(_engine(row) for row in found))
    labels = [engine.label for engine in engines]
    lines = [["shape", "workload", *labels, "cosine, least: " + ", ".join(labels[1:]), "of different rows"]]
    for shape, workload in dict.fromkeys((row["shape"], row["workload"]) for row in found):
        line = {_engine(row): row for row in found if (row["shape"], row["workload"]) == (shape, workload)}
        first = line[BASELINE]
        cosines = ", ".join(f"{line[engine]['cosine_least']:.6f}" for engine in engines[1:])
        apart = first["cosine_of_different_rows"]
        figures = [_figure(line[engine]) for engine in engines]
        other = "–" if apart is None else f"{apart:.3f}"
        lines.append([shape, f"{workload}, {first['unit']}", *figures, cosines, other])
    return _markdown(lines)


def _figure(row: Row) -> str:
    ratio = "" if row["engine"] == "transformers" else f" ({row['ratio_to_transformers_same_dtype']:.2f}×)"
    return amount(row["median"]) + ratio


def weight_table(rows: list[Row]) -> str:
    """Markdown, a line an engine and shape: MB, and seconds from the process's start to its first vector."""
    lines = [["shape", "engine", "weights", "peak, loaded", "peak", "anonymous", "peak ÷ weights", "load, s"]]
    for row in rows:
        if row["metric"] == "weights":
            sizes = [row[key] for key in ("weights_mb", "peak_loaded_mb", "peak_mb", "anonymous_mb")]
            factor = f"{row['peak_mb'] / row['weights_mb']:.2f}"
            lines.append([row["shape"], _engine(row).label, *map(amount, sizes), factor, f"{row['load_s']:.1f}"])
    return _markdown(lines)


def expectations(rows: list[Row]) -> list[str]:
    """One line for each of our processes: its peak against what it may take."""
    return [
        f"{'met' if row['met'] else 'NOT MET'}: {row['shape']}, {_engine(row).label}: peak {row['peak_mb']:,.0f} MB "
        f"(expected at most {FACTOR} × {row['weights_mb']:,.0f} + {EXTRA_MB} = {row['limit_mb']:,.0f} MB)"
        for row in rows
        if row["metric"] == "weights" and row["engine"] == "ours"
    ]


def _engine(row: Row) -> Engine:
    return Engine(row["engine"], row["dtype"])


def _markdown(lines: list[list[str]]) -> str:
    head, *rest = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rest])
