"""Every op as a Triton kernel, with the names and signatures of `reference.py`."""

from triton_embed.kernels.gpu import blocks
from triton_embed.kernels.gpu.activation import activation, gated_activation
from triton_embed.kernels.gpu.attention import pooled_attention, tile_tokens, varlen_attention
from triton_embed.kernels.gpu.launch import interpreted
from triton_embed.kernels.gpu.linear import linear
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
    "gated_activation",
    "interpreted",
    "linear",
    "patchify",
    "pooled_attention",
    "post_layer_norm",
    "qk_norm_rope_",
    "segment_pool",
    "tile_tokens",
    "varlen_attention",
]
