"""From measured rounds to rows, and from rows to the tables.

A row: engine, where, workload, inputs (texts a call), concurrency (calls in flight), failures by status, way (how the
engine took the texts, where it has several), the metric's median, min, max and its value in each round,
ratio_to_st_fp32 with ratio_min and ratio_max: the median and the spread of the ratios of each round. Memory rows name
the process.
"""

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any, NamedTuple

BASELINE = "sentence-transformers-fp32"
MANY = 128  # texts a call in-process: sentence-transformers sorts them by length, which is its best
FEW = 32  # where all texts have the same length, or are long
METRICS = ("sentences_per_s", "p50_ms", "p99_ms", "gflop_per_s")


class Cell(NamedTuple):
    workload: str
    inputs: int  # texts a call
    concurrency: int


class Place(NamedTuple):
    engine: str
    where: str  # "bare", "http" or "grpc"


MACHINE = Place("machine", "bare")  # no engine: what its cores multiply at most

Row = dict[str, Any]
Rounds = dict[tuple[Place, Cell], list[dict[str, Any]]]


def many(place: Place, workload: str) -> Cell:
    """The cell that a place's throughput is judged by."""
    if place.where != "bare":
        return Cell(workload, 32, 8)
    return Cell(workload, FEW if workload == "full" else MANY, 1)


def row(place: Place, metric: str, values: Iterable[float], **about: Any) -> Row:
    """`values`: one a round; NaN where a round gave none, but not in all."""
    values = list(values)
    known = [value for value in values if not math.isnan(value)]
    spread = {"median": median(known), "min": min(known), "max": max(known)}
    who = {"engine": place.engine, "where": place.where, "workload": "all"}
    rounds = [None if math.isnan(value) else value for value in values]
    ratios = {"ratio_to_st_fp32": None, "ratio_min": None, "ratio_max": None}
    return who | about | {"metric": metric} | spread | {"rounds": rounds} | ratios


def rows(rounds: Rounds) -> list[Row]:
    """One row a cell and metric. Ratios: throughput to the baseline's in-process on the same workload, the latency of
    single texts to the baseline's."""
    made = []
    for (place, cell), results in rounds.items():
        failures: dict[str, int] = {}
        for result in results:
            for status, count in result.get("failures", {}).items():
                failures[status] = failures.get(status, 0) + count
        about = {**cell._asdict(), "failures": failures}
        if way := results[-1].get("way"):
            about["way"] = way
        for metric in METRICS:
            values = [result.get(metric, math.nan) for result in results]
            if not all(map(math.isnan, values)):
                made.append(row(place, metric, values, **about))
    baseline = Place(BASELINE, "bare")
    for r in made:
        single = r["inputs"] == 1 and r["concurrency"] == 1
        reference = Cell(r["workload"], 1, 1) if r["metric"] == "p50_ms" else many(baseline, r["workload"])
        if r["metric"] == "sentences_per_s" or (single and r["metric"] == "p50_ms"):
            found = ratios(r, find(made, baseline, r["metric"], reference))
            if found:
                r["ratio_to_st_fp32"] = median(found)
                r["ratio_min"], r["ratio_max"] = min(found), max(found)
    return made


def pairs(one: Row | None, other: Row | None) -> list[tuple[float, float]]:
    """The values of two rows, round by round; empty where either is missing."""
    if not one or not other:
        return []
    both = zip(one["rounds"], other["rounds"], strict=True)
    return [(a, b) for a, b in both if a is not None and b is not None]


def ratios(one: Row | None, other: Row | None) -> list[float]:
    return [a / b for a, b in pairs(one, other) if b]


def find(rows: Sequence[Row], place: Place, metric: str, cell: Cell | None = None, **about: Any) -> Row | None:
    wanted = place._asdict() | {"metric": metric} | (cell._asdict() if cell else {}) | about
    return next((r for r in rows if wanted.items() <= r.items()), None)


def places(rows: Sequence[Row]) -> list[Place]:
    found = dict.fromkeys(Place(r["engine"], r["where"]) for r in rows)
    return [place for place in found if place != MACHINE]


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line an engine. Served: 32 inputs a request, 8 in flight; one text: one in flight."""
    columns = ["engine", "short, sentences/s", "mixed", "256 tokens", "512 tokens"]
    columns += ["one short query, p50 ms", "one of 256 tokens", "cosine, mean", "least", "neighbours", "peak MB"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for place in places(rows):
        cells = [find(rows, place, "sentences_per_s", many(place, w)) for w in ("short", "mixed", "long", "full")]
        cells += [find(rows, place, "p50_ms", Cell(w, 1, 1)) for w in ("short", "long")]
        figures = [_figure(cell) for cell in cells]
        for metric, form in (
            ("cosine_mean", ".6f"),
            ("cosine_least", ".6f"),
            ("neighbours_10", ".3f"),
            ("peak_rss_mb_total", ",.0f"),
        ):
            found = find(rows, place, metric, **({"when": "after"} if metric == "peak_rss_mb_total" else {}))
            figures.append(format(found["median"], form) if found else "–")
        lines.append(f"| {place.engine}, {place.where} | {' | '.join(figures)} |")
    return "\n".join(lines)


def served_table(rows: Sequence[Row]) -> str:
    """Markdown, a line a server: one short text a request, by requests in flight."""
    concurrencies = sorted({r["concurrency"] for r in rows if r["where"] != "bare" and r.get("inputs") == 1})
    columns = ["server, one short text a request"]
    columns += [f"{c} in flight: requests/s, p50 / p99 ms" for c in concurrencies]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for place in (place for place in places(rows) if place.where != "bare"):
        figures = []
        for c in concurrencies:
            found = [find(rows, place, metric, Cell("short", 1, c)) for metric in METRICS[:3]]
            speed, p50, p99 = (amount(r["median"]) if r else "–" for r in found)
            figures.append(f"{speed}, {p50} / {p99}")
        lines.append(f"| {place.engine}, {place.where} | {' | '.join(figures)} |")
    return "\n".join(lines)


def _figure(r: Row | None) -> str:
    """The median, and its ratio to sentence-transformers with the spread over the rounds."""
    if r is None:
        return "–"
    if r["ratio_to_st_fp32"] is None:
        return amount(r["median"])
    return f"{amount(r['median'])} ({r['ratio_to_st_fp32']:.2f}×, {r['ratio_min']:.2f}–{r['ratio_max']:.2f})"


def amount(value: float) -> str:
    """Three figures, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
