"""The GPU benchmark where there is no GPU: rehearsed whole on the CPU, and what it judges, counts and writes."""

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu, gpu_accuracy, gpu_ops, gpu_report, gpu_server, gpu_tune, gpu_wheels
from benchmarks.gpu_run import Row, Run, attempt
from benchmarks.gpu_shapes import MODELS, Model
from benchmarks.gpu_timing import Timer
from conftest import ROOT, serving
from triton_embed.kernels.gpu import blocks
from triton_embed.kernels.gpu.blocks import Config, Table
from triton_embed.python_backend.execution.embedder import Embedder
from triton_embed.python_backend.inputs.row import Row as Input
from triton_embed.python_backend.spec import DecoderSpec

STAGES = ("machine", "kernels", "attention", "ops", "models", "plots")
TEXTS = [model for model in MODELS if model.text]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """The results, what was printed, and the folder of `--dry-run`."""
    out = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "results.json").read_text()), done.stdout, out


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of tensors so small more would only wait for each other
    device = torch.device("cpu")
    found = Run(device, tmp_path, True, Timer(device, 1), time.monotonic() + 60)
    found.results |= {"stages": {}, "ceilings": {}}
    yield found
    torch.set_num_threads(threads)


def test_a_rehearsal_goes_through_every_stage_without_a_fault(rehearsal: tuple[dict[str, Any], str, Path]) -> None:
    results, printed, out = rehearsal
    assert tuple(results["stages"]) == STAGES
    assert all(stage["rows"] for stage in results["stages"].values())
    assert gpu_report.faults(results) == []
    assert results["seconds"] < 120  # about 20 where nothing else runs
    assert {"machine", "gpu", "versions", "command", "commit", "ceilings"} <= results.keys()
    assert results["versions"]["torch"] == torch.__version__
    assert "benchmarks.gpu --dry-run" in results["command"]
    assert {path.name for path in out.glob("*.png")} == {
        f"results-{name}.png" for name in ("attention", "ops", "models")
    }
    assert "a rehearsal: these figures mean nothing" in printed


def test_a_rehearsal_measures_every_op_and_every_model(rehearsal: tuple[dict[str, Any], str, Path]) -> None:
    stages = rehearsal[0]["stages"]
    judged = {(row["op"], row["dtype"]) for row in stages["kernels"]["rows"] if row["right"]}
    ops = {*gpu_report.FUSED, "varlen_attention", "pooled_attention", "linear"}
    assert judged == {(op, dtype) for op in ops for dtype in ("bfloat16", "float16", "float32")}
    assert {row["op"] for row in stages["ops"]["rows"]} == ops - {"varlen_attention"}
    found = {(row["model"], row.get("engine")) for row in stages["models"]["rows"] if "rate" in row}
    assert {(model.name, engine) for model in MODELS for engine in ("ours", "transformers")} <= found
    assert {engine for _, engine in found} >= {"torch kernels", "no graphs", "no prefix reuse"}
    right = {row["model"] for row in stages["models"]["rows"] if row["metric"] == "correctness" and row["right"]}
    assert right == {model.name for model in MODELS}


def test_the_table_puts_each_figure_beside_what_is_wanted(rehearsal: tuple[dict[str, Any], str, Path]) -> None:
    results, printed, _ = rehearsal
    for target in gpu_report.targets():
        assert f"| {target.what} |" in printed
    assert gpu_report.table(results) in printed


def test_what_one_stage_meets_costs_no_other(run: Run) -> None:
    def breaks(_: Run) -> Iterator[Row]:
        yield {"what": "first"}
        raise RuntimeError("an illegal memory access was encountered")

    def goes_on(_: Run) -> Iterator[Row]:
        yield attempt({"what": "second"}, lambda: {"value": [][1]})
        yield attempt({"what": "third"}, lambda: {"value": 3})

    gpu.perform(run, ["broken", "next"], {"broken": breaks, "next": goes_on})
    stages = json.loads((run.out / "results.json").read_text())["stages"]
    assert stages["broken"]["rows"] == [{"what": "first"}]
    assert "RuntimeError: an illegal memory access was encountered" in stages["broken"]["error"]
    assert stages["next"]["rows"] == [
        {"what": "second", "error": "IndexError: list index out of range"},
        {"what": "third", "value": 3},
    ]
    assert len(gpu_report.faults(run.results)) == 2


