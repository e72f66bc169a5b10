"""Tests of the GPU benchmark without a GPU: a full dry run on the CPU, its accuracy checks, counts and outputs."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import tables
from benchmarks.gpu.kernels import accuracy as gpu_accuracy
from benchmarks.gpu.kernels import cases as gpu_cases
from benchmarks.gpu.kernels import tune as gpu_tune
from benchmarks.gpu.models.model import MODELS, Model
from benchmarks.gpu.run import Row, Run, attempt
from benchmarks.gpu.timing import Timer
from benchmarks.gpu_server import __main__ as gpu_server
from benchmarks.gpu_server import wheels as gpu_wheels
from conftest import ROOT, serving
from triton_embed.kernels import reference
from triton_embed.kernels.gpu import blocks
from triton_embed.kernels.gpu.blocks import Config, Table
from triton_embed.python_backend.execution.embedder import Embedder
from triton_embed.python_backend.inputs.row import Row as Input
from triton_embed.python_backend.spec import DecoderSpec

STAGES = ("machine", "kernels", "attention", "ops", "models", "plots")
TEXTS = [model for model in MODELS if model.text]


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """Run `--dry-run`; return the results, the printed output, and the output folder."""
    out = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(out)]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr
    return json.loads((out / "results.json").read_text()), completed.stdout, out


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more threads only wait for each other on such small tensors
    device = torch.device("cpu")
    result = Run(device, tmp_path, True, Timer(device, 1), time.monotonic() + 60)
    result.results |= {"stages": {}, "ceilings": {}}
    yield result
    torch.set_num_threads(threads)


def test_dry_run_completes_every_stage_without_failures(dry_run: tuple[dict[str, Any], str, Path]) -> None:
    results, printed, out = dry_run
    assert tuple(results["stages"]) == STAGES
    assert all(stage["rows"] for stage in results["stages"].values())
    assert tables.failures(results) == []
    assert results["seconds"] < 120  # about 20 on an idle machine
    assert {"machine", "gpu", "versions", "command", "commit", "ceilings"} <= results.keys()
    assert results["versions"]["torch"] == torch.__version__
    assert "benchmarks.gpu --dry-run" in results["command"]
    assert {path.name for path in out.glob("*.png")} == {
        f"results-{name}.png" for name in ("attention", "ops", "models")
    }
    assert "dry run: these figures mean nothing" in printed


def test_dry_run_measures_every_op_and_every_model(dry_run: tuple[dict[str, Any], str, Path]) -> None:
    stages = dry_run[0]["stages"]
    judged = {(row["op"], row["dtype"]) for row in stages["kernels"]["rows"] if row["right"]}
    ops = {*tables.FUSED, "varlen_attention", "pooled_attention", "linear"}
    assert judged == {(op, dtype) for op in ops for dtype in ("bfloat16", "float16", "float32")}
    assert {row["op"] for row in stages["ops"]["rows"]} == ops - {"varlen_attention"}
    result = {(row["model"], row.get("engine")) for row in stages["models"]["rows"] if "rate" in row}
    assert {(model.name, engine) for model in MODELS for engine in ("ours", "transformers")} <= result
    assert {engine for _, engine in result} >= {"torch kernels", "no graphs", "no prefix reuse"}
    correct = {row["model"] for row in stages["models"]["rows"] if row["metric"] == "correctness" and row["right"]}
    assert correct == {model.name for model in MODELS}


def test_table_lists_every_target(dry_run: tuple[dict[str, Any], str, Path]) -> None:
    results, printed, _ = dry_run
    for target in tables.targets():
        assert f"| {target.name} |" in printed
    assert tables.table(results) in printed


def test_failing_stage_or_row_does_not_stop_the_others(run: Run) -> None:
    def breaks(_: Run) -> Iterator[Row]:
        yield {"what": "first"}
        raise RuntimeError("an illegal memory access was encountered")

    def continues(_: Run) -> Iterator[Row]:
        yield attempt({"what": "second"}, lambda: {"value": [][1]})
        yield attempt({"what": "third"}, lambda: {"value": 3})

    gpu.perform(run, ["broken", "next"], {"broken": breaks, "next": continues})
    stages = json.loads((run.out / "results.json").read_text())["stages"]
    assert stages["broken"]["rows"] == [{"what": "first"}]
    assert "RuntimeError: an illegal memory access was encountered" in stages["broken"]["error"]
    assert stages["next"]["rows"] == [
        {"what": "second", "error": "IndexError: list index out of range"},
        {"what": "third", "value": 3},
    ]
    assert len(tables.failures(run.results)) == 2


ABORTING = """
import os
from benchmarks.gpu import __main__ as gpu

