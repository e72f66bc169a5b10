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

    recordable, shareable = True, False
    naming = Naming(
        renames=(("bert.", ""), ("roberta.", "")),
        fused={"qkv": ("query", "key", "value")},
        # Embeddings do not use the pooler and the pre-training heads; position_ids is a constant.
        ignored=("pooler.", "cls.", "lm_head.", "embeddings.position_ids"),
    )

    def __init__(self, ops: Ops, model: ModelConfig, shape: EncoderConfig, device: str) -> None:
        super().__init__()
        self._ops, self._pooling, self._device, self._shape = ops, model.pooling, device, shape
        self.embeddings = Embeddings(ops, shape)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(ops, shape) for _ in range(shape.layers))})

    def forward(self, rows: Sequence[Row]) -> tuple[Tensor, Packed]:
        batch = self.lay_out(rows).to(self._device)
        return self.compute(batch), batch.states

    def sample_pictures(self) -> list[Row]:
        return []

    def lay_out(self, rows: Sequence[Row]) -> Layout:
        ids = [row.ids for row in rows]
        positions = [self._positions(one) for one in ids] if self._shape.first_position else None
        heads, size = self._shape.heads, self._shape.hidden_size
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
        """Return positions. RoBERTa counts from the position after its padding token's, which is fixed."""
        first = self._shape.first_position
        counted = ids != first - 1
        found: npt.NDArray[np.int64] = np.cumsum(counted) * counted + first - 1
        return found[None]


class Embeddings(nn.Module):
    """Word + position + type 0, then LayerNorm."""

    def __init__(self, ops: Ops, shape: EncoderConfig) -> None:
        super().__init__()
        self._ops = ops
        self.word_embeddings = Table(shape.vocab_size, shape.hidden_size)
        self.position_embeddings = Table(shape.positions, shape.hidden_size)
        self.token_type_embeddings = Table(shape.token_types, shape.hidden_size)
        self.LayerNorm = PostLayerNorm(ops, shape.hidden_size, shape.norm_eps)

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

    def __init__(self, ops: Ops, shape: EncoderConfig) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"self": Attention(ops, shape), "output": Output(ops, shape.hidden_size, shape)})
        self.intermediate = nn.ModuleDict(
            {"dense": Linear(ops, shape.hidden_size, shape.intermediate_size, shape.activation)}
        )
        self.output = Output(ops, shape.intermediate_size, shape)

    def forward(
        self, x: Tensor, residual: Tensor, packed: Packed, pooled: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run one layer. `pooled`: compute only these rows; later layers do not use the rest."""
        x, residual = self.attention["output"](self.attention["self"](x, packed, pooled), residual, pooled)
        y: tuple[Tensor, Tensor] = self.output(self.intermediate["dense"](x), residual)
        return y


class Attention(nn.Module):
    """Fused q/k/v projection and attention inside each sequence."""

    def __init__(self, ops: Ops, shape: EncoderConfig) -> None:
        super().__init__()
        self._ops = ops
        self.heads = shape.heads
        self.scale = (shape.hidden_size // shape.heads) ** -0.5
        self.qkv = FusedLinear(ops, shape.hidden_size, (shape.hidden_size,) * 3)

    def forward(self, x: Tensor, packed: Packed, pooled: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)
        if pooled is not None:
            return self._ops.pooled_attention(q, k, v, packed, pooled, window=None, scale=self.scale).flatten(1)
        return self._ops.varlen_attention(q, k, v, packed, causal=False, window=None, scale=self.scale).flatten(1)


class Output(nn.Module):
    """Projection back to E, plus the residual, then LayerNorm: the output and the next residual."""

    def __init__(self, ops: Ops, inputs: int, shape: EncoderConfig) -> None:
        super().__init__()
        self._ops = ops
        self.dense = Linear(ops, inputs, shape.hidden_size)
        self.LayerNorm = PostLayerNorm(ops, shape.hidden_size, shape.norm_eps)

    def forward(self, x: Tensor, residual: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        linear, norm = self.dense, self.LayerNorm  # called as functions: short queries spend most time in calls
        y = self._ops.linear(x, linear.weight, linear.bias)
        return self._ops.post_layer_norm(y, residual, norm.weight, norm.bias, norm.eps, rows)
