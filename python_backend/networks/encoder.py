"""Encoders (BERT, XLM-RoBERTa): post-norm, bidirectional, over packed tokens.

Modules are named as BERT checkpoints name their tensors; `self` is BERT's name for the attention projections.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from triton_embed.kernels.ops import Ops
from triton_embed.kernels.packed import Packed
from triton_embed.python_backend.checkpoint.config import ModelConfig
from triton_embed.python_backend.checkpoint.hf_config import EncoderConfig
from triton_embed.python_backend.inputs.row import Ids, Row
from triton_embed.python_backend.networks.batch import Batch, Layout
from triton_embed.python_backend.networks.layers import FusedLinear, Linear, PostLayerNorm, Table
from triton_embed.python_backend.networks.weights import Naming


class Encoder(nn.Module):
    """Rows of token ids -> hidden states [T,E], or [B,E] of the pooled tokens, and their layout."""

    recordable, shareable = True, False  # by CudaGraphs, and by PrefixCache
    naming = Naming(
        renames=(("bert.", ""), ("roberta.", "")),
        fused={"qkv": ("query", "key", "value")},
        # Embeddings use neither the pooler nor heads; the ids are constants.
        ignored=(
            "pooler.",
            "cls.",
            "lm_head.",
            "classifier.",
            "qa_outputs.",
            "embeddings.position_ids",
            "embeddings.token_type_ids",
        ),
    )

    def __init__(self, ops: Ops, model: ModelConfig, config: EncoderConfig, device: str) -> None:
        super().__init__()
        self._ops, self._pooling, self._device, self._config = ops, model.pooling, device, config
        self.embeddings = Embeddings(ops, config)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(ops, config) for _ in range(config.layers))})

    def forward(self, rows: Sequence[Row]) -> tuple[Tensor, Packed]:
        batch = self.lay_out(rows).to(self._device)
        return self.compute(batch), batch.states

    def sample_image_rows(self) -> list[Row]:
        return []

    def lay_out(self, rows: Sequence[Row]) -> Layout:
        ids = [row.ids for row in rows]
        positions = [self._positions(row_ids) for row_ids in ids] if self._config.first_position else None
        heads, size = self._config.heads, self._config.hidden_size
        tile = self._ops.tile_tokens(
            heads, heads, size // heads, self.embeddings.word_embeddings.weight.dtype, self._device
        )
        return Layout.of(ids, self._pooling, positions, tile)

    def compute(self, batch: Batch) -> Tensor:
        x = self.embeddings(batch)
        residual = self._ops.first_residual(x)
        *layers, last = self.encoder["layer"].children()
        for layer in layers:
            x, residual = layer(x, residual, batch.packed)
        y: Tensor = last(x, residual, batch.packed, batch.pooled)[1]
        return y

    def _positions(self, ids: Ids) -> npt.NDArray[np.int64]:
        """Return RoBERTa's positions [1,n]: tokens count up from `first_position`, and padding tokens are skipped.

        `first_position` - 1 is both the id and the position of a padding token.
        """
        padding = self._config.first_position - 1
        counted = ids != padding
        positions: npt.NDArray[np.int64] = np.cumsum(counted) * counted + padding
        return positions[None]


class Embeddings(nn.Module):
    """Word + position + type 0, then LayerNorm."""

    def __init__(self, ops: Ops, config: EncoderConfig) -> None:
        super().__init__()
        self._ops = ops
        self.word_embeddings = Table(config.vocab_size, config.hidden_size)
        self.position_embeddings = Table(config.positions, config.hidden_size)
        self.token_type_embeddings = Table(config.token_types, config.hidden_size)
        self.LayerNorm = PostLayerNorm(ops, config.hidden_size, config.norm_eps)

    def forward(self, batch: Batch) -> Tensor:
        return self._ops.embed_layer_norm(
            batch.ids,
            batch.positions[0],
            None,
            self.word_embeddings.weight,
            self.position_embeddings.weight,
            self.token_type_embeddings.weight,
            self.LayerNorm.weight,
            self.LayerNorm.bias,
            self.LayerNorm.eps,
        )


class Layer(nn.Module):
    """Attention, add and norm, MLP, add and norm."""

    def __init__(self, ops: Ops, config: EncoderConfig) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {"self": Attention(ops, config), "output": Output(ops, config.hidden_size, config)}
        )
        self.intermediate = nn.ModuleDict(
            {"dense": Linear(ops, config.hidden_size, config.intermediate_size, config.activation)}
        )
        self.output = Output(ops, config.intermediate_size, config)

    def forward(
        self, x: Tensor, residual: Tensor, packed: Packed, pooled: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run one layer. `pooled`: compute only these rows; later layers do not use the rest."""
        x, residual = self.attention["output"](self.attention["self"](x, packed, pooled), residual, pooled)
        y: tuple[Tensor, Tensor] = self.output(self.intermediate["dense"](x), residual)
        return y


class Attention(nn.Module):
    """Fused q/k/v projection and attention inside each sequence."""

    def __init__(self, ops: Ops, config: EncoderConfig) -> None:
        super().__init__()
        self._ops = ops
        self.heads = config.heads
        self.scale = (config.hidden_size // config.heads) ** -0.5
        self.qkv = FusedLinear(ops, config.hidden_size, (config.hidden_size,) * 3)

    def forward(self, x: Tensor, packed: Packed, pooled: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)
        if pooled is not None:
            return self._ops.pooled_attention(q, k, v, packed, pooled, window=None, scale=self.scale).flatten(1)
        return self._ops.varlen_attention(q, k, v, packed, causal=False, window=None, scale=self.scale).flatten(1)


class Output(nn.Module):
    """Projection to E, plus the residual, then LayerNorm: returns the output and the next residual."""

    def __init__(self, ops: Ops, inputs: int, config: EncoderConfig) -> None:
        super().__init__()
        self._ops = ops
        self.dense = Linear(ops, inputs, config.hidden_size)
        self.LayerNorm = PostLayerNorm(ops, config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, residual: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        linear, norm = self.dense, self.LayerNorm  # not called as modules, because that slows short queries
        y = self._ops.linear(x, linear.weight, linear.bias)
        return self._ops.post_layer_norm(y, residual, norm.weight, norm.bias, norm.eps, rows)
