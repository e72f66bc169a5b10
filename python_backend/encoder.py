"""Encoder: BERT, post-norm, bidirectional, over packed tokens.

Modules are named as BERT checkpoints name their tensors; `self` is BERT's name for the attention projections.
"""

from typing import ClassVar

from torch import Tensor, nn

from triton_embed.kernels import ops
from triton_embed.kernels.packed import Packed
from triton_embed.python_backend.batch import Batch
from triton_embed.python_backend.config import ModelConfig
from triton_embed.python_backend.layers import AddLayerNorm, Linear, Table


class Encoder(nn.Module):
    """Batch of T tokens -> hidden states [T,E]."""

    prefixes = ("bert.",)
    fused: ClassVar = {"qkv": ("query", "key", "value")}
    # The pooler and the pre-training heads play no part in embeddings; position_ids is a constant.
    ignored = ("pooler.", "cls.", "embeddings.position_ids")

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(model)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(model) for _ in range(model.layers))})

    def forward(self, batch: Batch) -> Tensor:
        x: Tensor = self.embeddings(batch)
        for layer in self.encoder["layer"].children():
            x = layer(x, batch.packed)
        return x


class Embeddings(nn.Module):
    """Word + position + type 0, then LayerNorm."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.word_embeddings = Table(model.vocab_size, model.hidden_size)
        self.position_embeddings = Table(model.positions, model.hidden_size)
        self.token_type_embeddings = Table(model.token_types, model.hidden_size)
        self.LayerNorm = AddLayerNorm(model.hidden_size, model.norm_eps)

    def forward(self, batch: Batch) -> Tensor:
        return ops.embed_layer_norm(
            batch.ids,
            batch.positions,
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

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"self": Attention(model), "output": Output(model.hidden_size, model)})
        self.intermediate = nn.ModuleDict(
            {"dense": Linear(model.hidden_size, model.intermediate_size, model.activation)}
        )
        self.output = Output(model.intermediate_size, model)

    def forward(self, x: Tensor, packed: Packed) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, packed), x)
        y: Tensor = self.output(self.intermediate["dense"](x), x)
        return y


class Attention(nn.Module):
    """Fused q/k/v projection and attention inside each sequence."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.heads = model.heads
        self.scale = (model.hidden_size // model.heads) ** -0.5
        self.qkv = Linear(model.hidden_size, 3 * model.hidden_size)

    def forward(self, x: Tensor, packed: Packed) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)
        return ops.varlen_attention(q, k, v, packed, causal=False, window=None, scale=self.scale).flatten(1)


class Output(nn.Module):
    """Projection back to E, plus the residual, then LayerNorm."""

    def __init__(self, inputs: int, model: ModelConfig) -> None:
        super().__init__()
        self.dense = Linear(inputs, model.hidden_size)
        self.LayerNorm = AddLayerNorm(model.hidden_size, model.norm_eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y: Tensor = self.LayerNorm(self.dense(x), residual)
        return y
