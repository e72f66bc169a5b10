"""Configurations of the server under test, and how to start it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import report
from benchmarks.processes import MODEL, Stack, serving
from triton_embed.python_backend.checkpoint import repository

Row = dict[str, Any]


class Plan(NamedTuple):
    """How much a run measures."""

    rounds: int
    seconds: float  # per cell
    queries: int  # minimum number of queries per percentile of fairness
    bulks: int  # requests of BULK inputs per figure


FULL = Plan(2, 2.0, 500, 2)
QUICK = Plan(1, 0.5, 100, 1)


class Config(NamedTuple):
    """Values for config.pbtxt; 0 keeps the default."""

    budget: int = 0
    wait_us: int = 0  # max_queue_delay_microseconds

    def __str__(self) -> str:
        return f"{self.budget or 'default'} tokens, {self.wait_us} µs"


@contextmanager
def serving_config(config: Config, folder: Path) -> Iterator[Stack]:
    """Run `triton-embed serve` with `config` applied to the model; it is ready when the block begins."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        models = Path(scratch)
        parameters = {"max_batch_tokens": str(config.budget)} if config.budget else {}
        model = repository.write_model(report.ROOT / "model_repository", MODEL, models, MODEL, parameters)
        model_config = repository.read_config(models, MODEL)
        model_config.dynamic_batching.max_queue_delay_microseconds = config.wait_us
        (model / "config.pbtxt").write_text(str(model_config), encoding="utf-8")
        with serving("--model-repository", str(models), logs=folder) as stack:
            yield stack
