"""CLIP: a causal text tower and a vision tower, projected into one space.

Modules are named as CLIP checkpoints name their tensors (`pre_layrnorm` is theirs).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from triton_embed.kernels.ops import Ops
from triton_embed.kernels.packed import Packed
from triton_embed.python_backend.checkpoint.config import ModelConfig
from triton_embed.python_backend.checkpoint.hf_config import ClipConfig, TowerConfig
from triton_embed.python_backend.inputs.row import NO_IDS, Ids, Row
from triton_embed.python_backend.networks.batch import Batch, Layout, one_each
from triton_embed.python_backend.networks.layers import (
    FusedLinear,
    LayerNorm,
    Linear,
    PatchEmbedding,
    Projection,
    Table,
)
from triton_embed.python_backend.networks.patches import Patchify
from triton_embed.python_backend.networks.weights import Naming


class Clip(nn.Module):
    """Rows of one image, or of token ids that end at the pooled token -> fp32 [B,E], and their layout."""

    recordable, shareable = True, False  # by CudaGraphs, and by PrefixCache
    naming = Naming(
        renames=(("clip.", ""),),
        fused={"qkv_proj": ("q_proj", "k_proj", "v_proj")},
        # The training temperature, and constants in old files.
        ignored=("logit_scale",),
        ignored_endings=(".embeddings.position_ids",),
    )

    def __init__(self, ops: Ops, model: ModelConfig, config: ClipConfig, device: str) -> None:
        super().__init__()
        self._device, self._config = device, config
        self._patchify = Patchify(ops, model, config.patch_size, 1, 1, device)
        self.text_model = TextTower(ops, config, device)
        self.vision_model = VisionTower(ops, config)
        self.text_projection = Projection(ops, config.text.hidden_size, config.hidden_size, bias=False)
        self.visual_projection = Projection(ops, config.vision.hidden_size, config.hidden_size, bias=False)

    def forward(self, rows: Sequence[Row]) -> tuple[Tensor, Packed]:
        texts = [i for i, row in enumerate(rows) if not row.images]
        images = [i for i, row in enumerate(rows) if row.images]
        y = torch.empty(len(rows), self.text_projection.weight.shape[0], device=self._device)
        if texts:
            batch = self.lay_out([rows[i] for i in texts]).to(self._device)
            y[texts] = self.compute(batch)[: len(texts)]
        if images:
            patches = torch.cat([self._patchify(rows[i].images[0]) for i in images])
            y[images] = self.visual_projection(self.vision_model(patches, len(images)).float())
        return y, one_each(len(rows), self._device)

    def sample_image_rows(self) -> list[Row]:
        """Return one row for warm-up."""
        size = self._config.image_size
        return [Row(NO_IDS, (np.full((size, size, 3), 127, dtype=np.uint8),), self._config.vision_tokens)]

    def lay_out(self, rows: Sequence[Row]) -> Layout:
        """Lay out rows of text."""
        return self.text_model.lay_out([row.ids for row in rows])

    def compute(self, batch: Batch) -> Tensor:
        """Return the vectors of a batch of texts."""
        y: Tensor = self.text_projection(self.text_model(batch).float())
        return y


class TextTower(nn.Module):
    """A batch of texts -> the normalized state [B,E] of each last token."""

    def __init__(self, ops: Ops, config: ClipConfig, device: str) -> None:
        super().__init__()
        size = config.text.hidden_size
        self._ops = ops
        self._device, self._heads, self._size = device, config.text.heads, size
        self.embeddings = nn.ModuleDict(
            {"token_embedding": Table(config.vocab_size, size), "position_embedding": Table(config.max_tokens, size)}
        )
        self.encoder = Stack(ops, config.text, causal=True)
        self.final_layer_norm = LayerNorm(ops, size, config.text.norm_eps)

    def lay_out(self, rows: Sequence[Ids]) -> Layout:
        size, weight = self._size, self.embeddings["token_embedding"].get_parameter("weight")
        tile = self._ops.tile_tokens(self._heads, self._heads, size // self._heads, weight.dtype, self._device)
        return Layout.of(rows, "last", tile=tile)

    def forward(self, batch: Batch) -> Tensor:
        x = self.embeddings["token_embedding"](batch.ids)
        x = x + self.embeddings["position_embedding"](batch.positions[0])
        y: Tensor = self.final_layer_norm(*self.encoder(x, batch.packed, batch.pooled))[0]
        return y


class VisionTower(nn.Module):
    """Patches of n images [n*g*g, 3*p*p] -> the normalized state [n,E] of each class token."""

    def __init__(self, ops: Ops, config: ClipConfig) -> None:
        super().__init__()
        self._ops = ops
        self._heads = config.vision.heads
        self.embeddings = VisionEmbeddings(ops, config)
        self.pre_layrnorm = LayerNorm(ops, config.vision.hidden_size, config.vision.norm_eps)
        self.encoder = Stack(ops, config.vision, causal=False)
        self.post_layernorm = LayerNorm(ops, config.vision.hidden_size, config.vision.norm_eps)

    def forward(self, patches: Tensor, count: int) -> Tensor:
        x = self.embeddings(patches, count)
        tile = self._ops.tile_tokens(self._heads, self._heads, x.shape[2] // self._heads, x.dtype, x.device)
        packed = Packed.from_lengths([x.shape[1]] * count, x.device, tile)
        x = self.pre_layrnorm(x.flatten(0, 1))[0]
        y: Tensor = self.post_layernorm(*self.encoder(x, packed, packed.cu_seqlens[:-1]))[0]
        return y


class VisionEmbeddings(nn.Module):
    """Class token and projected patches, plus learned positions: [n, 1+g*g, E]."""

    def __init__(self, ops: Ops, config: ClipConfig) -> None:
        super().__init__()
        size = config.vision.hidden_size
        self.class_embedding = nn.Parameter(torch.empty(size))
        self.patch_embedding = PatchEmbedding(ops, (config.patch_size, config.patch_size), size)
        self.position_embedding = Table(config.vision_tokens, size)

    def forward(self, patches: Tensor, count: int) -> Tensor:
        positions = self.position_embedding.weight
        x = self.patch_embedding(patches.to(positions.dtype)).view(count, -1, len(self.class_embedding))
        return torch.cat([self.class_embedding.expand(count, 1, -1), x], dim=1) + positions


class Stack(nn.Module):
    """Pre-norm blocks: [T,E] -> [B,E] of the pooled tokens, and the residual stream to add."""

    def __init__(self, ops: Ops, config: TowerConfig, causal: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(ops, config, causal) for _ in range(config.layers))

    def forward(self, x: Tensor, packed: Packed, pooled: Tensor) -> tuple[Tensor, Tensor]:
        residual = None
        *layers, last = self.layers
        for layer in layers:
            x, residual = layer(x, residual, packed)
        y: tuple[Tensor, Tensor] = last(x, residual, packed, pooled)
        return y


class Block(nn.Module):
    """Norm, attention, norm, MLP. Each norm adds its input to the residual stream."""

    def __init__(self, ops: Ops, config: TowerConfig, causal: bool) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(ops, config.hidden_size, config.norm_eps)
        self.self_attn = Attention(ops, config, causal)
        self.layer_norm2 = LayerNorm(ops, config.hidden_size, config.norm_eps)
        self.mlp = nn.ModuleDict(
            {
                "fc1": Linear(ops, config.hidden_size, config.intermediate_size, config.activation),
                "fc2": Linear(ops, config.intermediate_size, config.hidden_size),
            }
        )

    def forward(
        self, x: Tensor, residual: Tensor | None, packed: Packed, pooled: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run one block. `pooled`: compute only these rows; later blocks do not use the rest."""
        x, residual = self.layer_norm1(x, residual)
        x, residual = self.layer_norm2(self.self_attn(x, packed, pooled), residual, pooled)
        return self.mlp["fc2"](self.mlp["fc1"](x)), residual


class Attention(nn.Module):
    """Fused q/k/v projection, attention inside each sequence, projection."""

    def __init__(self, ops: Ops, config: TowerConfig, causal: bool) -> None:
        super().__init__()
        self._ops = ops
        self.heads, self.causal = config.heads, causal
        self.scale = (config.hidden_size // config.heads) ** -0.5
        self.qkv_proj = FusedLinear(ops, config.hidden_size, (config.hidden_size,) * 3)
        self.out_proj = Linear(ops, config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, packed: Packed, pooled: Tensor | None) -> Tensor:
        q, k, v = self.qkv_proj(x).view(len(x), 3, self.heads, -1).unbind(1)
        if pooled is None:
            y = self._ops.varlen_attention(q, k, v, packed, self.causal, window=None, scale=self.scale)
        else:
            y = self._ops.pooled_attention(q, k, v, packed, pooled, window=None, scale=self.scale)
        out: Tensor = self.out_proj(y.flatten(1))
        return out
