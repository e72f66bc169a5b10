"""What the server has to reach, and whether a result does: one line a target, of what was measured in one run."""

from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

from benchmarks import gemm, workloads
from benchmarks.report import BASELINE, MACHINE, Cell, Place, Row, find, many, pairs, ratios

BF16 = {"avx512_bf16", "amx_bf16"}  # where the engine takes bf16 by itself
ST = Place(BASELINE, "bare")
ORT = Place("onnxruntime-fp32", "bare")
OV = Place("openvino-bf16", "bare")
INFINITY = Place("infinity-emb", "http")
HTTP = Place("ours", "http")
QUERY = Cell("short", 1, 1)
MIXED = Cell("mixed", 32, 8)

Rows = Sequence[Row]


class Target(NamedTuple):
    what: str
    values: list[float]  # one a round, or just one; empty: not measured
    must: float
    goal: float
    form: str  # of one figure
    most: bool = False  # whether figures have to be at most that; otherwise at least

    def line(self) -> str:
        sides = f"must {self.form.format(self.must)}"
        if self.goal != self.must:
            sides += f", goal {self.form.format(self.goal)}"
        if not self.values:
            return f"not measured: {self.what} ({sides})"
        middle = median(self.values)
        figure = self.form.format(middle)
        if len(self.values) > 1:
            figure += f" ({self.form.format(min(self.values))} to {self.form.format(max(self.values))})"
        sign = -1 if self.most else 1
        goal = sign * middle >= sign * self.goal
        met = "met" if sign * middle >= sign * self.must else "NOT MET"
        return f"{met}{', goal too' if goal and self.goal != self.must else ''}: {self.what}: {figure} ({sides})"


def default(features: Sequence[str]) -> Place:
    """Our bare engine in the dtype that the server takes by itself on such a CPU."""
    return Place("ours-bf16" if BF16 & set(features) else "ours-fp32", "bare")


def expectations(rows: Rows, machine: dict[str, Any]) -> list[str]:
    """One line a target: met, NOT MET or not measured."""
    ours = default(machine["features"])
    targets = [*_bare(rows, ours), *_served(rows, ours), *_limits(rows), *_accuracy(rows)]
    failed = sum(sum(r.get("failures", {}).values()) for r in rows if r["metric"] == "sentences_per_s")
    targets.append(Target("requests failed", [failed], 0, 0, "{:.0f}", most=True))
    return [target.line() for target in targets]


def _bare(rows: Rows, ours: Place) -> list[Target]:
    query = find(rows, ours, "p50_ms", QUERY)

    def against(place: Place, workload: str) -> list[float]:
        return speed(rows, ours, workload, place)

    name = f"bare forward ({ours.engine})"
    return [
        Target(f"{name}, mixed, ÷ sentence-transformers fp32", against(ST, "mixed"), 3.5, 5, "{:.2f}×"),
        Target(f"{name}, mixed, ÷ OpenVINO bf16", against(OV, "mixed"), 1.2, 1.6, "{:.2f}×"),
        Target(f"{name}, mixed, ÷ ONNX Runtime fp32", against(ORT, "mixed"), 2.4, 3.3, "{:.2f}×"),
        Target(f"{name}, short, ÷ OpenVINO bf16", against(OV, "short"), 0.95, 1.25, "{:.2f}×"),
        Target(f"{name}, 256 tokens, ÷ OpenVINO bf16", against(OV, "long"), 0.95, 1.2, "{:.2f}×"),
        Target(f"{name}, one short query, p50", query["rounds"] if query else [], 2.2, 1.2, "{:.2f} ms", most=True),
    ]


def _served(rows: Rows, ours: Place) -> list[Target]:
    def apart(metric: str, cell: Cell) -> list[float]:
        return ratios(find(rows, HTTP, metric, cell), find(rows, INFINITY, metric, cell))

    above = [a - b for a, b in pairs(find(rows, HTTP, "p50_ms", QUERY), find(rows, ours, "p50_ms", QUERY))]
    stack, infinity = "the whole stack over HTTP", "÷ infinity-emb over HTTP"
    return [
        Target(f"{stack}, mixed 32×c8, ÷ the bare forward", speed(rows, HTTP, "mixed", ours), 0.8, 0.92, "{:.2f}×"),
        Target(f"{stack}, mixed 32×c8, {infinity}", apart("sentences_per_s", MIXED), 3, 4.5, "{:.2f}×"),
        Target(f"{stack}, short 1×c8, {infinity}", apart("sentences_per_s", Cell("short", 1, 8)), 5, 10, "{:.2f}×"),
        Target(f"{stack}, one query, p50, {infinity}", apart("p50_ms", QUERY), 1 / 4, 1 / 8, "{:.3f}×", most=True),
        Target(f"{stack}, one short query, p50 above the bare forward", above, 2, 1.2, "{:.2f} ms", most=True),
    ]


def _limits(rows: Rows) -> list[Target]:
    bf16 = Place("ours-bf16", "bare")
    speeds = find(rows, bf16, "sentences_per_s", many(bf16, "mixed"))
    ceiling = find(rows, MACHINE, "gflop_per_s", workload="bf16")
    flop = workloads.mean_tokens("mixed") * gemm.NETWORKS["minilm"].flop_a_token
    share = [sentences * flop / (rate * 1e9) for sentences, rate in pairs(speeds, ceiling)]
    peak = find(rows, HTTP, "peak_rss_mb_total", when="after")
    start = find(rows, HTTP, "cold_start_s")
    return [
        Target("ours bare bf16, mixed, tokens/s ÷ what the linears alone would take", share, 0.7, 0.85, "{:.2f}"),
        Target("the whole stack's peak memory", [peak["median"]] if peak else [], 900, 900, "{:.0f} MB", most=True),
        Target("cold start to the first embedding", start["rounds"] if start else [], 8, 8, "{:.1f} s", most=True),
    ]


def _accuracy(rows: Rows) -> list[Target]:
    def figure(engine: str, metric: str) -> list[float]:
        found = find(rows, Place(engine, "bare"), metric)
        return found["rounds"] if found else []

    least = "least cosine to sentence-transformers fp32"
    return [
        Target("ours bf16, mean cosine", figure("ours-bf16", "cosine_mean"), 0.9998, 0.9998, "{:.6f}"),
        Target(f"ours bf16, {least}", figure("ours-bf16", "cosine_least"), 0.999, 0.999, "{:.6f}"),
        Target("ours bf16, ten neighbours the same", figure("ours-bf16", "neighbours_10"), 0.99, 0.99, "{:.4f}"),
        Target(f"ours fp32, {least}", figure("ours-fp32", "cosine_least"), 0.999999, 0.999999, "{:.7f}"),
    ]


def speed(rows: Rows, one: Place, workload: str, other: Place) -> list[float]:
    """Throughput of one place by another's, each in the cell it is judged by."""
    found = (find(rows, place, "sentences_per_s", many(place, workload)) for place in (one, other))
    return ratios(*found)
