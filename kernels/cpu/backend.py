"""Every op on a CPU: the backend `cpu`. Compiled loops, or torch where no loop exists."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from triton_embed.kernels import reference
from triton_embed.kernels.cpu import activation as gates
from triton_embed.kernels.cpu import attention as dense_attention
from triton_embed.kernels.cpu import norm as norms
from triton_embed.kernels.cpu import pooling, rotary
from triton_embed.kernels.cpu.linear_bf16 import PanelWeight
from triton_embed.kernels.packed import Packed
from triton_embed.kernels.reference import activation, first_residual, linear, linear_sizes, patchify, tile_tokens

P = ParamSpec("P")
R = TypeVar("R")

__all__ = [
    "activation",
    "add_layer_norm",
    "add_rms_norm",
    "embed_layer_norm",
    "first_residual",
    "gated_activation",
    "linear",
    "linear_sizes",
    "name",
    "pack_linear",
    "patchify",
    "pooled_attention",
    "post_layer_norm",
    "qk_norm_rope_",
    "segment_pool",
    "tile_tokens",
    "varlen_attention",
]

name = "cpu"
LOOP_DTYPES = (torch.float32, torch.bfloat16)  # that loops read; torch computes fp16


def _by_dtype(loop: Callable[P, R], plain: Callable[P, R], position: int = 0) -> Callable[P, R]:
    """Return an op that runs `loop` if it reads the dtype of the argument at `position`, else `plain`."""

    @wraps(plain)
    def op(*args: P.args, **kwargs: P.kwargs) -> R:
        x: Any = args[position]
        return loop(*args, **kwargs) if x.dtype in LOOP_DTYPES else plain(*args, **kwargs)

    return op


add_rms_norm = _by_dtype(norms.add_rms_norm, reference.add_rms_norm)
add_layer_norm = _by_dtype(norms.add_layer_norm, reference.add_layer_norm)
post_layer_norm = _by_dtype(norms.post_layer_norm, reference.post_layer_norm)
embed_layer_norm = _by_dtype(norms.embed_layer_norm, reference.embed_layer_norm, position=3)
gated_activation = _by_dtype(gates.gated_activation, reference.gated_activation)
qk_norm_rope_ = _by_dtype(rotary.qk_norm_rope_, reference.qk_norm_rope_)


def pack_linear(weight: Tensor) -> Tensor | PanelWeight:
    """Return a bf16 weight in panels where the loop over panels is faster than oneDNN, else in oneDNN's layout."""
    return PanelWeight.pack(weight) or reference.pack_linear(weight)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: Packed,
    causal: bool,
    window: int | None,
    scale: float,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attend within each sequence; see `Ops.varlen_attention`."""
    if not _can_loop(q, packed, window, prefix):
        return reference.varlen_attention(q, k, v, packed, causal, window, scale, prefix)
    return dense_attention.attention(q, k, v, packed, causal, scale)


def pooled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: Packed,
    rows: Tensor,
    window: int | None,
    scale: float,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attend with one query per sequence; see `Ops.pooled_attention`."""
    if not _can_loop(q, packed, window, prefix):
        return reference.pooled_attention(q, k, v, packed, rows, window, scale, prefix)
    return dense_attention.attention(q, k, v, packed, False, scale, rows)


def segment_pool(
    x: Tensor,
    packed: Packed,
    mode: str,
    dims: Sequence[int],
    project: Callable[[Tensor], Tensor] | None = None,
    l2: bool = True,
) -> Tensor:
    """Pool each sequence to one vector; see `Ops.segment_pool`."""
    if project is not None or x.dtype not in LOOP_DTYPES:
        return reference.segment_pool(x, packed, mode, dims, project, l2)
    return pooling.segment_pool(x, packed, mode, dims, l2)


def _can_loop(q: Tensor, packed: Packed, window: int | None, prefix: tuple[Tensor, Tensor] | None) -> bool:
    """Return whether the loop computes this attention: fp32, or bf16 with whole 4-byte words per head."""
    whole_words = q.dtype == torch.float32 or (q.dtype == torch.bfloat16 and q.shape[2] % 2 == 0)
    return whole_words and prefix is None and (window is None or window >= max(packed.lengths))
