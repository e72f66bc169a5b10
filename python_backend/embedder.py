"""Embedder: a checkpoint as a function from rows of token ids to vectors."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from triton_embed.python_backend import head, weights
from triton_embed.python_backend.batch import Batch
from triton_embed.python_backend.config import ModelConfig, ServingConfig
from triton_embed.python_backend.layers import Linear
from triton_embed.python_backend.spec import EncoderSpec
from triton_embed.python_backend.tokenizer import Ids, Tokenizer

FILLER = np.zeros(1, dtype=np.int32)


class Embedder:
    """Built on meta, loaded strictly, warmed up; `embed` is then all there is.

    ConfigError: anything in the checkpoint that does not fit the family.
    """

    def __init__(self, spec: EncoderSpec, directory: Path, serving: ServingConfig) -> None:
        self.model = ModelConfig.from_checkpoint(directory, serving)
        self.tokenizer = Tokenizer(directory, self.model)
        self.device = serving.device
        self.dtype = _dtype(serving)
        self.kernels = "torch"
        if self.device == "cpu":
            torch.set_num_threads(serving.thread_count)
        network = spec.load_network()
        with torch.device("meta"):
            self._network = network(self.model).eval()
        weights.load(
            self._network,
            directory,
            prefixes=network.prefixes,
            fused=network.fused,
            ignored=network.ignored,
            dtype=self.dtype,
            device=self.device,
        )
        for module in self._network.modules():
            if isinstance(module, Linear):
                module.pack()
        # The first pass initialises the libraries below torch: better here than in a request.
        for length in (1, min(self.model.max_tokens, 64)):
            self.embed([np.zeros(length, dtype=np.int32)], [self.model.hidden_size])

    @torch.inference_mode()
    def embed(self, rows: Sequence[Ids], dims: Sequence[int]) -> npt.NDArray[np.float32]:
        """One packed forward: rows of ids -> fp32 [B,E], row b normalised over its first dims[b] values."""
        fillers = filler_count(sum(map(len, rows))) if self.device == "cpu" else 0
        batch = Batch.pack([*rows, *[FILLER] * fillers], [*dims, *[1] * fillers], self.device)
        vectors = head.embed(self._network(batch), batch, self.model.pooling)[: len(rows)]
        result: npt.NDArray[np.float32] = vectors.cpu().numpy()
        return result


def filler_count(tokens: int) -> int:
    """How many one-token rows to add to a batch on a CPU: up to 7, or up to an eighth of it (a 16th on average).

    oneDNN keeps 2 MB of code for every number of tokens that MiniLM ever met (measured: 350 MB of memory became
    1.2 GB in 500 batches), so the numbers are rounded up to eight an octave.
    """
    step = 1 << max(3, tokens.bit_length() - 4)
    return -tokens % step


def _dtype(serving: ServingConfig) -> torch.dtype:
    if serving.dtype == "auto":
        return torch.float32 if serving.device == "cpu" else torch.bfloat16
    found: torch.dtype = getattr(torch, serving.dtype)
    return found
