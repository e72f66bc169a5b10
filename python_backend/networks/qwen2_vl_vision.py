"""Qwen2-VL's vision tower, over packed patches of images of any size, merged into tokens of the decoder.

Modules are named as the checkpoints name their tensors.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from triton_embed.kernels.ops import Ops
from triton_embed.kernels.packed import Packed
from triton_embed.python_backend.checkpoint.config import ModelConfig
from triton_embed.python_backend.checkpoint.hf_config import Qwen2VLConfig, RopeConfig, TowerConfig
from triton_embed.python_backend.inputs.row import Pixels
from triton_embed.python_backend.networks.layers import LayerNorm, Linear, PatchEmbedding
from triton_embed.python_backend.networks.patches import Patchify
from triton_embed.python_backend.networks.rotary import frequencies

Angles = tuple[Tensor, Tensor]  # their cosines and sines, fp32 [T, D/2]


class VisionTower(nn.Module):
    """Images -> [tokens, E of the decoder], one image after another."""

    def __init__(self, ops: Ops, model: ModelConfig, config: Qwen2VLConfig, device: str) -> None:
        super().__init__()
        self._ops, self._device, self._heads = ops, device, config.vision.heads
        self._patchify = Patchify(ops, model, config.patch_size, config.merge, config.frames, device)
        # Rows and columns rotate by the same frequencies, each in half of the head.
        half = config.vision.hidden_size // config.vision.heads // 2
        with torch.device("cpu"):
            self._frequencies = frequencies(RopeConfig(theta=10_000.0, head_dim=half, positions=0)).to(device)
        kernel = (config.frames, config.patch_size, config.patch_size)
        self.patch_embed = nn.ModuleDict({"proj": PatchEmbedding(ops, kernel, config.vision.hidden_size)})
        self.blocks = nn.ModuleList(Block(ops, config.vision) for _ in range(config.vision.layers))
        self.merger = Merger(ops, config)

    def forward(self, images: Sequence[Pixels]) -> Tensor:
        patches = torch.cat([self._patchify(image) for image in images])
        grids = [self._patchify.grid(image) for image in images]
        positions = torch.cat([self._patchify.positions(grid) for grid in grids], dim=1)
        lengths = [grid.count for grid in grids]
        proj: Any = self.patch_embed["proj"]
        x: Tensor = proj(patches.to(proj.weight.dtype))
        heads, size = self._heads, x.shape[1]
        tile = self._ops.tile_tokens(heads, heads, size // heads, x.dtype, self._device)
        packed = Packed.from_lengths(lengths, self._device, tile)
        radians = (positions.T[..., None].float() * self._frequencies).flatten(1)  # [P, D/2]
        angles = radians.cos(), radians.sin()
        residual = None
        for block in self.blocks:
            x, residual = block(x, residual, angles, packed)
        merged: Tensor = self.merger(x, residual)
        return merged


class Block(nn.Module):
    """Norm, attention inside each image, norm, MLP. Each norm adds its input to the residual stream."""

    def __init__(self, ops: Ops, config: TowerConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(ops, config.hidden_size, config.norm_eps)
        self.attn = Attention(ops, config)
        self.norm2 = LayerNorm(ops, config.hidden_size, config.norm_eps)
        self.mlp = nn.ModuleDict(
            {
                "fc1": Linear(ops, config.hidden_size, config.intermediate_size, config.activation),
                "fc2": Linear(ops, config.intermediate_size, config.hidden_size),
            }
        )

    def forward(self, x: Tensor, residual: Tensor | None, angles: Angles, packed: Packed) -> tuple[Tensor, Tensor]:
        x, residual = self.norm1(x, residual)
        x, residual = self.norm2(self.attn(x, angles, packed), residual)
        return self.mlp["fc2"](self.mlp["fc1"](x)), residual


class Attention(nn.Module):
    """Attention with q, k and v from one projection, rotated by row and column."""

    def __init__(self, ops: Ops, config: TowerConfig) -> None:
        super().__init__()
        self._ops = ops
        self.heads = config.heads
        self.scale = (config.hidden_size // config.heads) ** -0.5
        self.qkv = Linear(ops, config.hidden_size, 3 * config.hidden_size)
        self.proj = Linear(ops, config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, angles: Angles, packed: Packed) -> Tensor:
        qkv = self.qkv(x)
        self._ops.qk_norm_rope_(qkv, (self.heads, self.heads), *angles, None, None, 0.0)
        q, k, v = qkv.view(len(x), 3, self.heads, -1).unbind(1)
        y = self._ops.varlen_attention(q, k, v, packed, causal=False, window=None, scale=self.scale)
        out: Tensor = self.proj(y.flatten(1))
        return out


class Merger(nn.Module):
    """`merge` x `merge` neighboring patches -> one token of the decoder."""

    def __init__(self, ops: Ops, config: Qwen2VLConfig) -> None:
        super().__init__()
        self.patches = config.merge**2
        wide = config.vision.hidden_size * self.patches
        self.ln_q = LayerNorm(ops, config.vision.hidden_size, config.vision.norm_eps)
        self.mlp = nn.ModuleDict({"0": Linear(ops, wide, wide, "gelu_erf"), "2": Linear(ops, wide, config.hidden_size)})

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        normed = self.ln_q(x, residual)[0]
        y: Tensor = self.mlp["2"](self.mlp["0"](normed.view(len(x) // self.patches, -1)))
        return y