def kernels(run):
    yield {"what": "first"}
    os.abort()

gpu.STAGES["kernels"] = kernels
gpu.main()
"""


def test_stage_that_aborts_ends_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry-run", "--out", str(tmp_path), "--only", "kernels,plots"])
    monkeypatch.chdir(ROOT)
    options = gpu.arguments()
    results = gpu.perform_in_processes(options, gpu.selected_stages(options), (sys.executable, "-c", ABORTING))
    stages = results["stages"]
    assert tuple(stages) == ("machine", "kernels", "plots")
    assert stages["kernels"]["rows"] == [{"what": "first"}]
    assert stages["kernels"]["error"] == f"the process of the stage ended with {-signal.SIGABRT}"
    assert "error" not in stages["machine"]
    assert "kernels    FAILED: its process ended with" in capfd.readouterr().out
    assert len(tables.failures(results)) == 1


def test_row_is_on_disk_before_next_row_is_computed(run: Run) -> None:
    def stage(_: Run) -> Iterator[Row]:
        yield {"what": "first"}
        on_disk = json.loads((run.out / "results.json").read_text())
        yield {"what": f"found {len(on_disk['stages']['stage']['rows'])}"}

    gpu.perform(run, ["stage"], {"stage": stage})
    assert run.results["stages"]["stage"]["rows"][1] == {"what": "found 1"}


@pytest.mark.parametrize("flags", [["--only", "speed"], []], ids=["an unknown stage", "no GPU"])
def test_exits_with_a_message_when_it_cannot_run(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), *flags])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    message = capsys.readouterr().err if flags else str(ended.value)
    assert ("available stages: machine, tune, kernels" if flags else "use --dry-run") in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("importable", [True, False])
def test_bare_checkout_is_importable(tmp_path: Path, importable: bool) -> None:
    """Run Python without installed packages in a copy: the import works only after that of benchmarks.gpu."""
    for name in (
        "benchmarks/gpu/__init__.py",
        "python_backend/wire.py",
        "python_backend/errors.py",
        "python_backend/checkpoint/git_lfs.py",
        "python_backend/checkpoint/json_file.py",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(ROOT / name, tmp_path / name)
    make = f"runpy.run_path({str(tmp_path / 'benchmarks/gpu/__init__.py')!r}); " if importable else ""
    code = (
        f"import runpy; {make}import triton_embed.python_backend.checkpoint.json_file as found; print(found.__file__)"
    )
    completed = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert completed.stdout.strip() == (str(tmp_path / "python_backend/checkpoint/json_file.py") if importable else "")


def test_tuning_writes_a_readable_table(run: Run) -> None:
    before = {path: path.read_bytes() for path in blocks.DIRECTORY.glob("*.json")}
    gpu.perform(run, ["tune"])
    stage = run.results["stages"]["tune"]
    assert tables.failures(run.results) == []
    entries = json.loads((run.out / "sm80.json").read_text())
    tuned_table = Table("sm80", entries)
    changed = [row for row in stage["rows"] if row["changed"]]
    for row in changed:
        sizes = {**dict.fromkeys(("tokens", "outputs", "inputs", "width", "itemsize", "half"), 1), **row["up_to"]}
        result = tuned_table.find_config(row["kernel"], **sizes)
        assert result == (None if row["new"] is None else Config(**row["new"]))
    original = json.loads((blocks.DIRECTORY / "sm80.json").read_text())
    assert bool(changed) == (entries != original)
    assert entries.keys() == original.keys()
    assert before == {path: path.read_bytes() for path in blocks.DIRECTORY.glob("*.json")}


def test_tuning_selects_the_fastest_correct_config(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Select among four configs, of which one is slow, one is wrong and one does not compile."""
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
    entry = gpu_tune.Entry("elementwise", {}, [gpu_cases.gated("", 32, 16)], [quick, wrong, broken])
    table = Table("sm80", {"elementwise": [{"config": {"block_m": 1}}]})
    row = gpu_tune._tune(run, entry, table, 60)
    assert row["new"] == gpu_tune.config_fields(quick)
    assert row["changed"]
    assert sorted(refusal[:5] for refusal in row["refused"].values()) == ["Runti", "Value"]
    assert len(row["tried"]) == 2


