"""Our engine as the server runs it, with the weights of transformers' network taken from memory."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor, nn

from benchmarks.gpu.models.model import Model
from benchmarks.gpu.models.work import Batch, Vectors
from benchmarks.gpu.run import Run
from triton_embed.python_backend.checkpoint.config import ServingConfig
from triton_embed.python_backend.execution.embedder import Embedder
from triton_embed.python_backend.inputs.row import Row as Input
from triton_embed.python_backend.networks import weights


@dataclass(frozen=True)
class _TensorInMemory:
    """A tensor in memory that replaces a tensor in a file; see `weights._Stored`."""

    tensor: Tensor
    key: str
    path: Path = Path("memory")

    def copy_to(self, target: Tensor, name: str) -> None:
        if self.tensor.shape != target.shape:
            raise ValueError(f"tensor '{name}' has shape {list(self.tensor.shape)}, expected {list(target.shape)}")
        target.copy_(self.tensor)


class Ours:
    """Our engine: sequential forward passes, each with as many rows as the token budget admits."""

    def __init__(self, run: Run, model: Model, serving: ServingConfig, directory: Path) -> None:
        begin = time.perf_counter()
        self._embedder = Embedder(model.spec, directory, serving)
        run.timer.wait()
        self.seconds = time.perf_counter() - begin
        self.kernels = str(self._embedder.kernels)
        self._budget = self._embedder.budget.pass_tokens
        self._size = self._embedder.model.dimensions

    def __call__(self, work: Batch) -> Vectors:
        parts: list[Vectors] = []
        pending: list[Input] = []
        cost = 0
        for row in work.rows:
            if pending and cost + row.cost > self._budget:
                parts.append(self._pass(pending))
                pending, cost = [], 0
            pending.append(row)
            cost += row.cost
        parts.append(self._pass(pending))
        return np.concatenate(parts)

    def _pass(self, rows: list[Input]) -> Vectors:
        """Run one forward pass with rows sorted by cost, as the scheduler does; return vectors in input order."""
        order = sorted(range(len(rows)), key=lambda i: rows[i].cost)
        vectors = self._embedder.embed([rows[i] for i in order], [self._size] * len(rows))
        return vectors[np.argsort(order)]


@contextmanager
def loaded(run: Run, model: Model, network: nn.Module, directory: Path, **settings: Any) -> Iterator[Ours]:
    """Load the engine with the network's weights directly from memory."""
    gc.collect()
    run.free_memory()
    serving = ServingConfig(
        name=model.name,
        checkpoint=str(directory),
        checkpoint_root=directory,
        model_types=(network.config.model_type,),
        device="cpu" if run.device.type == "cpu" else "cuda:0",
        dtype="bfloat16",
        pooling=model.pooling,
        threads=run.size(0, 1),
        **settings,
    )
    state = network.state_dict()

    def index(_: Path, naming: weights.Naming) -> dict[str, _TensorInMemory]:
        return {weights._rename(key, naming.renames): _TensorInMemory(tensor, key) for key, tensor in state.items()}

    with patch.object(weights, "_index", index):
        embedder = Ours(run, model, serving, directory)
    yield embedder
