"""Embedder: a checkpoint as a function from rows to vectors."""

import ctypes
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from triton_embed.kernels import ops
from triton_embed.python_backend import precision, weights
from triton_embed.python_backend.budget import Budget
from triton_embed.python_backend.config import ModelConfig, ServingConfig
from triton_embed.python_backend.errors import ConfigError
from triton_embed.python_backend.graphs import Forward, Graphs
from triton_embed.python_backend.head import Head
from triton_embed.python_backend.layers import Linear
from triton_embed.python_backend.prefix import PrefixReuse
from triton_embed.python_backend.row import Row
from triton_embed.python_backend.spec import Spec
from triton_embed.python_backend.threads import Threads

log = logging.getLogger(__name__)

# What Triton's kernels and torch's must agree on before a server starts. Rounding alone leaves more than 0.999 in
# bf16; a wrong mask or a wrong head does not come near.
LEAST_COSINE = 0.99

WITHOUT = "the parameter kernels: torch does without our kernels"

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


class Embedder:
    """Built on meta, loaded strictly, warmed up; `embed` is then all there is.

    ConfigError: anything in the checkpoint that does not fit the family, or a device, dtype or size that the kernels
    cannot serve.
    """

    def __init__(self, spec: Spec, directory: Path, serving: ServingConfig) -> None:
        self.model = ModelConfig.from_checkpoint(directory, serving, spec)
        self.device = serving.device
        ops.use(serving.kernels)
        self.kernels = ops.used_on(self.device)
        self.dtype = _dtype(serving, self.kernels)
        with _told(serving):
            ops.require(self.device, self.dtype)
        if self.device == "cpu":
            self._threads = Threads(serving.thread_count)
        else:
            torch.cuda.set_device(self.device)
        self._between: Callable[[], None] | None = None
        self._load(spec, directory)
        linears = sum(layer.weight.numel() for layer in self._layers)
        self.budget = Budget.of(self.device, linears, serving.max_batch_tokens)
        guessed = self.device == "cpu" and serving.dtype == "auto" and self.dtype != torch.float32
        expected = self._in_fp32(serving) if guessed else None
        self._pack(serving)
        if expected is not None and not self._right(serving, expected):
            log.warning("%s: fp32 is served instead", serving.name)
            self.dtype = torch.float32
            self._load(spec, directory)
            self._pack(serving)
            if not self._right(serving, expected):
                raise ConfigError(f"{serving.name}: this CPU computes other vectors than plain torch; {WITHOUT}")
        if self.device == "cpu":
            _keep_memory()  # only now: what loading has freed is given back
        self.computes_in = "int8" if serving.dtype == "int8" else _name(self.dtype)
        with _told(serving):
            self._forward = self._prepare(serving)

    @torch.inference_mode()
    def embed(
        self,
        rows: Sequence[Row],
        dims: Sequence[int],
        between: Callable[[], None] | None = None,
        spare: bool = False,
    ) -> npt.NDArray[np.float32]:
        """One packed forward: rows -> fp32 [B,E], row b normalised over its first dims[b] values.

        On a CPU `between` is called a few times a layer, and may itself call `embed` for what cannot wait. `spare`:
        those who read and answer requests need a core meanwhile.
        """
        before, self._between = self._between, between
        pausing = self._network.modules() if between is not None and self.device == "cpu" else ()
        pauses = [module.register_forward_pre_hook(self._pause) for module in pausing]
        cores = self._threads.of(sum(row.cost for row in rows), spare) if self.device == "cpu" else nullcontext()
        try:
            with cores:
                return self._embed(self._forward, rows, dims)
        finally:
            for pause in pauses:
                pause.remove()
            self._between = before

    def _embed(self, forward: Forward, rows: Sequence[Row], dims: Sequence[int]) -> npt.NDArray[np.float32]:
        hidden, packed = forward(rows)
        result: npt.NDArray[np.float32] = self._head(hidden, packed, dims).cpu().numpy()
        return result

    def _load(self, spec: Spec, directory: Path) -> None:
        network = spec.load(spec.network)
        with torch.device("meta"):
            self._network = network(self.model, self.model.shape, self.device).eval()
            self._head = Head(self.model).eval()
        self._layers = [module for module in self._network.modules() if isinstance(module, Linear)]
        weights.load(self._network, network.naming, directory, self.dtype, self.device)
        for dense, found in zip(self._head.dense, self.model.dense, strict=True):
            weights.load(dense, weights.Naming(), found.directory, self.dtype, self.device)

    def _pack(self, serving: ServingConfig) -> None:
        for layer in self._layers:
            layer.pack(in_int8=serving.dtype == "int8")

    def _pause(self, *_: object) -> None:
        """Before a module: what its pass was told to call on the way, unless that is where it is."""
        if self._between is not None:
            self._between()

    @torch.inference_mode()
    def _prepare(self, serving: ServingConfig) -> Forward:
        """The fastest way through the network that this device and model have, tried once.

        The first passes also initialise the libraries below torch: better here than in a request.
        """
        forward: Forward = self._network
        ways = [forward]
        if serving.prefix_reuse and self._network.shareable:
            ways.append(forward := PrefixReuse(self._network))
        if self.kernels == "triton" and self.device != "cpu":  # on a CPU nothing is compiled: it is the interpreter
            self._compile_linears()
            if serving.cuda_graphs and self._network.recordable:
                ways.append(forward := Graphs(self._network, forward, self.device))
        vectors = [self._vectors(way) for way in ways]
        if self.kernels == "triton":
            ops.use("torch")
            expected = self._vectors(self._network)
            ops.use(serving.kernels)
            cosine = _least_cosine(np.stack(vectors), expected)
            if not cosine >= LEAST_COSINE:
                raise ValueError(f"Triton's kernels and torch's disagree on {self.device}: cosine {cosine:.4f}")
            log.info("%s: Triton's kernels agree with torch's: cosine at least %.5f", serving.name, cosine)
        return forward

    def _compile_linears(self) -> None:
        """Run every layer with an activation once for each kernel that a number of tokens may ask for."""
        modules = [*self._network.modules(), *self._head.modules()]
        layers = [layer for layer in modules if isinstance(layer, Linear) and layer.act]
        distinct = {(layer.weight.shape, layer.act): layer for layer in layers}
        for layer in distinct.values():
            for tokens in ops.linear_sizes(self.device):
                layer(torch.zeros(tokens, layer.weight.shape[1], dtype=layer.weight.dtype, device=self.device))

    @torch.inference_mode()
    def _vectors(self, forward: Forward) -> npt.NDArray[np.float32]:
        return np.concatenate([self._embed(forward, *sample) for sample in self._samples()])

    def _in_fp32(self, serving: ServingConfig) -> npt.NDArray[np.float32]:
        """By plain torch, whatever serves."""
        ops.use("torch")
        try:
            with precision.in_fp32(self._network):
                return self._vectors(self._network)
        finally:
            ops.use(serving.kernels)

    def _right(self, serving: ServingConfig, expected: npt.NDArray[np.float32]) -> bool:
        cosine = _least_cosine(self._vectors(self._network), expected)
        said = serving.name, _name(self.dtype), cosine
        log.info("%s: vectors in %s have cosines of at least %.5f to plain torch's in fp32", *said)
        return cosine >= precision.LEAST_COSINE

    def _samples(self) -> list[tuple[list[Row], list[int]]]:
        """Batches to try, with their sizes: texts of random tokens, two of which begin alike, and pictures."""
        draw = np.random.default_rng(0)
        longest = min(self.model.max_tokens, 64)
        ids = [draw.integers(self.model.vocab_size, size=n, dtype=np.int32) for n in {1, min(7, longest), longest}]
        alike = Row(max(ids, key=len), shared=longest // 2)
        batches = [[*map(Row, ids), alike, alike], self._network.sample_pictures()]
        whole = self.model.dimensions
        return [(rows, [max(1, whole // 2), *[whole] * (len(rows) - 1)]) for rows in batches if rows]


@contextmanager
def _told(serving: ServingConfig) -> Iterator[None]:
    """What the kernels cannot do, as a ConfigError that says what can be done about it."""
    try:
        yield
    except (ValueError, LookupError, ImportError) as error:
        way = f"; {WITHOUT}" if ops.used_on(serving.device) == "triton" else ""
        raise ConfigError(f"{serving.name}: {error}{way}") from error


def _least_cosine(vectors: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """Of vectors [...,n,E] and [n,E] of length 1; NaN, if any of them is."""
    return float((vectors * expected).sum(axis=-1).min())


def _keep_memory() -> None:
    """Let glibc keep what a pass has freed for the next one: otherwise activations of megabytes are given back and
    faulted in again, page by page, in every layer."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc's alone
        for parameter in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            libc.mallopt(parameter, 2**30)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(serving: ServingConfig, kernels: str) -> torch.dtype:
    if serving.dtype == "int8" and serving.device != "cpu":
        raise ConfigError(f"{serving.name}/config.pbtxt: dtype is 'int8', which only a CPU computes in")
    if serving.dtype in ("auto", "int8"):
        if serving.device != "cpu":
            return torch.bfloat16
        return precision.fast_dtype() if kernels == "torch" else torch.float32
    found: torch.dtype = getattr(torch, serving.dtype)
    return found