def test_inserted_entry_applies_to_exactly_its_sizes() -> None:
    """Add entries in any order; each must precede the existing entries that cover it."""
    sizes = [
        {"itemsize": 2, "tokens": tokens, "outputs": outputs, "inputs": inputs}
        for tokens in gpu_tune.LINEAR_TOKENS
        for outputs, inputs in gpu_tune.LINEAR_SIZES
    ]
    for seed in range(5):
        entries: list[dict[str, Any]] = [{"up_to": {"itemsize": 2, "tokens": 64}, "config": {"block_m": 1}}]
        entries.append({"up_to": {"itemsize": 4}, "config": {"block_m": 2}})
        shuffled = random.Random(seed).sample(list(enumerate(sizes)), len(sizes))
        for number, up_to in shuffled:
            gpu_tune.insert_entry(entries, up_to, {"block_m": 10 + number})
            gpu_tune.insert_entry(entries, up_to, {"block_m": 100 + number})  # again: replaces the first
        table = Table("sm90", json.loads(gpu_tune.table_to_json({"linear": entries})))
        assert [table.config("linear", **up_to).block_m for up_to in sizes] == [100 + n for n in range(len(sizes))]
        assert table.config("linear", itemsize=2, tokens=1, outputs=9_999, inputs=9_999).block_m == 1
        assert table.config("linear", itemsize=4, tokens=9_999, outputs=9, inputs=9).block_m == 2


def judged(result: torch.Tensor, truth: torch.Tensor, torch_outputs: torch.Tensor | None = None) -> bool:
    return bool(
        gpu_accuracy.judge(result, truth, result if torch_outputs is None else torch_outputs, result.dtype)["right"]
    )


@pytest.mark.parametrize("dtype", gpu_accuracy.TOLERANCE)
def test_rounding_passes_and_larger_errors_fail(dtype: torch.dtype) -> None:
    truth = torch.randn(64, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rounded = truth.to(dtype)
    assert judged(rounded, truth)
    assert not judged(rounded * (1 + 8 * gpu_accuracy.TOLERANCE[dtype]), truth)
    bad_row, nan_value = rounded.clone(), rounded.clone()
    bad_row[7] = (truth[7] * (1 + 5 * gpu_accuracy.TOLERANCE[dtype] * truth[8].sign())).to(dtype)
    nan_value[3, 5] = float("nan")
    assert not judged(bad_row, truth)
    assert not judged(nan_value, truth)
    assert not judged(rounded[:-1], truth)


def test_exact_reference_uses_float64_throughout() -> None:
    """Check that the reference computes its statistics in float64, although plain torch uses fp32."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    weight = torch.full((64,), 1.01).to(torch.bfloat16)
    y, _ = gpu_accuracy.exact(reference.add_rms_norm, x, None, weight, 1e-6)
    expected = torch.nn.functional.rms_norm(x.double(), (64,), weight.double(), 1e-6)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=0)
    assert x.float().dtype == torch.float32  # the patch is undone


def test_gpu_timing_uses_event_time_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the device by a fake that needs 2 ms per call, after a pause of 100 ms."""
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
            inputs.clear()  # drop the warm-up calls
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
    result = timer.device_ms(call, timer.sets(20 << 20))
    assert (result["median_ms"], result["most_ms"], result["repeats"]) == (2, 2, 5)
    assert set(inputs) == set(range(7))  # 7 sets of 20 MiB exceed twice a 64 MiB cache
    measured = " ".join(order).split("sleep")[1:]
    assert len(measured) == 5
    assert all(part.split()[0] == part.split()[-1] == "event" and " call " in part for part in measured)


def attention_row(ratio: float, correct: bool = True, longest: int = 512) -> Row:
    times = {"ours_times": {"sdpa-cudnn": ratio}, "right": correct, "case": f"{longest} tokens", "longest": longest}
    return {"group": "d64 full", **times}


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [
        ([], "not measured"),
        ([attention_row(1.2), attention_row(1.01)], "goal"),
        ([attention_row(1.2), attention_row(0.96)], "met"),
        ([attention_row(1.2), attention_row(0.5)], "NOT MET"),
        ([attention_row(1.2), attention_row(0.5, longest=256)], "goal"),
        ([attention_row(1.2), attention_row(1.3, correct=False)], "WRONG, not counted"),
        ([{"group": "d64 full", "case": "x", "longest": 512, "error": "RuntimeError: no"}], "not measured"),
    ],
)
def test_verdict_uses_worst_case_and_ignores_wrong_kernels(rows: list[Row], verdict: str) -> None:
    result = tables.table({"stages": {"attention": {"rows": rows}}}).splitlines()[2]
    assert result.startswith("| attention d64")
    assert result.endswith(f"| {verdict} |")


@pytest.mark.parametrize(("ms", "verdict"), [(0.5, "goal"), (0.8, "met"), (1.0, "NOT MET")])
def test_lower_latency_is_better(ms: float, verdict: str) -> None:
    row = {"model": "bge-large", "metric": "one query", "engine": "ours", "median_ms": ms}
    lines = tables.table({"stages": {"models": {"rows": [row]}}}).splitlines()
    (result,) = (line for line in lines if line.startswith("| bge-large: one query"))
    assert result.endswith(f"| {verdict} |")


