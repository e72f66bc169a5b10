"""Performance targets of the server, checked against the rows of one run: one line per target."""

from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

from benchmarks import workloads
from benchmarks.ceiling import gemm
from benchmarks.cpu.tables import BASELINE, MACHINE, Cell, Contender, Row, find_row, pairs, ratios, throughput_cell

BF16 = {"avx512_bf16", "amx_bf16"}  # CPU features with which the engine selects bf16 by default
ST = Contender(BASELINE, "bare")
ORT = Contender("onnxruntime-fp32", "bare")
OV = Contender("openvino-bf16", "bare")
INFINITY = Contender("infinity-emb", "http")
HTTP = Contender("ours", "http")
QUERY = Cell("short", 1, 1)
MIXED = Cell("mixed", 32, 8)

Rows = Sequence[Row]


class Target(NamedTuple):
    """A target and the measured values."""

    name: str
    values: list[float]  # one per round, or a single one; empty: not measured
    must: float
    goal: float
    form: str  # format string of one value
    upper: bool = False  # whether `must` and `goal` are upper limits; default: lower limits

    def line(self) -> str:
        """Format the verdict, the median with its range, and the limits."""
        limits = f"must {self.form.format(self.must)}"
        if self.goal != self.must:
            limits += f", goal {self.form.format(self.goal)}"
        if not self.values:
            return f"not measured: {self.name} ({limits})"
        middle = median(self.values)
        figure = self.form.format(middle)
        if len(self.values) > 1:
            figure += f" ({self.form.format(min(self.values))} to {self.form.format(max(self.values))})"
        sign = -1 if self.upper else 1
        goal = sign * middle >= sign * self.goal
        met = "met" if sign * middle >= sign * self.must else "NOT MET"
        return f"{met}{', goal too' if goal and self.goal != self.must else ''}: {self.name}: {figure} ({limits})"


def default_contender(features: Sequence[str]) -> Contender:
    """Return our in-process engine in the dtype that the server selects by default on a CPU with these features."""
    return Contender("ours-bf16" if BF16 & set(features) else "ours-fp32", "bare")


def expectations(rows: Rows, machine: dict[str, Any]) -> list[str]:
    """Return one line per target: met, NOT MET or not measured."""
    ours = default_contender(machine["features"])
    targets = [*_bare(rows, ours), *_served(rows, ours), *_limits(rows), *_accuracy(rows)]
    failed = sum(sum(r.get("failures", {}).values()) for r in rows if r["metric"] == "sentences_per_s")
    targets.append(Target("requests failed", [failed], 0, 0, "{:.0f}", upper=True))
    return [target.line() for target in targets]


def _bare(rows: Rows, ours: Contender) -> list[Target]:
    query = find_row(rows, ours, "p50_ms", QUERY)

    def speedup_over(contender: Contender, workload: str) -> list[float]:
        return throughput_ratios(rows, ours, workload, contender)

    name = f"bare forward ({ours.engine})"
    return [
        Target(f"{name}, mixed, ÷ sentence-transformers fp32", speedup_over(ST, "mixed"), 3.5, 5, "{:.2f}×"),
        Target(f"{name}, mixed, ÷ OpenVINO bf16", speedup_over(OV, "mixed"), 1.2, 1.6, "{:.2f}×"),
        Target(f"{name}, mixed, ÷ ONNX Runtime fp32", speedup_over(ORT, "mixed"), 2.4, 3.3, "{:.2f}×"),
        Target(f"{name}, short, ÷ OpenVINO bf16", speedup_over(OV, "short"), 0.95, 1.25, "{:.2f}×"),
        Target(f"{name}, 256 tokens, ÷ OpenVINO bf16", speedup_over(OV, "long"), 0.95, 1.2, "{:.2f}×"),
        Target(f"{name}, one short query, p50", query["rounds"] if query else [], 2.2, 1.2, "{:.2f} ms", upper=True),
    ]


def _served(rows: Rows, ours: Contender) -> list[Target]:
    def infinity_ratios(metric: str, cell: Cell) -> list[float]:
        return ratios(find_row(rows, HTTP, metric, cell), find_row(rows, INFINITY, metric, cell))

    added_ms = [a - b for a, b in pairs(find_row(rows, HTTP, "p50_ms", QUERY), find_row(rows, ours, "p50_ms", QUERY))]
    stack, infinity = "the whole stack over HTTP", "÷ infinity-emb over HTTP"
    return [
        Target(
            f"{stack}, mixed 32×c8, ÷ the bare forward",
            throughput_ratios(rows, HTTP, "mixed", ours),
            0.8,
            0.92,
            "{:.2f}×",
        ),
        Target(f"{stack}, mixed 32×c8, {infinity}", infinity_ratios("sentences_per_s", MIXED), 3, 4.5, "{:.2f}×"),
        Target(
            f"{stack}, short 1×c8, {infinity}",
            infinity_ratios("sentences_per_s", Cell("short", 1, 8)),
            5,
            10,
            "{:.2f}×",
        ),
        Target(
            f"{stack}, one query, p50, {infinity}",
            infinity_ratios("p50_ms", QUERY),
            1 / 4,
            1 / 8,
            "{:.3f}×",
            upper=True,
        ),
        Target(f"{stack}, one short query, p50 above the bare forward", added_ms, 2, 1.2, "{:.2f} ms", upper=True),
    ]


def _limits(rows: Rows) -> list[Target]:
    bf16 = Contender("ours-bf16", "bare")
    speeds = find_row(rows, bf16, "sentences_per_s", throughput_cell(bf16, "mixed"))
    ceiling = find_row(rows, MACHINE, "gflop_per_s", workload="bf16")
    flop = workloads.mean_tokens("mixed") * gemm.NETWORKS["minilm"].flop_per_token
    share = [sentences * flop / (rate * 1e9) for sentences, rate in pairs(speeds, ceiling)]
    peak = find_row(rows, HTTP, "peak_rss_mb_total", when="after")
    start = find_row(rows, HTTP, "cold_start_s")
    return [
        Target("ours bare bf16, mixed, tokens/s ÷ what the linears alone would take", share, 0.7, 0.85, "{:.2f}"),
        Target("the whole stack's peak memory", [peak["median"]] if peak else [], 900, 900, "{:.0f} MB", upper=True),
        Target("cold start to the first embedding", start["rounds"] if start else [], 8, 8, "{:.1f} s", upper=True),
    ]


def _accuracy(rows: Rows) -> list[Target]:
    def values(engine: str, metric: str) -> list[float]:
        row = find_row(rows, Contender(engine, "bare"), metric)
        return row["rounds"] if row else []

    lowest = "least cosine to sentence-transformers fp32"
    return [
        Target("ours bf16, mean cosine", values("ours-bf16", "cosine_mean"), 0.9998, 0.9998, "{:.6f}"),
        Target(f"ours bf16, {lowest}", values("ours-bf16", "cosine_least"), 0.999, 0.999, "{:.6f}"),
        Target("ours bf16, ten neighbours the same", values("ours-bf16", "neighbours_10"), 0.99, 0.99, "{:.4f}"),
        Target(f"ours fp32, {lowest}", values("ours-fp32", "cosine_least"), 0.999999, 0.999999, "{:.7f}"),
    ]


def throughput_ratios(rows: Rows, a: Contender, workload: str, b: Contender) -> list[float]:
    """Return the throughput of `a` divided by that of `b` per round, each in the cell in which it is compared."""
    return ratios(
        *(find_row(rows, contender, "sentences_per_s", throughput_cell(contender, workload)) for contender in (a, b))
    )
