"""The CPU benchmark: accuracy figures, ratios, targets, rival engines, and a short run of the command."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import semantic_search
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, BertConfig, BertModel, Qwen3Config

from benchmarks import workloads
from benchmarks.ceiling import gemm
from benchmarks.cpu import __main__ as cpu
from benchmarks.cpu import accuracy, calls, contenders, plots, tables, targets
from benchmarks.cpu.tables import BASELINE, MACHINE, Cell, Contender, Row
from benchmarks.rivals import padded
from benchmarks.worker import Vectors
from conftest import MINILM, ROOT

ST = Contender(BASELINE, "bare")
BF16 = Contender("ours-bf16", "bare")
HTTP = Contender("ours", "http")
TEXTS = ["a", "what is packed, and why?", "one two three " * 30, "vectors", "Ein Satz auf Deutsch.", "x " * 700]


@pytest.fixture(scope="module")
def sentences() -> SentenceTransformer:
    return SentenceTransformer(str(MINILM), device="cpu")


def bert() -> padded.Infer:
    """Return transformers as an engine for padded batches."""
    network = BertModel.from_pretrained(MINILM).eval()

    @torch.inference_mode()
    def infer(batches: Iterable[padded.Batch], deliver: Callable[[padded.Batch, Vectors], None]) -> None:
        for batch in list(batches)[::-1]:  # engines may run batches in any order
            inputs = {name: torch.from_numpy(ids) for name, ids in padded.feed(batch).items()}
            deliver(batch, network(**inputs).last_hidden_state.numpy())

    return infer


@pytest.mark.parametrize("budget", [1, 64, 100_000])
def test_padded_rivals_match_sentence_transformers(sentences: SentenceTransformer, budget: int) -> None:
    engine = padded.Padded(padded.Texts(MINILM / "tokenizer.json", 256), {"torch": bert()}, {})
    vectors = engine.encode("torch", budget)(TEXTS)
    np.testing.assert_allclose(vectors, sentences.encode(TEXTS, normalize_embeddings=True), atol=2e-6)


def test_batches_stay_within_the_budget_including_padding() -> None:
    batches = list(padded.Texts(MINILM / "tokenizer.json", 256).batches(TEXTS * 5, 100))
    assert sorted(row for batch in batches for row in batch.rows) == list(range(30))
    assert all(batch.ids.size <= 100 for batch in batches if len(batch.rows) > 1)
    assert any(len(batch.rows) > 10 for batch in batches)
    assert max(batch.ids.shape[1] for batch in batches) == 256


def test_rival_selects_the_fastest_mode_and_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = {"LATENCY": bert(), "THROUGHPUT": bert()}
    engine = padded.Padded(padded.Texts(MINILM / "tokenizer.json", 256), modes, {"mixed": TEXTS})
    times = {("LATENCY", 1024): 1.0, ("THROUGHPUT", 1024): 0.5, ("THROUGHPUT", 256): 0.1}
    monkeypatch.setattr(engine, "_seconds", lambda mode, budget, texts: times.get((mode, budget), 2.0))
    assert engine("mixed", 128)[1] == "THROUGHPUT, 1024 tokens per batch"
    assert engine("mixed", 1)[1] == "LATENCY"  # single texts always use the latency mode


def test_neighbors_and_cosines_match_sentence_transformers() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(60, 8)).astype(np.float32)
    approximate = (reference + 0.4 * rng.normal(size=reference.shape)).astype(np.float32) * 3  # not unit length
    nearest = []
    for vectors in (approximate, reference):
        hits = semantic_search(torch.from_numpy(vectors), torch.from_numpy(vectors), top_k=11)
        nearest.append([{int(hit["corpus_id"]) for hit in hits[i]} - {i} for i in range(60)])
    expected = np.mean([len(a & b) / 10 for a, b in zip(*nearest, strict=True)])
    cosines = torch.cosine_similarity(torch.from_numpy(approximate).double(), torch.from_numpy(reference).double())
    result = accuracy.compare(approximate, reference)
    assert 0.3 < expected < 0.95
    assert result.neighbors == pytest.approx(expected)
    assert result.cosine_mean == pytest.approx(float(cosines.mean()), abs=1e-12)
    assert result.cosine_min == pytest.approx(float(cosines.min()), abs=1e-12)
    assert accuracy.compare(reference * 2, reference) == pytest.approx((1, 1, 1), abs=1e-12)


CONFIGS = {
    "minilm": lambda: BertConfig.from_pretrained(MINILM),
    "bge-large": lambda: BertConfig(
        hidden_size=1_024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4_096
    ),
    "qwen3-0.6b": lambda: Qwen3Config(
        hidden_size=1_024,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3_072,
    ),
}


@pytest.mark.parametrize("name", gemm.NETWORKS)
def test_ceiling_counts_the_operations_of_the_linears(name: str) -> None:
    with torch.device("meta"):
        network = AutoModel.from_config(CONFIGS[name](), attn_implementation="eager")
        ids = torch.ones(1, 64, dtype=torch.long)
    network.pooler = None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(input_ids=ids)
    linears = sum(flop for op, flop in counter.get_flop_counts()["Global"].items() if "bmm" not in str(op))
    assert linears == 64 * gemm.NETWORKS[name].flop_per_token


@pytest.mark.parametrize("dtype", gemm.DTYPES)
def test_ceiling_is_operations_per_measured_time(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "TOKENS", 8)
    ticks = iter([0.0, 0.5, 1.5, 2.0])
    linears = gemm.Linears(gemm.NETWORKS["minilm"], gemm.DTYPES[dtype])
    monkeypatch.setattr(gemm.time, "perf_counter", lambda: next(ticks))
    with torch.inference_mode():
        rate = gemm.measure(linears, 1.0)["gflop_per_s"]  # two runs in two seconds
    assert rate == pytest.approx(8 * gemm.NETWORKS["minilm"].flop_per_token / 1e9)


def results(*speeds: float, p50: float = 5.0, **fields: Any) -> list[dict[str, Any]]:
    """Return the results of one round per speed."""
    return [{"sentences_per_s": speed, "p50_ms": p50, "p99_ms": 2 * p50, **fields} for speed in speeds]


def rounds() -> tables.Rounds:
    """Return three rounds; in the second, the machine was half as fast."""
    http = Cell("mixed", 32, 8)
    return {
        (MACHINE, Cell("bf16", 1024, 1)): [{"gflop_per_s": rate} for rate in (400.0, 200.0, 400.0)],
        (ST, tables.throughput_cell(ST, "mixed")): results(50, 25, 50),
        (ST, Cell("short", 1, 1)): results(100, 100, 100, p50=10),
        (BF16, tables.throughput_cell(BF16, "mixed")): results(200, 110, 190, way="as it comes"),
        (BF16, Cell("short", 1, 1)): results(500, 500, 500, p50=2),
        (HTTP, http): results(180, 90, 160, failures={"503": 1}),
        (HTTP, Cell("short", 1, 1)): results(300, 300, 300, p50=3.5),
    }


def test_ratios_compare_values_of_the_same_round() -> None:
    rows = tables.make_rows(rounds())
    row = tables.find_row(rows, BF16, "sentences_per_s", tables.throughput_cell(BF16, "mixed"))
    assert row
    assert (row["median"], row["min"], row["max"], row["rounds"]) == (190, 110, 200, [200, 110, 190])
    assert (row["ratio_to_st_fp32"], row["ratio_min"], row["ratio_max"]) == (4, 3.8, 4.4)
    assert row["way"] == "as it comes"
    single = tables.find_row(rows, BF16, "p50_ms", Cell("short", 1, 1))
    assert single
    assert single["ratio_to_st_fp32"] == pytest.approx(0.2)
    large_call = tables.find_row(rows, BF16, "p50_ms", tables.throughput_cell(BF16, "mixed"))
    assert large_call
    assert large_call["ratio_to_st_fp32"] is None  # latency ratios are only for single texts


def test_rounds_without_a_response_are_excluded() -> None:
    no_response = results(0, p50=float("nan"))
    measured = {(ST, Cell("short", 1, 1)): results(1, 1, 1, p50=8), (HTTP, Cell("short", 1, 1)): results(1, p50=4)}
    measured[HTTP, Cell("short", 1, 1)] += no_response + results(1, p50=2)
    row = tables.find_row(tables.make_rows(measured), HTTP, "p50_ms")
    assert row
    assert (row["median"], row["rounds"], row["ratio_to_st_fp32"]) == (3, [4, None, 2], 0.375)
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize(
    ("values", "upper", "prefix"),
    [
        ([], False, "not measured: x (must 2.0, goal 3.0)"),
        ([1.9, 1.9, 5.0], False, "NOT MET: x: 1.9 (1.9 to 5.0)"),
        ([2.0], False, "met: x: 2.0"),
        ([3.0], False, "met, goal too: x: 3.0"),
        ([2.1], True, "NOT MET: x: 2.1"),
        ([2.0], True, "met: x: 2.0"),
    ],
)
def test_target_is_compared_with_the_median(values: list[float], upper: bool, prefix: str) -> None:
    line = targets.Target("x", values, 2, 1 if upper else 3, "{:.1f}", upper=upper).line()
    assert line.replace("goal 1.0", "goal 3.0").startswith(prefix)


def test_every_target_has_a_line() -> None:
    rows = tables.make_rows(rounds())
    rows.append(tables.make_row(HTTP, "peak_rss_mb_total", [500.0], when="before"))
    rows.append(tables.make_row(HTTP, "peak_rss_mb_total", [901.0], when="after"))
    lines = targets.expectations(rows, {"features": ["avx512_bf16"]})
    by_name = {line.partition(": ")[2].partition(":")[0]: line for line in lines}
    assert len(lines) == 19

    def verdict(part: str) -> str:
        (line,) = (line for line in lines if part in line)
        return line.partition(":")[0]

    assert verdict("÷ sentence-transformers fp32") == "met"
    assert verdict("÷ OpenVINO bf16 (must 1.20×") == "not measured"
    assert verdict("÷ the bare forward") == "met"
    assert verdict("above the bare forward") == "met"
    assert verdict("peak memory") == "NOT MET"
    assert verdict("requests failed") == "NOT MET"
    # 200 sentences/s of 66.6 tokens at 21.2 MFLOP per token, compared with 400 GFLOP/s
    share = 200 * workloads.mean_tokens("mixed") * 21.234e6 / 400e9
    assert f" {share:.2f} (" in by_name["ours bare bf16, mixed, tokens/s ÷ what the linears alone would take"]
    without_bf16 = targets.expectations(rows, {"features": ["avx2"]})
    assert sum("bare forward (ours-fp32)" in line for line in without_bf16) == 6


def test_texts_have_the_declared_mean_token_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "_docstrings", lambda path: ())  # package descriptions are enough
    tokenizer = padded.Texts(MINILM / "tokenizer.json", 512).tokenizer
    means = {"short": 12.5, "mixed": workloads.mean_tokens("mixed"), "full": 512}
    for name, block in workloads.texts(1, names=list(means)).items():
        assert sum(len(e.ids) for e in tokenizer.encode_batch(block)) / len(block) == means[name]


def test_longer_checkpoint_differs_only_in_the_limit(tmp_path: Path, sentences: SentenceTransformer) -> None:
    longer = SentenceTransformer(str(contenders.longer_checkpoint(tmp_path / "longer")), device="cpu")
    assert (sentences.max_seq_length, longer.max_seq_length) == (256, 512)
    short = TEXTS[:5]
    np.testing.assert_array_equal(longer.encode(short), sentences.encode(short))


def test_rival_without_an_environment_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(contenders, "RIVALS", ROOT / "nowhere")
    with contenders.ExitStack() as stack:
        launcher = contenders.Launcher(stack, tmp_path / "texts.json", tmp_path)
        assert launcher.engines(["ov-bf16", "infinity"]) == []
    assert launcher.missing == {
        "ov-bf16": "no environment in nowhere/openvino: run `make rivals`",
        "infinity": "no environment in nowhere/infinity: run `make rivals`",
    }
    assert "NOT MEASURED: openvino-bf16, bare: no environment" in capsys.readouterr().out


def test_calls_wrap_around_the_pool_and_yield_percentiles(monkeypatch: pytest.MonkeyPatch) -> None:
    calls_made: list[list[str]] = []

    def encode(texts: list[str]) -> Vectors:
        calls_made.append(texts)
        return np.zeros((len(texts), 2), np.float32)

    ticks = iter([0.0, 1.0, 1.0, 3.0, 3.0])
    monkeypatch.setattr(calls.time, "perf_counter", lambda: next(ticks))
    result = calls.measure(encode, ["a", "b", "c"], 2, 2.0, 2)
    assert calls_made == [["c", "a"], ["b", "c"]]
    assert result == {"sentences_per_s": 4 / 3, "p50_ms": 1000, "p99_ms": 2000}


def test_contenders_are_measured_only_in_supported_cells() -> None:
    served = cpu.FULL.cells(HTTP)
    assert Cell("short", 1, 32) in served
    assert all(cell.workload != "full" for cell in served)
    assert tables.throughput_cell(ST, "full") in cpu.FULL.cells(ST)
    assert {cell.workload for cell in cpu.FULL.cells(MACHINE)} == set(gemm.DTYPES)


# Runs the command with little work and on one core, so that tests running in parallel are not slowed down.
SHORT_RUN = """
import os, sys
from benchmarks import workloads
from benchmarks.cpu import __main__ as cpu
workloads._docstrings = lambda path: ()  # package descriptions are enough
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
cpu.QUICK = cpu.Plan(3, 0.01, ("short",), ("short",), (1,), 32, 12, 0)
cpu.main()
"""


def test_command_writes_the_result_file_and_plots(tmp_path: Path) -> None:
    """Run the command with the engines that need no separate environment."""
    out = tmp_path / "cpu.json"
    command = [sys.executable, "-c", SHORT_RUN, "--quick", "--engines", "machine,st-fp32,ours-fp32", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert process.returncode == 0, process.stderr
    result = json.loads(out.read_text())
    assert {"machine", "versions", "command", "rows", "not_measured", "texts"} <= result.keys()
    required = {"engine", "where", "workload", "metric", "median", "min", "max", "ratio_to_st_fp32"}
    assert all(required <= row.keys() for row in result["rows"])
    contenders_measured = {Contender(row["engine"], row["where"]) for row in result["rows"]}
    assert contenders_measured == {MACHINE, ST, Contender("ours-fp32", "bare")}
    rows: list[Row] = result["rows"]
    lowest = tables.find_row(rows, Contender("ours-fp32", "bare"), "cosine_least")
    assert lowest
    assert lowest["median"] > 0.999999
    assert "met: ours fp32, least cosine" in process.stdout
    assert "| ours-fp32, bare | " in process.stdout
    for plot in (plots.throughput, plots.latency, plots.accuracy):
        assert (tmp_path / f"cpu-{plot.__name__}.png").stat().st_size > 10_000
