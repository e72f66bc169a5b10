"""Every op as a Triton kernel: the backend `triton`."""

import torch
from torch import Tensor

from triton_embed.kernels import reference
from triton_embed.kernels.gpu import blocks
from triton_embed.kernels.gpu import linear as fused
from triton_embed.kernels.gpu.activation import activation, gated_activation
from triton_embed.kernels.gpu.attention import pooled_attention, tile_tokens, varlen_attention
from triton_embed.kernels.gpu.blocks import Config
from triton_embed.kernels.gpu.launch import interpreted
from triton_embed.kernels.gpu.norm import add_layer_norm, add_rms_norm, embed_layer_norm, post_layer_norm
from triton_embed.kernels.gpu.patchify import patchify
from triton_embed.kernels.gpu.pooling import segment_pool
from triton_embed.kernels.gpu.rotary import qk_norm_rope_

__all__ = [
    "activation",
    "add_layer_norm",
    "add_rms_norm",
    "blocks",
    "embed_layer_norm",
    "first_residual",
    "gated_activation",
    "interpreted",
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

name = "triton"


def first_residual(x: Tensor) -> Tensor:
    """Return x: the residual keeps the dtype of the network."""
    return x


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None = None, config: Config | None = None
) -> Tensor:
    """Compute act(x W^T + b) by cuBLAS, or by our kernel where the table of the architecture has a config for it.

    Args:
        config: Use our kernel with this config.
    """
    if config is None and act is not None:
        sizes = {"tokens": len(x), "outputs": len(weight), "inputs": weight.shape[1], "itemsize": x.itemsize}
        config = blocks.table_for(x.device).find_config("linear", **sizes)
    if config is not None:
        return fused.linear(x, weight, bias, act, config)
    y = reference.linear(x, weight, bias)
    return y if act is None else activation(y, act)


def linear_sizes(device: torch.device) -> list[int]:
    """Return the limits of the table's entries for `linear`, and one number of tokens past the last."""
    limits = blocks.table_for(device).limits("linear", "tokens")
    return [*limits, max(limits, default=0) + 1]


def pack_linear(weight: Tensor) -> Tensor:
    """Return the weight: cuBLAS and our kernel read it as it is."""
    return weight
