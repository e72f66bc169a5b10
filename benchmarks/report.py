"""From measured rounds to rows, from rows to the table and the expected figures.

A row: engine, where, workload, inputs (texts a call), concurrency (calls in flight), failures by status, the
metric's median, min and max over the rounds, ratio_to_st_fp32 (of medians). Memory rows name the process.
"""

import math
from collections.abc import Iterable
from statistics import median
from typing import Any, NamedTuple

BASELINE = "sentence-transformers-fp32"
MANY = 128  # texts a call in-process: sentence-transformers sorts them by length, which is its best


class Cell(NamedTuple):
    workload: str
    inputs: int  # texts a call
    concurrency: int


class Place(NamedTuple):
    engine: str
    where: str  # "bare", "http" or "grpc"


Row = dict[str, Any]
Rounds = dict[tuple[Place, Cell], list[dict[str, Any]]]


def row(place: Place, metric: str, values: Iterable[float], **about: Any) -> Row:
    values = list(values)
    spread = {"median": median(values), "min": min(values), "max": max(values)}
    who = {"engine": place.engine, "where": place.where, "workload": "all"}
    return who | about | {"metric": metric} | spread | {"ratio_to_st_fp32": None}


def rows(rounds: Rounds) -> list[Row]:
    """One row a cell and metric. Ratios are of medians: throughput to the baseline's on the same workload,
    the latency of single texts to the baseline's."""
    made = []
    for (place, cell), results in rounds.items():
        failures: dict[str, int] = {}
        for result in results:
            for status, count in result.get("failures", {}).items():
                failures[status] = failures.get(status, 0) + count
        for metric in ("sentences_per_s", "p50_ms", "p99_ms"):
            values = [result[metric] for result in results if not math.isnan(result[metric])]
            if values:
                made.append(row(place, metric, values, **cell._asdict(), failures=failures))
    baseline = Place(BASELINE, "bare")
    for r in made:
        single = r["inputs"] == 1 and r["concurrency"] == 1
        reference = Cell(r["workload"], 1 if r["metric"] == "p50_ms" else MANY, 1)
        base = find(made, baseline, r["metric"], reference)
        if base and (r["metric"] == "sentences_per_s" or (single and r["metric"] == "p50_ms")):
            r["ratio_to_st_fp32"] = r["median"] / base["median"]
    return made


def find(rows: list[Row], place: Place, metric: str, cell: Cell | None = None) -> Row | None:
    wanted = place._asdict() | {"metric": metric} | (cell._asdict() if cell else {})
    return next((r for r in rows if wanted.items() <= r.items()), None)


def table(rows: list[Row]) -> str:
    """Markdown, a line an engine. Served: 32 inputs a request, 8 in flight; one text: one in flight."""
    places = list(dict.fromkeys(Place(r["engine"], r["where"]) for r in rows))
    columns = ["engine", "short, sentences/s", "mixed", "long", "one short query, p50 ms", "one long text"]
    columns += ["cosine, least", "peak MB"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for place in places:
        bare = place.where == "bare"
        many = [(w, MANY, 1) if bare else (w, 32, 8) for w in ("short", "mixed", "long")]
        cells = [find(rows, place, "sentences_per_s", Cell(*cell)) for cell in many]
        cells += [find(rows, place, "p50_ms", Cell(w, 1, 1)) for w in ("short", "long")]
        cosine = find(rows, place, "cosine_least")
        weight = find(rows, place, "peak_rss_mb_total")
        figures = [_figure(cell) for cell in cells]
        figures.append(f"{cosine['median']:.6f}" if cosine else "–")
        figures.append(f"{weight['median']:,.0f}" if weight else "–")
        lines.append(f"| {place.engine}, {place.where} | {' | '.join(figures)} |")
    return "\n".join(lines)


def _figure(r: Row | None) -> str:
    if r is None:
        return "–"
    ratio = r["ratio_to_st_fp32"]
    return amount(r["median"]) + ("" if ratio is None else f" ({ratio:.2f}×)")


def amount(value: float) -> str:
    """Three figures, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def expectations(rows: list[Row]) -> list[str]:
    """One line an expected figure: what was measured, met or not."""
    lines = []
    through = find(rows, Place("ours", "http"), "sentences_per_s", Cell("mixed", 32, 8))
    if through and (ratio := through["ratio_to_st_fp32"]):
        what = f"mixed lengths through the whole stack: {ratio:.2f}× {BASELINE} in-process"
        lines.append(f"{_met(ratio >= 1.5)}: {what} (expected at least 1.5×)")
    served = find(rows, Place("ours", "http"), "p50_ms", Cell("short", 1, 1))
    bare = find(rows, Place("ours", "bare"), "p50_ms", Cell("short", 1, 1))
    if served and bare:
        above = served["median"] - bare["median"]
        what = f"one short query through the gateway: {above:.2f} ms above the bare forward, p50"
        lines.append(f"{_met(above <= 2)}: {what} (expected at most 2 ms)")
    failed = sum(sum(r.get("failures", {}).values()) for r in rows if r["metric"] == "sentences_per_s")
    lines.append(f"{_met(not failed)}: {failed} requests failed (expected none)")
    return lines


def _met(met: bool) -> str:
    return "met" if met else "NOT MET"
