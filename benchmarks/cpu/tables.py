"""Convert measured rounds to result rows, and rows to Markdown tables.

Keys of a row: engine, where, workload, inputs (texts per call), concurrency (calls in flight), failures by status, way
(execution mode, if the engine has several), the metric, its median, min, max and value per round, and ratio_to_st_fp32
with ratio_min and ratio_max: the median and the spread of the per-round ratios. Memory rows also name the process.
"""

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any, NamedTuple

from benchmarks.report import format_number, markdown_table

BASELINE = "sentence-transformers-fp32"
LARGE_CALL = 128  # texts per in-process call: sentence-transformers sorts them by length, which suits it best
SMALL_CALL = 32  # texts per call if all have the same length or are long
METRICS = ("sentences_per_s", "p50_ms", "p99_ms", "gflop_per_s")


class Cell(NamedTuple):
    """One point of measurement: a workload and how it is sent."""

    workload: str
    inputs: int  # texts per call
    concurrency: int  # calls in flight


class Contender(NamedTuple):
    """An engine and how it is reached."""

    engine: str
    where: str  # "bare", "http" or "grpc"


MACHINE = Contender("machine", "bare")  # not an engine: the ceiling of its matrix products

Row = dict[str, Any]
Rounds = dict[tuple[Contender, Cell], list[dict[str, Any]]]


def throughput_cell(contender: Contender, workload: str) -> Cell:
    """Return the cell in which the throughput of a contender is compared."""
    if contender.where != "bare":
        return Cell(workload, 32, 8)
    return Cell(workload, SMALL_CALL if workload == "full" else LARGE_CALL, 1)


def make_row(contender: Contender, metric: str, values: Iterable[float], **fields: Any) -> Row:
    """Return the row of a metric. `values`: one per round, NaN for a round without a value; at least one number."""
    values = list(values)
    numbers = [value for value in values if not math.isnan(value)]
    spread = {"median": median(numbers), "min": min(numbers), "max": max(numbers)}
    identity = {"engine": contender.engine, "where": contender.where, "workload": "all"}
    rounds = [None if math.isnan(value) else value for value in values]
    ratios = {"ratio_to_st_fp32": None, "ratio_min": None, "ratio_max": None}
    return identity | fields | {"metric": metric} | spread | {"rounds": rounds} | ratios


def make_rows(rounds: Rounds) -> list[Row]:
    """Return one row per cell and metric.

    Throughput is divided by the baseline's in-process throughput on the same workload, and the p50 latency of single
    texts by the baseline's.
    """
    rows = []
    for (contender, cell), results in rounds.items():
        failures: dict[str, int] = {}
        for result in results:
            for status, count in result.get("failures", {}).items():
                failures[status] = failures.get(status, 0) + count
        fields = {**cell._asdict(), "failures": failures}
        if way := results[-1].get("way"):
            fields["way"] = way
        for metric in METRICS:
            values = [result.get(metric, math.nan) for result in results]
            if not all(map(math.isnan, values)):
                rows.append(make_row(contender, metric, values, **fields))
    baseline = Contender(BASELINE, "bare")
    for row in rows:
        single = row["inputs"] == 1 and row["concurrency"] == 1
        reference = (
            Cell(row["workload"], 1, 1) if row["metric"] == "p50_ms" else throughput_cell(baseline, row["workload"])
        )
        if row["metric"] == "sentences_per_s" or (single and row["metric"] == "p50_ms"):
            values = ratios(row, find_row(rows, baseline, row["metric"], reference))
            if values:
                row["ratio_to_st_fp32"] = median(values)
                row["ratio_min"], row["ratio_max"] = min(values), max(values)
    return rows


def pairs(a: Row | None, b: Row | None) -> list[tuple[float, float]]:
    """Return the values of two rows, paired by round; empty if either row is missing."""
    if not a or not b:
        return []
    values = zip(a["rounds"], b["rounds"], strict=True)
    return [(x, y) for x, y in values if x is not None and y is not None]


def ratios(a: Row | None, b: Row | None) -> list[float]:
    """Return a / b of each round."""
    return [x / y for x, y in pairs(a, b) if y]


def find_row(
    rows: Sequence[Row], contender: Contender, metric: str, cell: Cell | None = None, **fields: Any
) -> Row | None:
    """Return the first row that matches, or None."""
    criteria = contender._asdict() | {"metric": metric} | (cell._asdict() if cell else {}) | fields
    return next((row for row in rows if criteria.items() <= row.items()), None)


def list_contenders(rows: Sequence[Row]) -> list[Contender]:
    """Return the contenders of the rows, without the machine itself."""
    unique = dict.fromkeys(Contender(row["engine"], row["where"]) for row in rows)
    return [contender for contender in unique if contender != MACHINE]


def table(rows: Sequence[Row]) -> str:
    """Return the Markdown table of all contenders.

    Served throughput: 32 inputs per request, 8 requests in flight. Single texts: one request in flight.
    """
    columns = ["engine", "short, sentences/s", "mixed", "256 tokens", "512 tokens"]
    columns += ["one short query, p50 ms", "one of 256 tokens", "cosine, mean", "least", "neighbours", "peak MB"]
    lines = [columns]
    for contender in list_contenders(rows):
        cells = [
            find_row(rows, contender, "sentences_per_s", throughput_cell(contender, w))
            for w in ("short", "mixed", "long", "full")
        ]
        cells += [find_row(rows, contender, "p50_ms", Cell(w, 1, 1)) for w in ("short", "long")]
        figures = [_figure(cell) for cell in cells]
        for metric, form in (
            ("cosine_mean", ".6f"),
            ("cosine_least", ".6f"),
            ("neighbours_10", ".3f"),
            ("peak_rss_mb_total", ",.0f"),
        ):
            row = find_row(rows, contender, metric, **({"when": "after"} if metric == "peak_rss_mb_total" else {}))
            figures.append(format(row["median"], form) if row else "–")
        lines.append([f"{contender.engine}, {contender.where}", *figures])
    return markdown_table(lines)


def served_table(rows: Sequence[Row]) -> str:
    """Return the Markdown table of the servers: one short text per request, by requests in flight."""
    concurrencies = sorted({row["concurrency"] for row in rows if row["where"] != "bare" and row.get("inputs") == 1})
    columns = ["server, one short text a request"]
    columns += [f"{c} in flight: requests/s, p50 / p99 ms" for c in concurrencies]
    lines = [columns]
    for contender in (contender for contender in list_contenders(rows) if contender.where != "bare"):
        figures = []
        for c in concurrencies:
            cells = [find_row(rows, contender, metric, Cell("short", 1, c)) for metric in METRICS[:3]]
            speed, p50, p99 = (format_number(cell["median"]) if cell else "–" for cell in cells)
            figures.append(f"{speed}, {p50} / {p99}")
        lines.append([f"{contender.engine}, {contender.where}", *figures])
    return markdown_table(lines)


def _figure(row: Row | None) -> str:
    """Format the median, and its ratio to sentence-transformers with the spread over the rounds."""
    if row is None:
        return "–"
    if row["ratio_to_st_fp32"] is None:
        return format_number(row["median"])
    ratio = f"{row['ratio_to_st_fp32']:.2f}×, {row['ratio_min']:.2f}–{row['ratio_max']:.2f}"
    return f"{format_number(row['median'])} ({ratio})"
