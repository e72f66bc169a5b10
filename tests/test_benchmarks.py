"""The benchmark on a CPU, rehearsed: what is judged by whom, what becomes of the rounds, and one run of the command."""

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

from benchmarks import accuracy, calls, contenders, cpu, gemm, plots, report, targets, workloads
from benchmarks.report import BASELINE, MACHINE, Cell, Place, Row
from benchmarks.rivals import padded
from benchmarks.worker import Vectors
from conftest import MINILM, ROOT

ST = Place(BASELINE, "bare")
BF16 = Place("ours-bf16", "bare")
HTTP = Place("ours", "http")
TEXTS = ["a", "what is packed, and why?", "one two three " * 30, "vectors", "Ein Satz auf Deutsch.", "x " * 700]


@pytest.fixture(scope="module")
def sentences() -> SentenceTransformer:
    return SentenceTransformer(str(MINILM), device="cpu")


def bert() -> padded.Infer:
    """transformers as an engine for padded batches."""
    network = BertModel.from_pretrained(MINILM).eval()

    @torch.inference_mode()
    def infer(batches: Iterable[padded.Batch], take: Callable[[padded.Batch, Vectors], None]) -> None:
        for batch in list(batches)[::-1]:  # the order is the engine's own
            given = {name: torch.from_numpy(ids) for name, ids in padded.feed(batch).items()}
            take(batch, network(**given).last_hidden_state.numpy())

    return infer


@pytest.mark.parametrize("budget", [1, 64, 100_000])
def test_rivals_pad_pool_and_normalise_as_sentence_transformers_does(
    sentences: SentenceTransformer, budget: int
) -> None:
    engine = padded.Padded(padded.Texts(MINILM / "tokenizer.json", 256), {"torch": bert()}, {})
    found = engine.encode("torch", budget)(TEXTS)
    np.testing.assert_allclose(found, sentences.encode(TEXTS, normalize_embeddings=True), atol=2e-6)


def test_a_batch_of_several_keeps_to_its_budget_with_the_padding_counted() -> None:
    batches = list(padded.Texts(MINILM / "tokenizer.json", 256).batches(TEXTS * 5, 100))
    assert sorted(row for batch in batches for row in batch.rows) == list(range(30))
    assert all(batch.ids.size <= 100 for batch in batches if len(batch.rows) > 1)
    assert any(len(batch.rows) > 10 for batch in batches)
    assert max(batch.ids.shape[1] for batch in batches) == 256


def test_a_rival_takes_the_way_and_the_budget_that_were_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {"LATENCY": bert(), "THROUGHPUT": bert()}
    engine = padded.Padded(padded.Texts(MINILM / "tokenizer.json", 256), ways, {"mixed": TEXTS})
    times = {("LATENCY", 1024): 1.0, ("THROUGHPUT", 1024): 0.5, ("THROUGHPUT", 256): 0.1}
    monkeypatch.setattr(engine, "_seconds", lambda way, budget, texts: times.get((way, budget), 2.0))
    assert engine("mixed", 128)[1] == "THROUGHPUT, 1024 tokens a batch"
    assert engine("mixed", 1)[1] == "LATENCY"  # of a single text latency is what counts


def test_neighbours_and_cosines_are_those_that_sentence_transformers_finds() -> None:
    draw = np.random.default_rng(0)
    truth = draw.normal(size=(60, 8)).astype(np.float32)
    found = (truth + 0.4 * draw.normal(size=truth.shape)).astype(np.float32) * 3  # of whatever length
    nearest = []
    for vectors in (found, truth):
        hits = semantic_search(torch.from_numpy(vectors), torch.from_numpy(vectors), top_k=11)
        nearest.append([{int(hit["corpus_id"]) for hit in hits[i]} - {i} for i in range(60)])
    expected = np.mean([len(a & b) / 10 for a, b in zip(*nearest, strict=True)])
    cosines = torch.cosine_similarity(torch.from_numpy(found).double(), torch.from_numpy(truth).double())
    judged = accuracy.judge(found, truth)
    assert 0.3 < expected < 0.95
    assert judged.neighbours == pytest.approx(expected)
    assert judged.cosine_mean == pytest.approx(float(cosines.mean()), abs=1e-12)
    assert judged.cosine_least == pytest.approx(float(cosines.min()), abs=1e-12)
    assert accuracy.judge(truth * 2, truth) == pytest.approx((1, 1, 1), abs=1e-12)


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
def test_the_ceiling_counts_the_operations_of_the_networks_own_linears(name: str) -> None:
    with torch.device("meta"):
        network = AutoModel.from_config(CONFIGS[name](), attn_implementation="eager")
        ids = torch.ones(1, 64, dtype=torch.long)
    network.pooler = None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(input_ids=ids)
    linears = sum(flop for op, flop in counter.get_flop_counts()["Global"].items() if "bmm" not in str(op))
    assert linears == 64 * gemm.NETWORKS[name].flop_a_token


