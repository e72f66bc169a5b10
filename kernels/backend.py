"""The backends: plain torch, loops and oneDNN on a CPU, Triton kernels on a GPU. One is chosen when a model loads.

A backend is a module with one function per op; shapes and rules are those of `ops.Ops`, which checks the arguments.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from triton_embed.kernels import reference
from triton_embed.kernels.packed import Packed

KERNELS = ("auto", "reference", "triton")  # values of `kernels`; config.pbtxt accepts all but `triton`
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

KeysValues = tuple[Tensor, Tensor]


class PackedWeight(Protocol):
    """A weight [N,K] in a layout for products on a CPU, used in place of the tensor."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> torch.Size: ...

    def fuses(self, act: str | None) -> bool:
        """Return whether `linear` applies this activation."""

    def linear(self, x: Tensor, bias: Tensor | None, act: str | None) -> Tensor: ...


class Backend(Protocol):
    """One implementation of every op."""

    @property
    def name(self) -> str:
        """`triton`, `cpu` or `reference`, as INFO, the log and the metrics report it."""

    def varlen_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        packed: Packed,
        causal: bool,
        window: int | None,
        scale: float,
        prefix: KeysValues | None = None,
    ) -> Tensor: ...

    def pooled_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        packed: Packed,
        rows: Tensor,
        window: int | None,
        scale: float,
        prefix: KeysValues | None = None,
    ) -> Tensor: ...

    def tile_tokens(
        self, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> int | None: ...

    def qk_norm_rope_(
        self,
        qkv: Tensor,
        heads: tuple[int, int],
        cos: Tensor,
        sin: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
    ) -> Tensor: ...

    def add_rms_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def add_layer_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def post_layer_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def embed_layer_norm(
        self,
        ids: Tensor,
        pos: Tensor,
        types: Tensor | None,
        word: Tensor,
        position: Tensor,
        token_type: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
    ) -> Tensor: ...

    def first_residual(self, x: Tensor) -> Tensor: ...

    def gated_activation(self, gate_up: Tensor) -> Tensor: ...

    def activation(self, x: Tensor, kind: str) -> Tensor: ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None = None) -> Tensor: ...

    def linear_sizes(self, device: torch.device) -> list[int]: ...

    def pack_linear(self, weight: Tensor) -> Tensor | PackedWeight: ...

    def segment_pool(
        self,
        x: Tensor,
        packed: Packed,
        mode: str,
        dims: Sequence[int],
        project: Callable[[Tensor], Tensor] | None = None,
        l2: bool = True,
    ) -> Tensor: ...

    def patchify(self, image: Tensor, patch: int, merge: int, frames: int, mean: Tensor, std: Tensor) -> Tensor: ...


def resolve(kernels: str, device: torch.device | str) -> str:
    """Return the name of the backend that a setting means on a device: `triton`, `cpu` or `reference`.

    Args:
        kernels: `auto` (Triton on a GPU, compiled loops and oneDNN on a CPU), `reference` (plain torch everywhere), or
            `triton` (everywhere; on a CPU for tests under TRITON_INTERPRET=1).

    Raises:
        ValueError: for another setting.
    """
    if kernels not in KERNELS:
        raise ValueError(f"'{kernels}' is none of {', '.join(KERNELS)}")
    if kernels == "auto":
        return "triton" if torch.device(device).type == "cuda" else "cpu"
    return kernels


def choose(kernels: str, device: torch.device | str, dtype: torch.dtype) -> Backend:
    """Return the backend that a setting means, after checking that it runs on a device in a dtype.

    Raises:
        ValueError, LookupError, ImportError: with one sentence that says why it does not run.
    """
    name = resolve(kernels, device)
    if dtype not in DTYPES:
        raise ValueError(f"no kernel computes in {dtype}")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"torch {torch.__version__} finds no GPU")
    match name:
        case "triton":
            return _triton(torch.device(device), in_interpreter=kernels == "triton")
        case "cpu":
            return _cpu()
        case _:
            return reference


def _cpu() -> Backend:
    try:
        from triton_embed.kernels.cpu import backend  # imported here, because a GPU does not need Numba
    except AttributeError as error:
        hint = "set the parameter kernels to reference"
        raise ValueError(f"torch {torch.__version__} has no OpenMP for loops to run on; {hint}") from error
    return backend


def _triton(device: torch.device, in_interpreter: bool) -> Backend:
    from triton_embed.kernels.gpu import backend  # imported here, because a server on a CPU may lack triton

    if not in_interpreter and backend.interpreted():
        raise ValueError("TRITON_INTERPRET=1 runs kernels in a slow interpreter; unset it to serve")
    backend.blocks.table_for(device)  # raises for a GPU without a table
    return backend
