"""The embedder: a loaded checkpoint as a function from rows to vectors."""

import ctypes
import errno
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from triton_embed.kernels.ops import Ops, resolve
from triton_embed.python_backend.checkpoint.config import ModelConfig, ServingConfig
from triton_embed.python_backend.errors import ConfigError, DeviceLostError
from triton_embed.python_backend.execution import precision
from triton_embed.python_backend.execution.budget import Budget
from triton_embed.python_backend.execution.cpu_threads import Threads
from triton_embed.python_backend.execution.cuda_graphs import CudaGraphs, Forward, graph_tokens
from triton_embed.python_backend.execution.prefix_cache import PrefixCache
from triton_embed.python_backend.inputs.row import Row
from triton_embed.python_backend.networks import weights
from triton_embed.python_backend.networks.head import Head
from triton_embed.python_backend.networks.layers import Linear
from triton_embed.python_backend.spec import Spec

log = logging.getLogger(__name__)

Vectors = npt.NDArray[np.float32]

# A model does not start if Triton's kernels and torch's compute a vector with a lower cosine. Rounding in bf16 leaves
# more than 0.999; a wrong mask or a wrong head gives far less.
MIN_KERNEL_COSINE = 0.99

# Part of a message of triton 3.6 to 3.9 or of torch -> what to do
_REMEDIES = {
    "C compiler": "Triton needs one for its launchers: install gcc, or name one in CC",
    "libcuda": "install NVIDIA's driver, or give the container access to the GPU (docker run --gpus all)",
    "out of memory": "the GPU has no memory for this model and a forward pass: lower max_batch_tokens, or free memory",
}

REFERENCE_HINT = "set the parameter kernels to reference to run without them"

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