@pytest.mark.parametrize("dtype", gemm.DTYPES)
def test_a_ceiling_is_what_the_clock_says_of_its_operations(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "TOKENS", 8)
    ticks = iter([0.0, 0.5, 1.5, 2.0])
    linears = gemm.Linears(gemm.NETWORKS["minilm"], gemm.DTYPES[dtype])
    monkeypatch.setattr(gemm.time, "perf_counter", lambda: next(ticks))
    with torch.inference_mode():
        found = gemm.measure(linears, 1.0)["gflop_per_s"]  # two networks, two seconds
    assert found == pytest.approx(8 * gemm.NETWORKS["minilm"].flop_a_token / 1e9)


def results(*speeds: float, p50: float = 5.0, **more: Any) -> list[dict[str, Any]]:
    return [{"sentences_per_s": speed, "p50_ms": p50, "p99_ms": 2 * p50, **more} for speed in speeds]


def rounds() -> report.Rounds:
    """Three rounds, in the second of which the whole machine was half as fast."""
    http = Cell("mixed", 32, 8)
    return {
        (MACHINE, Cell("bf16", 1024, 1)): [{"gflop_per_s": rate} for rate in (400.0, 200.0, 400.0)],
        (ST, report.many(ST, "mixed")): results(50, 25, 50),
        (ST, Cell("short", 1, 1)): results(100, 100, 100, p50=10),
        (BF16, report.many(BF16, "mixed")): results(200, 110, 190, way="as it comes"),
        (BF16, Cell("short", 1, 1)): results(500, 500, 500, p50=2),
        (HTTP, http): results(180, 90, 160, failures={"503": 1}),
        (HTTP, Cell("short", 1, 1)): results(300, 300, 300, p50=3.5),
    }


def test_a_ratio_is_of_two_figures_of_one_round() -> None:
    rows = report.rows(rounds())
    row = report.find(rows, BF16, "sentences_per_s", report.many(BF16, "mixed"))
    assert row
    assert (row["median"], row["min"], row["max"], row["rounds"]) == (190, 110, 200, [200, 110, 190])
    assert (row["ratio_to_st_fp32"], row["ratio_min"], row["ratio_max"]) == (4, 3.8, 4.4)
    assert row["way"] == "as it comes"
    single = report.find(rows, BF16, "p50_ms", Cell("short", 1, 1))
    assert single
    assert single["ratio_to_st_fp32"] == pytest.approx(0.2)
    many = report.find(rows, BF16, "p50_ms", report.many(BF16, "mixed"))
    assert many
    assert many["ratio_to_st_fp32"] is None  # calls of 128 texts have no latency to speak of


def test_a_round_without_an_answer_is_left_out_of_the_figures_and_of_ratios() -> None:
    nothing = results(0, p50=float("nan"))
    both = {(ST, Cell("short", 1, 1)): results(1, 1, 1, p50=8), (HTTP, Cell("short", 1, 1)): results(1, p50=4)}
    both[HTTP, Cell("short", 1, 1)] += nothing + results(1, p50=2)
    row = report.find(report.rows(both), HTTP, "p50_ms")
    assert row
    assert (row["median"], row["rounds"], row["ratio_to_st_fp32"]) == (3, [4, None, 2], 0.375)
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize(
    ("values", "most", "begins"),
    [
        ([], False, "not measured: x (must 2.0, goal 3.0)"),
        ([1.9, 1.9, 5.0], False, "NOT MET: x: 1.9 (1.9 to 5.0)"),
        ([2.0], False, "met: x: 2.0"),
        ([3.0], False, "met, goal too: x: 3.0"),
        ([2.1], True, "NOT MET: x: 2.1"),
        ([2.0], True, "met: x: 2.0"),
    ],
)
def test_the_median_is_held_against_the_target(values: list[float], most: bool, begins: str) -> None:
    line = targets.Target("x", values, 2, 1 if most else 3, "{:.1f}", most=most).line()
    assert line.replace("goal 1.0", "goal 3.0").startswith(begins)


