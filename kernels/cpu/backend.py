"""Every op on a CPU, with the names and signatures of `reference.py`: compiled loops, or torch where no loop exists."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from triton_embed.kernels import reference
from triton_embed.kernels.cpu import attention as dense_attention
from triton_embed.kernels.cpu import rows
from triton_embed.kernels.cpu.linear_bf16 import PanelWeight
from triton_embed.kernels.cpu.rows import (
    add_layer_norm,
    add_rms_norm,
    embed_layer_norm,
    gated_activation,
    post_layer_norm,
    qk_norm_rope_,
)
from triton_embed.kernels.packed import Packed
from triton_embed.kernels.reference import activation, linear, patchify

__all__ = [
    "activation",
    "add_layer_norm",
    "add_rms_norm",
    "embed_layer_norm",
    "gated_activation",
    "linear",
    "pack_linear",
    "patchify",
    "pooled_attention",
    "post_layer_norm",
    "qk_norm_rope_",
    "segment_pool",
    "varlen_attention",
]


pack_linear = PanelWeight.pack


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
    """Attend within each sequence; see `ops.varlen_attention`."""
    if prefix is not None or (window is not None and window < max(packed.lengths)) or not _has_whole_words(q):
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
    """Attend with one query per sequence; see `ops.pooled_attention`."""
    if prefix is not None or (window is not None and window < max(packed.lengths)) or not _has_whole_words(q):
        return reference.pooled_attention(q, k, v, packed, rows, window, scale, prefix)
    return dense_attention.attention(q, k, v, packed, False, scale, rows)


def segment_pool(
    x: Tensor,
    packed: Packed,
    mode: str,
    dims: Sequence[int],
    norm: Callable[[Tensor], Tensor] | None = None,
    l2: bool = True,
) -> Tensor:
    """Pool each sequence to one vector; see `ops.segment_pool`."""
    if norm is not None:
        return reference.segment_pool(x, packed, mode, dims, norm, l2)
    return rows.segment_pool(x, packed, mode, dims, l2)


def _has_whole_words(q: Tensor) -> bool:
    """Return whether each head of `q` is a whole number of 4-byte words."""
    return q.dtype == torch.float32 or q.shape[2] % 2 == 0