class Embedder:
    """A loaded and warmed-up network, and the head that turns its hidden states into vectors.

    Attributes:
        dtype: The dtype of the weights before packing.
        computes_in: The dtype to report: `int8`, or the name of `dtype`.

    Raises:
        ConfigError: The checkpoint does not fit the family, or the kernels do not support the device, dtype or size.
    """

    def __init__(self, spec: Spec, directory: Path, serving: ServingConfig) -> None:
        self.model = ModelConfig.from_checkpoint(directory, serving, spec)
        self.device = serving.device
        self.kernels = resolve(serving.kernels, self.device)
        self.dtype = _dtype(serving, self.kernels)
        with self._explain(serving):
            self._ops = Ops.on(self.device, self.dtype, serving.kernels)
        if self.device == "cpu":
            self._threads = Threads(serving.thread_count)
        else:
            torch.cuda.set_device(self.device)
        self._pause_hook: Callable[[], None] | None = None
        self._load(spec, directory)
        linears = sum(layer.weight.numel() for layer in self._layers)
        flops = 0.0 if self.device == "cpu" else _flops(self.device, self.dtype)
        self.budget = Budget.of(self.device, linears, serving.max_batch_tokens, flops)
        self._graph_tokens = graph_tokens(len(self._layers), linears, flops)
        # If the operator did not choose bf16, its accuracy is checked.
        dtype_is_chosen_here = self.device == "cpu" and serving.dtype == "auto" and self.dtype != torch.float32
        expected = None
        if dtype_is_chosen_here or self.kernels == "triton":
            with self._explain(serving):
                expected = self._vectors_of_torch(spec, in_fp32=dtype_is_chosen_here)
        self._pack(serving)
        if dtype_is_chosen_here and expected is not None and not self._agrees(serving, expected):
            log.warning("%s: falling back to fp32", serving.name)
            self.dtype = torch.float32
            self._load(spec, directory)
            self._pack(serving)
            if not self._agrees(serving, expected):
                raise ConfigError(
                    f"{serving.name}: on this CPU the vectors differ from those of plain torch; {REFERENCE_HINT}"
                )
        if self.device == "cpu":
            _keep_memory()  # only now, so that memory freed by loading is returned
        self.computes_in = "int8" if serving.dtype == "int8" else _name(self.dtype)
        with self._explain(serving):
            self._forward = self._prepare(serving, expected)

    @torch.inference_mode()
    def embed(
        self,
        rows: Sequence[Row],
        dims: Sequence[int],
        pause_hook: Callable[[], None] | None = None,
        spare_core: bool = False,
    ) -> npt.NDArray[np.float32]:
        """Run one packed forward pass: rows -> fp32 [B,E], row b normalized over its first dims[b] values.

        The arguments and errors are those of `start`.
        """
        return self.start(rows, dims, pause_hook, spare_core)()

    @torch.inference_mode()
    def start(
        self,
        rows: Sequence[Row],
        dims: Sequence[int],
        pause_hook: Callable[[], None] | None = None,
        spare_core: bool = False,
    ) -> Callable[[], Vectors]:
        """Start a packed forward pass, and return the function that waits for its vectors. On a CPU it has ended.

        If the memory of a GPU does not suffice for all rows, the pass is run in two halves.

        Args:
            pause_hook: On a CPU, called a few times per layer; it may itself call `embed` for urgent rows.
            spare_core: Other threads need a core meanwhile.

        Raises:
            DeviceLostError: The GPU refuses every further call of this process. So does the function.
        """
        try:
            return _explained(self._start(rows, dims, pause_hook, spare_core))
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
            log.warning("The GPU has no memory for a pass over %d rows: halving it", len(rows))
            torch.cuda.empty_cache()
        except torch.AcceleratorError as error:
            raise DeviceLostError(str(error)) from error
        middle = len(rows) // 2
        halves = [
            self.start(rows[half], dims[half], pause_hook, spare_core)
            for half in (slice(None, middle), slice(middle, None))
        ]
        return lambda: _joined([wait() for wait in halves])

    def _start(
        self, rows: Sequence[Row], dims: Sequence[int], pause_hook: Callable[[], None] | None, spare_core: bool
    ) -> Callable[[], Vectors]:
        if self.device != "cpu":
            return _copied(self._on_device(self._forward, self._head, rows, dims))
        outer_hook, self._pause_hook = self._pause_hook, pause_hook  # this pass may run inside a pause of another
        modules = self._network.modules() if pause_hook is not None else ()
        handles = [module.register_forward_pre_hook(self._pause) for module in modules]
        try:
            with self._threads.for_pass(sum(row.cost for row in rows), spare_core):
                vectors = self._embed(self._forward, self._head, rows, dims)
        finally:
            for handle in handles:
                handle.remove()
            self._pause_hook = outer_hook
        return lambda: vectors

    def _embed(self, forward: Forward, head: Head, rows: Sequence[Row], dims: Sequence[int]) -> Vectors:
        result: Vectors = self._on_device(forward, head, rows, dims).cpu().numpy()
        return result

    def _on_device(self, forward: Forward, head: Head, rows: Sequence[Row], dims: Sequence[int]) -> Tensor:
        hidden, packed = forward(rows)
        vectors: Tensor = head(hidden, packed, dims)
        return vectors

    def _load(self, spec: Spec, directory: Path) -> None:
        self._network, self._head = self._build(spec, self._ops)
        self._layers = [module for module in self._network.modules() if isinstance(module, Linear)]
        weights.load(self._network, self._network.naming, self.model.directory, self.dtype, self.device)
        for dense, config in zip(self._head.dense, self.model.dense, strict=True):
            weights.load(dense, weights.Naming(), config.directory, self.dtype, self.device)

    def _build(self, spec: Spec, ops: Ops) -> tuple[Any, Head]:
        """Return the network and the head, without memory for their weights."""
        network = spec.load(spec.network)
        with torch.device("meta"):
            return network(ops, self.model, self.model.network_config, self.device).eval(), Head(ops, self.model).eval()

    def _pack(self, serving: ServingConfig) -> None:
        for layer in self._layers:
            layer.pack(in_int8=serving.dtype == "int8")

    def _pause(self, *_: object) -> None:
        """Forward pre-hook of every module: run the pause hook of the current pass. A pass inside a pause has none."""
        if self._pause_hook is not None:
            self._pause_hook()

    @torch.inference_mode()
    def _prepare(self, serving: ServingConfig, expected: npt.NDArray[np.float32] | None) -> Forward:
        """Return the fastest forward pass of this device and model, after running it once.

        Triton's kernels are compared with the `expected` vectors of torch. The first passes also initialize the
        libraries below torch, which should not happen in a request.
        """
        forward: Forward = self._network
        variants = [forward]
        if serving.prefix_reuse and self._network.shareable:
            variants.append(forward := PrefixCache(self._network))
        if self.kernels == "triton" and self.device != "cpu":  # Triton's interpreter, on a CPU, compiles nothing
            self._compile_linears()
            if serving.cuda_graphs and self._network.recordable:
                variants.append(forward := CudaGraphs(self._network, forward, self.device, self._graph_tokens))
        vectors = [self._vectors(variant) for variant in variants]
        if self.kernels == "triton" and expected is not None:
            cosine = _min_cosine(np.stack(vectors), expected)
            if not cosine >= MIN_KERNEL_COSINE:
                raise ValueError(f"Triton's kernels and torch's disagree on {self.device}: cosine {cosine:.4f}")
            log.info("%s: Triton's kernels agree with torch's: cosine at least %.5f", serving.name, cosine)
        return forward

    def _compile_linears(self) -> None:
        """Run every layer with an activation once for each kernel that any number of tokens selects."""
        modules = [*self._network.modules(), *self._head.modules()]
        layers = [layer for layer in modules if isinstance(layer, Linear) and layer.act]
        distinct = {(layer.weight.shape, layer.act): layer for layer in layers}
        for layer in distinct.values():
            for tokens in self._ops.linear_sizes(self.device):
                layer(torch.zeros(tokens, layer.weight.shape[1], dtype=layer.weight.dtype, device=self.device))

    @torch.inference_mode()
    def _vectors(self, forward: Forward, head: Head | None = None) -> npt.NDArray[np.float32]:
        """Return the vectors of the samples."""
        return np.concatenate([self._embed(forward, head or self._head, *sample) for sample in self._samples()])

    def _vectors_of_torch(self, spec: Spec, in_fp32: bool) -> npt.NDArray[np.float32]:
        """Return the vectors of the samples from plain torch with the same weights, which must not be packed yet."""
        network, head = self._build(spec, Ops.reference())
        loaded: tuple[tuple[nn.Module, nn.Module], ...] = ((network, self._network), (head, self._head))
        for module, source in loaded:
            module.load_state_dict(source.state_dict(), assign=True)
        with precision.in_fp32(network) if in_fp32 else nullcontext():
            return self._vectors(network, head)

    def _agrees(self, serving: ServingConfig, expected: npt.NDArray[np.float32]) -> bool:
        """Return whether the vectors of the samples are close enough to those of plain torch in fp32."""
        cosine = _min_cosine(self._vectors(self._network), expected)
        figures = serving.name, _name(self.dtype), cosine
        log.info("%s: vectors in %s have cosines of at least %.5f to plain torch's in fp32", *figures)
        return cosine >= precision.MIN_ACCURATE_COSINE

    @contextmanager
    def _explain(self, serving: ServingConfig) -> Iterator[None]:
        """Turn an error of the kernels into a ConfigError with a hint."""
        try:
            yield
        except (ValueError, LookupError, ImportError) as error:
            hint = f"; {REFERENCE_HINT}" if self.kernels == "triton" else ""
            raise ConfigError(f"{serving.name}: {error}{hint}") from error
        except (RuntimeError, AssertionError, OSError) as error:
            if self.kernels != "triton" or (remedy := _remedy(error)) is None:
                raise
            raise ConfigError(f"{serving.name}: {' '.join(str(error).split())[:200]}; {remedy}") from error

    def _samples(self) -> list[tuple[list[Row], list[int]]]:
        """Return warm-up batches with their dimensions: random texts, two of which share a prefix, and images.

        Rows of one size and rows of several are pooled by different kernels, so there is a batch of each.
        """
        rng = np.random.default_rng(0)
        longest = min(self.model.max_tokens, 64)
        ids = [rng.integers(self.model.vocab_size, size=n, dtype=np.int32) for n in {1, min(7, longest), longest}]
        sharing = Row(max(ids, key=len), shared_prefix_tokens=longest // 2)
        batches = [[*map(Row, ids), sharing, sharing], self._network.sample_image_rows()]
        dims = self.model.dimensions
        sizes = ([max(1, dims // 2), dims], [dims, dims])
        return [(rows, [first, *[rest] * (len(rows) - 1)]) for rows in batches if rows for first, rest in sizes]


def _remedy(error: Exception) -> str | None:
    """Return what an operator can do about an error of Triton's compiler or of CUDA, if it is a known one."""
    if isinstance(error, PermissionError) or getattr(error, "errno", None) in (errno.EROFS, errno.ENOSPC):
        return "set TRITON_CACHE_DIR to a directory that can be written"
    return next((remedy for text, remedy in _REMEDIES.items() if text in str(error)), None)


def _copied(vectors: Tensor) -> Callable[[], Vectors]:
    """Start to copy vectors from a GPU to the host. Return the function that waits for the copy."""
    copy = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
    copy.copy_(vectors, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()

    def wait() -> Vectors:
        copied.synchronize()
        result: Vectors = copy.numpy()
        return result

    return wait


def _explained(wait: Callable[[], Vectors]) -> Callable[[], Vectors]:
    """Return a function that raises the loss of the device as DeviceLostError."""

    def explained() -> Vectors:
        try:
            return wait()
        except torch.AcceleratorError as error:
            raise DeviceLostError(str(error)) from error

    return explained


def _joined(parts: Sequence[Vectors]) -> Vectors:
    """Return vectors of several passes, which may differ in width, as one array padded with zeros."""
    vectors = np.zeros((sum(map(len, parts)), max(part.shape[1] for part in parts)), dtype=np.float32)
    start = 0
    for part in parts:
        vectors[start : start + len(part), : part.shape[1]] = part
        start += len(part)
    return vectors


def _flops(device: str, dtype: torch.dtype) -> float:
    """Measure the floating-point operations per second of a large product."""
    size, repeats = 4_096, 10
    x = torch.rand(size, size, device=device).to(dtype)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.mm(x, x)
    begin.record()
    for _ in range(repeats):
        torch.mm(x, x)
    end.record()
    end.synchronize()
    return float(2 * size**3 * repeats / (begin.elapsed_time(end) / 1_000))


def _min_cosine(vectors: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """Return the lowest cosine of unit vectors [...,n,E] and [n,E]; NaN if any is NaN."""
    return float((vectors * expected).sum(axis=-1).min())


def _keep_memory() -> None:
    """Let glibc keep the memory a pass has freed for the next one.

    Otherwise activations of megabytes are returned to the system and faulted in again page by page in every layer.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc only
        for parameter in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            libc.mallopt(parameter, 2**30)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(serving: ServingConfig, kernels: str) -> torch.dtype:
    if serving.dtype == "int8" and serving.device != "cpu":
        raise ConfigError(f"{serving.name}/config.pbtxt: dtype is 'int8', which is supported on CPUs only")
    if serving.dtype in ("auto", "int8"):
        if serving.device != "cpu":
            return torch.bfloat16
        return precision.fast_dtype() if kernels != "triton" else torch.float32
    dtype: torch.dtype = getattr(torch, serving.dtype)
    return dtype
