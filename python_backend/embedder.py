"""Embedder: a checkpoint as a function from rows to vectors."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from triton_embed.python_backend import weights
from triton_embed.python_backend.config import ModelConfig, ServingConfig
from triton_embed.python_backend.head import Head
from triton_embed.python_backend.layers import Linear
from triton_embed.python_backend.row import Row
from triton_embed.python_backend.spec import Spec


class Embedder:
    """Built on meta, loaded strictly, warmed up; `embed` is then all there is.

    ConfigError: anything in the checkpoint that does not fit the family.
    """

    def __init__(self, spec: Spec, directory: Path, serving: ServingConfig) -> None:
        self.model = ModelConfig.from_checkpoint(directory, serving, spec)
        self.device = serving.device
        self.dtype = _dtype(serving)
        self.kernels = "torch"
        if self.device == "cpu":
            torch.set_num_threads(serving.thread_count)
        network = spec.load(spec.network)
        with torch.device("meta"):
            self._network = network(self.model, self.model.shape, self.device).eval()
            self._head = Head(self.model).eval()
        weights.load(self._network, network.naming, directory, self.dtype, self.device)
        for dense, found in zip(self._head.dense, self.model.dense, strict=True):
            weights.load(dense, weights.Naming(), found.directory, self.dtype, self.device)
        for module in self._network.modules():
            if isinstance(module, Linear):
                module.pack()
        # The first pass initialises the libraries below torch: better here than in a request.
        for length in (1, min(self.model.max_tokens, 64)):
            self.embed([Row(np.zeros(length, dtype=np.int32))], [self.model.dimensions])

    @torch.inference_mode()
    def embed(self, rows: Sequence[Row], dims: Sequence[int]) -> npt.NDArray[np.float32]:
        """One packed forward: rows -> fp32 [B,E], row b normalised over its first dims[b] values."""
        hidden, packed = self._network(rows)
        # A network may add rows of its own, to give libraries sizes they know.
        fillers = len(packed.lengths) - len(rows)
        vectors = self._head(hidden, packed, [*dims, *[1] * fillers])[: len(rows)]
        result: npt.NDArray[np.float32] = vectors.cpu().numpy()
        return result


def _dtype(serving: ServingConfig) -> torch.dtype:
    if serving.dtype == "auto":
        return torch.float32 if serving.device == "cpu" else torch.bfloat16
    found: torch.dtype = getattr(torch, serving.dtype)
    return found
