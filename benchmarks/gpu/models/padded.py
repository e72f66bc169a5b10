"""transformers' network with random weights, on padded batches sorted by length."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks.gpu.models.model import Model
from benchmarks.gpu.models.work import Batch, Vectors
from benchmarks.gpu.run import Run
from triton_embed.python_backend.inputs.row import Row as Input


def random_network(run: Run, model: Model, directory: Path) -> nn.Module:
    """Create transformers' bf16 network with random weights, scaled so that activations keep their magnitude."""
    config = model.config(run.dry)
    config.save_pretrained(directory)
    model.write_processor(directory)
    with torch.device(run.device):
        network: nn.Module = model.network(config)
    network = network.to(torch.bfloat16).eval()
    generator = torch.Generator(run.device).manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=(parameter.numel() / len(parameter)) ** -0.5, generator=generator)
        else:
            parameter.data.normal_(mean=0.0 if name.endswith("bias") else 1.0, std=0.02, generator=generator)
    return network


class Padded:
    """transformers baseline with padded batches sorted by length."""

    def __init__(self, run: Run, model: Model, network: nn.Module) -> None:
        self._run, self._model, self._network = run, model, network
        self._pixels: dict[int, Tensor] = {}

    def in_fp32(self) -> "Padded":
        """Return a copy that computes in fp32."""
        return Padded(self._run, self._model, copy.deepcopy(self._network).float())

    def __call__(self, work: Batch, size: int) -> Vectors:
        order = sorted(range(len(work.rows)), key=lambda i: -work.lengths[i])
        vectors_by_row: dict[int, Vectors] = {}
        for start in range(0, len(order), size):
            sample = order[start : start + size]
            pooled = self._forward([work.rows[i] for i in sample])
            vectors = nn.functional.normalize(pooled.float(), dim=-1).cpu().numpy()
            vectors_by_row |= zip(sample, vectors, strict=True)
        return np.stack([vectors_by_row[i] for i in range(len(order))])

    def _forward(self, rows: Sequence[Input]) -> Tensor:
        model: Any = self._network
        pad_left = self._model.pooling == "last"
        if self._model.text:
            padded = _pad([row.ids for row in rows], pad_left, self._run.device)
            options = {"use_cache": False} if pad_left else {}
            states: Tensor = model(**padded, **options).last_hidden_state
            return states[:, -1 if pad_left else 0]
        pixels = torch.cat([self._pixel_values(row) for row in rows])
        return self._model.image_vectors(
            model, pixels, _pad([row.ids for row in rows], True, self._run.device), len(rows)
        )

    def _pixel_values(self, row: Input) -> Tensor:
        """Return cached pixel values; transformers' image preprocessing is not measured."""
        key = id(row.images[0])
        if key not in self._pixels:
            image = torch.from_numpy(row.images[0]).to(self._run.device)
            self._pixels[key] = self._model.pixels(image).to(next(self._network.parameters()).dtype)
        return self._pixels[key]


def _pad(rows: Sequence[npt.NDArray[np.int32]], pad_left: bool, device: torch.device) -> dict[str, Tensor]:
    size = max(map(len, rows))
    ids = np.zeros((len(rows), size), dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        span = slice(size - len(row), size) if pad_left else slice(0, len(row))
        ids[i, span], mask[i, span] = row, 1
    return {"input_ids": torch.from_numpy(ids).to(device), "attention_mask": torch.from_numpy(mask).to(device)}