def test_every_target_has_its_line() -> None:
    rows = report.rows(rounds())
    rows.append(report.row(HTTP, "peak_rss_mb_total", [500.0], when="before"))
    rows.append(report.row(HTTP, "peak_rss_mb_total", [901.0], when="after"))
    lines = targets.expectations(rows, {"features": ["avx512_bf16"]})
    found = {line.partition(": ")[2].partition(":")[0]: line for line in lines}
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
    # 200 sentences of 66.6 tokens at 21.2 MFLOP in a second, of 400 GFLOP
    share = 200 * workloads.mean_tokens("mixed") * 21.234e6 / 400e9
    assert f" {share:.2f} (" in found["ours bare bf16, mixed, tokens/s ÷ what the linears alone would take"]
    elsewhere = targets.expectations(rows, {"features": ["avx2"]})
    assert sum("bare forward (ours-fp32)" in line for line in elsewhere) == 6


def test_the_ceiling_of_texts_is_that_of_their_tokens() -> None:
    tokenizer = padded.Texts(MINILM / "tokenizer.json", 512).tokenizer
    for name, mean in (("short", 12.5), ("mixed", workloads.mean_tokens("mixed")), ("full", 512)):
        block = workloads.texts(1, names=[name])[name]
        assert sum(len(e.ids) for e in tokenizer.encode_batch(block)) / len(block) == mean


def test_the_longer_checkpoint_is_the_same_but_for_its_limit(tmp_path: Path, sentences: SentenceTransformer) -> None:
    longer = SentenceTransformer(str(contenders.longer_checkpoint(tmp_path / "longer")), device="cpu")
    assert (sentences.max_seq_length, longer.max_seq_length) == (256, 512)
    short = TEXTS[:5]
    np.testing.assert_array_equal(longer.encode(short), sentences.encode(short))


def test_a_rival_without_an_environment_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(contenders, "RIVALS", ROOT / "nowhere")
    with contenders.ExitStack() as stack:
        start = contenders.Start(stack, tmp_path / "texts.json", tmp_path)
        assert start.engines(["ov-bf16", "infinity"]) == []
    assert start.missing == {
        "ov-bf16": "no environment in nowhere/openvino: make rivals",
        "infinity": "no environment in nowhere/infinity: make rivals",
    }
    assert "NOT MEASURED: openvino-bf16, bare: no environment" in capsys.readouterr().out


def test_calls_are_measured_over_the_whole_block(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def encode(texts: list[str]) -> Vectors:
        asked.append(texts)
        return np.zeros((len(texts), 2), np.float32)

    ticks = iter([0.0, 1.0, 1.0, 3.0, 3.0])
    monkeypatch.setattr(calls.time, "perf_counter", lambda: next(ticks))
    found = calls.measure(encode, ["a", "b", "c"], 2, 2.0, 2)
    assert asked == [["c", "a"], ["b", "c"]]
    assert found == {"sentences_per_s": 4 / 3, "p50_ms": 1000, "p99_ms": 2000}


def test_no_place_is_measured_in_a_cell_that_it_does_not_take() -> None:
    served = cpu.FULL.cells(HTTP)
    assert Cell("short", 1, 32) in served
    assert all(cell.workload != "full" for cell in served)
    assert report.many(ST, "full") in cpu.FULL.cells(ST)
    assert {cell.workload for cell in cpu.FULL.cells(MACHINE)} == set(gemm.DTYPES)


# The command, but with little to do and on one core: the tests beside it need theirs.
REHEARSAL = """
import os, sys
from benchmarks import cpu
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
cpu.QUICK = cpu.Plan(3, 0.01, ("short",), ("short",), (1,), 128, 32, 0)
cpu.main()
"""


def test_one_command_makes_the_result_and_its_pictures(tmp_path: Path) -> None:
    """With the engines that need no environment of their own."""
    out = tmp_path / "cpu.json"
    command = [sys.executable, "-c", REHEARSAL, "--quick", "--engines", "machine,st-fp32,ours-fp32", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert {"machine", "versions", "command", "rows", "not_measured", "texts"} <= result.keys()
    required = {"engine", "where", "workload", "metric", "median", "min", "max", "ratio_to_st_fp32"}
    assert all(required <= row.keys() for row in result["rows"])
    places = {Place(row["engine"], row["where"]) for row in result["rows"]}
    assert places == {MACHINE, ST, Place("ours-fp32", "bare")}
    rows: list[Row] = result["rows"]
    least = report.find(rows, Place("ours-fp32", "bare"), "cosine_least")
    assert least
    assert least["median"] > 0.999999
    assert "met: ours fp32, least cosine" in done.stdout
    assert "| ours-fp32, bare | " in done.stdout
    for plot in (plots.throughput, plots.latency, plots.accuracy):
        assert (tmp_path / f"cpu-{plot.__name__}.png").stat().st_size > 10_000