def test_rows_are_on_disk_before_the_next_is_made(run: Run) -> None:
    def stage(_: Run) -> Iterator[Row]:
        yield {"what": "first"}
        on_disk = json.loads((run.out / "results.json").read_text())
        yield {"what": f"found {len(on_disk['stages']['stage']['rows'])}"}

    gpu.perform(run, ["stage"], {"stage": stage})
    assert run.results["stages"]["stage"]["rows"][1] == {"what": "found 1"}


@pytest.mark.parametrize("flags", [["--only", "speed"], []], ids=["an unknown stage", "no GPU"])
def test_it_ends_with_a_sentence_where_it_cannot_run(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), *flags])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    said = capsys.readouterr().err if flags else str(ended.value)
    assert ("there are machine, tune, kernels" if flags else "--dry-run rehearses") in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("made", [True, False])
def test_a_bare_checkout_is_importable(tmp_path: Path, made: bool) -> None:
    """In a Python that sees no installed package, from a copy: only what was asked to be made importable is."""
    for name in ("benchmarks/checkout.py", "python_backend/errors.py", "python_backend/checkpoint/json_file.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    make = f"runpy.run_path({str(tmp_path / 'benchmarks/checkout.py')!r})['importable'](); " if made else ""
    code = (
        f"import runpy; {make}import triton_embed.python_backend.checkpoint.json_file as found; print(found.__file__)"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == (str(tmp_path / "python_backend/checkpoint/json_file.py") if made else "")


def test_tuning_writes_a_table_that_is_read(run: Run) -> None:
    before = {path: path.read_bytes() for path in blocks.DIRECTORY.glob("*.json")}
    gpu.perform(run, ["tune"])
    stage = run.results["stages"]["tune"]
    assert gpu_report.faults(run.results) == []
    stated = json.loads((run.out / "sm80.json").read_text())
    written = Table("sm80", stated)
    changed = [row for row in stage["rows"] if row["changed"]]
    for row in changed:
        sizes = {**dict.fromkeys(("tokens", "outputs", "inputs", "width", "itemsize", "half"), 1), **row["up_to"]}
        found = written.find_config(row["kernel"], **sizes)
        assert found == (None if row["new"] is None else Config(**row["new"]))
    original = json.loads((blocks.DIRECTORY / "sm80.json").read_text())
    assert bool(changed) == (stated != original)
    assert stated.keys() == original.keys()
    assert before == {path: path.read_bytes() for path in blocks.DIRECTORY.glob("*.json")}


def test_tuning_takes_the_fastest_that_is_right(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four configs one is slow, one wrong and one does not compile."""
    slow, quick, wrong, broken = (Config(block_m=m) for m in (1, 2, 4, 8))

    class Kernels:
        def __init__(self, config: Config, _: torch.device) -> None:
            self._config = config

        def gated_activation(self, x: torch.Tensor) -> torch.Tensor:
            if self._config == broken:
                raise RuntimeError("out of resource: shared memory")
            gate, up = x.chunk(2, dim=-1)
            time.sleep(0.01 if self._config == slow else 0)
            return torch.nn.functional.silu(gate) * (gate if self._config == wrong else up)

    monkeypatch.setattr(gpu_tune, "Configured", Kernels)
    entry = gpu_tune.Entry("elementwise", {}, [gpu_ops.gated("", 32, 16)], [quick, wrong, broken])
    table = Table("sm80", {"elementwise": [{"config": {"block_m": 1}}]})
    row = gpu_tune._tune(run, entry, table, 60)
    assert row["new"] == gpu_tune.stated_config(quick)
    assert row["changed"]
    assert sorted(refusal[:5] for refusal in row["refused"].values()) == ["Runti", "Value"]
    assert len(row["tried"]) == 2


def test_an_entry_counts_for_exactly_what_it_was_found_for() -> None:
    """Whatever the order they are placed in, and before the entries that were there."""
    sizes = [
        {"itemsize": 2, "tokens": tokens, "outputs": outputs, "inputs": inputs}
        for tokens in gpu_tune.LINEAR_TOKENS
        for outputs, inputs in gpu_tune.LINEAR_SIZES
    ]
    for seed in range(5):
        stated: list[dict[str, Any]] = [{"up_to": {"itemsize": 2, "tokens": 64}, "config": {"block_m": 1}}]
        stated.append({"up_to": {"itemsize": 4}, "config": {"block_m": 2}})
        shuffled = random.Random(seed).sample(list(enumerate(sizes)), len(sizes))
        for number, up_to in shuffled:
            gpu_tune.place(stated, up_to, {"block_m": 10 + number})
            gpu_tune.place(stated, up_to, {"block_m": 100 + number})  # again, in its own place
        table = Table("sm90", json.loads(gpu_tune.json_of({"linear": stated})))
        assert [table.config("linear", **up_to).block_m for up_to in sizes] == [100 + n for n in range(len(sizes))]
        assert table.config("linear", itemsize=2, tokens=1, outputs=9_999, inputs=9_999).block_m == 1
        assert table.config("linear", itemsize=4, tokens=9_999, outputs=9, inputs=9).block_m == 2


def judged(found: torch.Tensor, truth: torch.Tensor, own: torch.Tensor | None = None) -> bool:
    return bool(gpu_accuracy.judge(found, truth, found if own is None else own, found.dtype)["right"])


@pytest.mark.parametrize("dtype", gpu_accuracy.TOLERANCE)
def test_rounding_is_right_and_any_real_error_is_wrong(dtype: torch.dtype) -> None:
    truth = torch.randn(64, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rounded = truth.to(dtype)
    assert judged(rounded, truth)
    assert not judged(rounded * (1 + 8 * gpu_accuracy.TOLERANCE[dtype]), truth)
    one_row, one_nan = rounded.clone(), rounded.clone()
    one_row[7] = (truth[7] * (1 + 5 * gpu_accuracy.TOLERANCE[dtype] * truth[8].sign())).to(dtype)
    one_nan[3, 5] = float("nan")
    assert not judged(one_row, truth)
    assert not judged(one_nan, truth)
    assert not judged(rounded[:-1], truth)


def test_a_kernel_may_not_be_much_worse_than_torch() -> None:
    truth = torch.randn(64, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    worse = (truth * (1 + 1.5e-6 * torch.randn_like(truth).sign())).float()
    assert judged(worse, truth)
    assert not judged(worse, truth, own=truth.float())


def test_the_truth_is_computed_in_float64_throughout() -> None:
    """Plain torch takes its statistics in fp32; what kernels are judged by must not."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    weight = torch.full((64,), 1.01).to(torch.bfloat16)
    y, _ = gpu_accuracy.exact(gpu_ops.reference.add_rms_norm, x, None, weight, 1e-6)
    expected = torch.nn.functional.rms_norm(x.double(), (64,), weight.double(), 1e-6)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=0)
    assert x.float().dtype == torch.float32  # and it ends there


def test_on_a_gpu_a_figure_is_what_the_events_say_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device that takes 2 ms a call by its own clock, and 100 ms before it begins."""
    clock, order, inputs = [0.0], list[str](), list[int]()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]
            order.append("event")

        def elapsed_time(self, later: "Event") -> float:
            return later.at - self.at

    def sleep(cycles: int) -> None:
        assert isinstance(cycles, int)
        assert cycles > 0
        clock[0] += 100
        if "sleep" not in order:
            inputs.clear()  # those of warming up
        order.append("sleep")

    def call(i: int) -> None:
        clock[0] += 2
        inputs.append(i)
        order.append("call")

    timer = Timer(torch.device("cpu"), repeats=5)
    monkeypatch.setattr(timer, "_cuda", True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    found = timer.device_ms(call, timer.sets(20 << 20))
    assert (found["median_ms"], found["most_ms"], found["repeats"]) == (2, 2, 5)
    assert set(inputs) == set(range(7))  # 20 MiB seven times is twice a cache of 64 and more
    measured = " ".join(order).split("sleep")[1:]
    assert len(measured) == 5
    assert all(part.split()[0] == part.split()[-1] == "event" and " call " in part for part in measured)


def attention_row(ratio: float, right: bool = True, longest: int = 512) -> Row:
    times = {"ours_times": {"sdpa-cudnn": ratio}, "right": right, "case": f"{longest} tokens", "longest": longest}
    return {"group": "d64 full", **times}


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [
        ([], "not measured"),
        ([attention_row(1.2), attention_row(1.01)], "goal"),
        ([attention_row(1.2), attention_row(0.96)], "met"),
        ([attention_row(1.2), attention_row(0.5)], "NOT MET"),
        ([attention_row(1.2), attention_row(0.5, longest=256)], "goal"),
        ([attention_row(1.2), attention_row(1.3, right=False)], "WRONG, not counted"),
        ([{"group": "d64 full", "case": "x", "longest": 512, "error": "RuntimeError: no"}], "not measured"),
    ],
)
def test_the_worst_case_of_a_group_counts_and_a_wrong_kernel_does_not(rows: list[Row], verdict: str) -> None:
    found = gpu_report.table({"stages": {"attention": {"rows": rows}}}).splitlines()[2]
    assert found.startswith("| attention d64")
    assert found.endswith(f"| {verdict} |")


@pytest.mark.parametrize(("ms", "verdict"), [(0.5, "goal"), (0.8, "met"), (1.0, "NOT MET")])
def test_of_a_latency_less_is_better(ms: float, verdict: str) -> None:
    row = {"model": "bge-large", "metric": "one query", "engine": "ours", "median_ms": ms}
    lines = gpu_report.table({"stages": {"models": {"rows": [row]}}}).splitlines()
    (found,) = (line for line in lines if line.startswith("| bge-large: one query"))
    assert found.endswith(f"| {verdict} |")


@pytest.mark.parametrize("model", TEXTS, ids=lambda model: model.name)
def test_operations_are_counted_as_torch_counts_them(model: Model) -> None:
    """On the meta device at the real sizes. torch counts all pairs of tokens, half of which a causal mask hides."""
    length = 512
    with torch.device("meta"):
        network = model.network(model.config(dry=False))
        ids = torch.zeros(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(input_ids=ids)
    counts = counter.get_flop_counts()["Global"]
    pairs = sum(count for op, count in counts.items() if "attention" in str(op) or "bmm" in str(op))
    expected = counter.get_total_flops() - (pairs / 2 if model.causal else 0)
    assert pairs
    assert model.flop(length) == pytest.approx(expected, rel=0.002)


def test_mixed_lengths_fill_the_batch_and_are_mostly_short() -> None:
    lengths = gpu_ops.mixed(16_384)
    assert sum(lengths) == 16_384
    assert min(lengths) >= 1
    assert max(lengths) > 400
    assert np.median(lengths) < np.mean(lengths) < 150


def test_what_is_carried_fits_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_wheels, "PART_BYTES", 100)
    sizes = [90, 60, 50, 40, 30, 7, 2, 1]
    files = [tmp_path / f"{i}.whl" for i in range(len(sizes))]
    for file, size in zip(files, sizes, strict=True):
        file.write_bytes(b"x" * size)
    found = gpu_wheels.parts(files)
    assert sorted(file for part in found for file in part) == files
    assert [sum(file.stat().st_size for file in part) for part in found] == [100, 100, 80]


def test_the_carried_environment_sees_the_checkout_and_the_packages_around_it(tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.mkdir()
    gpu_wheels.install(part, tmp_path / "made")
    gpu_wheels.install(part, tmp_path / "made")  # another part, into the same
    code = "import sys, numpy, triton_embed.kernels.packed as ours; print(sys.prefix, numpy.__version__, ours.__file__)"
    command = [tmp_path / "made/bin/python", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    prefix, version, file = done.stdout.split()
    assert (prefix, version) == (str(tmp_path / "made"), np.__version__)
    assert Path(file).resolve() == ROOT / "kernels" / "packed.py"
    for name in gpu_wheels.COMMANDS:
        done = subprocess.run([tmp_path / "made/bin" / name, "--help"], capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_the_random_qwen3_is_one_to_transformers_too(tmp_path: Path) -> None:
    from transformers import AutoModel

    directory = gpu_server.qwen3(tmp_path / "qwen3", gpu_server.TINY)
    spec = DecoderSpec(eos=gpu_server.END, causal=True, qk_norm=True, qkv_bias=False)
    config = serving("qwen3", model_types=("qwen3",), pooling="last", dtype="float32")
    ids = np.array([5, 300 % 256, 17, 42, 256], dtype=np.int32)
    found = Embedder(spec, directory, config).embed([Input(ids)], [gpu_server.TINY.hidden_size])[0]
    network = AutoModel.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        states = network(torch.tensor(ids[None].astype(np.int64))).last_hidden_state[0, -1]
    expected = torch.nn.functional.normalize(states, dim=0).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_texts_have_the_tokens_they_should() -> None:
    served = gpu_server.minilm()
    texts, mean = gpu_server.texts(served.tokenizer, [10, 50, 200] * 5)
    assert len(set(texts)) == 15
    assert mean == pytest.approx(260 / 3, rel=0.15)