@pytest.mark.parametrize("model", TEXTS, ids=lambda model: model.name)
def test_flop_count_matches_torch(model: Model) -> None:
    """Compare with torch's counter on the meta device at the real sizes.

    torch counts all pairs of tokens; a causal mask hides half of them.
    """
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
    lengths = gpu_cases.mixed(16_384)
    assert sum(lengths) == 16_384
    assert min(lengths) >= 1
    assert max(lengths) > 400
    assert np.median(lengths) < np.mean(lengths) < 150


def test_parts_respect_the_size_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_wheels, "PART_BYTES", 100)
    sizes = [90, 60, 50, 40, 30, 7, 2, 1]
    files = [tmp_path / f"{i}.whl" for i in range(len(sizes))]
    for file, size in zip(files, sizes, strict=True):
        file.write_bytes(b"x" * size)
    result = gpu_wheels.parts(files)
    assert sorted(file for part in result for file in part) == files
    assert [sum(file.stat().st_size for file in part) for part in result] == [100, 100, 80]


def test_environment_sees_checkout_and_base_packages(tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.mkdir()
    gpu_wheels.install(part, tmp_path / "made")
    gpu_wheels.install(part, tmp_path / "made")  # another part into the same environment
    code = "import sys, numpy, triton_embed.kernels.packed as ours; print(sys.prefix, numpy.__version__, ours.__file__)"
    command = [tmp_path / "made/bin/python", "-c", code]
    completed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    prefix, version, file = completed.stdout.split()
    assert (prefix, version) == (str(tmp_path / "made"), np.__version__)
    assert Path(file).resolve() == ROOT / "kernels" / "packed.py"
    for name in gpu_wheels.COMMANDS:
        completed = subprocess.run(
            [tmp_path / "made/bin" / name, "--help"], capture_output=True, text=True, check=False
        )
        assert "Traceback" not in completed.stderr


def installed_with(names: Iterable[str]) -> set[str]:
    """Return these distributions and everything that they require."""
    found: set[str] = set()
    todo = [canonicalize_name(name) for name in names]
    while todo:
        name = todo.pop()
        if name not in found and found.add(name) is None:
            with suppress(metadata.PackageNotFoundError):
                requirements = map(Requirement, metadata.requires(name) or ())
                todo += [canonicalize_name(r.name) for r in requirements if not r.marker or r.marker.evaluate()]
    return found


def test_server_starts_with_what_the_bundle_and_the_image_have(tmp_path: Path) -> None:
    """Block what neither has, in the environment that is made on the GPU machine."""
    gpu_wheels.install(tmp_path, tmp_path / "made")
    present = {*map(canonicalize_name, gpu_wheels.PACKAGES), *installed_with(gpu_wheels.IMAGE), "triton-embed"}
    modules = {
        module
        for module, names in metadata.packages_distributions().items()
        if not present & {canonicalize_name(name) for name in names}
    }
    assert {"pytest", "openai", "sentence_transformers"} <= modules
    code = f"""
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {modules}:
            raise ModuleNotFoundError(f"{{name}} is not on the GPU machine")

sys.meta_path.insert(0, Blocked())
from triton_embed.gateway import app, cli, settings
from triton_embed.python_backend import launcher
print(app.create_app(settings.Settings()).version)
"""
    command = [tmp_path / "made/bin/python", "-c", code]
    completed = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert completed.stdout.split() == [metadata.version("triton-embed")], completed.stderr


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_random_qwen3_matches_transformers(tmp_path: Path) -> None:
    from transformers import AutoModel

    directory = gpu_server.qwen3(tmp_path / "qwen3", gpu_server.TINY)
    spec = DecoderSpec(eos=gpu_server.END, causal=True, qk_norm=True, qkv_bias=False)
    config = serving("qwen3", model_types=("qwen3",), pooling="last", dtype="float32")
    ids = np.array([5, 300 % 256, 17, 42, 256], dtype=np.int32)
    result = Embedder(spec, directory, config).embed([Input(ids)], [gpu_server.TINY["hidden_size"]])[0]
    network = AutoModel.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        states = network(torch.tensor(ids[None].astype(np.int64))).last_hidden_state[0, -1]
    expected = torch.nn.functional.normalize(states, dim=0).numpy()
    np.testing.assert_allclose(result, expected, atol=2e-5)


def test_texts_have_the_requested_token_counts() -> None:
    served = gpu_server.minilm()
    texts, mean = gpu_server.texts(served.tokenizer, [10, 50, 200] * 5)
    assert len(set(texts)) == 15
    assert mean == pytest.approx(260 / 3, rel=0.15)
