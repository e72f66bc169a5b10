"""Decoders (Llama, Mistral, Qwen2, Qwen3) over packed tokens. Their differences are in DecoderConfig.

Modules are named as the checkpoints name their tensors.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from triton_embed.kernels.ops import Ops
from triton_embed.kernels.packed import Packed
from triton_embed.python_backend.checkpoint.config import ModelConfig
from triton_embed.python_backend.checkpoint.hf_config import DecoderConfig
from triton_embed.python_backend.errors import ConfigError
from triton_embed.python_backend.execution.prefix_cache import KeysValues, Prefix
from triton_embed.python_backend.inputs.row import Ids, Row
from triton_embed.python_backend.networks.batch import Batch, Layout
from triton_embed.python_backend.networks.layers import FusedLinear, Linear, RMSNorm, Table
from triton_embed.python_backend.networks.rotary import Rotary
from triton_embed.python_backend.networks.weights import Naming

Angles = tuple[Tensor, Tensor]  # their cosines and sines, fp32 [T, D/2]


class Decoder(nn.Module):
    """Rows of token ids -> hidden states after the final norm ([T,E], or [B,E] of pooled tokens), and their layout."""

    naming = Naming(
        renames=(("model.", ""),),
        fused={"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")},
        # Embeddings use no head, of a language model or of a classifier; inv_freq is a constant in old files.
        ignored=("lm_head.", "score.", "qa_outputs."),
        ignored_endings=("rotary_emb.inv_freq",),
    )

    def __init__(self, ops: Ops, model: ModelConfig, config: DecoderConfig, device: str) -> None:
        super().__init__()
        if config.causal and model.pooling == "cls":
            raise ConfigError("pooling 'cls' in a causal decoder: the first token attends to itself only")
        self._ops, self._pooling, self._device, self._config = ops, model.pooling, device, config
        self.embed_tokens = Table(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(ops, config, window) for window in config.windows)
        self.norm = RMSNorm(ops, config.hidden_size, config.norm_eps)
        self._rotary = Rotary(config.rope, device)
        # By CudaGraphs, and by PrefixCache. With dynamic scaling, angles depend on the length of a sequence, so that no
        # other sequence can reuse them.
        self.recordable = config.rope.kind != "dynamic"
        self.shareable = self.recordable and config.causal and model.pooling == "last"

    def forward(self, rows: Sequence[Row], prefix: Prefix | None = None) -> tuple[Tensor, Packed]:
        """Run the network. Every row begins with the ids of `prefix`, if there is one."""
        batch = self.lay_out(rows, prefix=prefix).to(self._device)
        return self.compute(batch, prefix), batch.states

    def sample_image_rows(self) -> list[Row]:
        return []

    def lay_out(
        self,
        rows: Sequence[Row],
        positions: Sequence[npt.NDArray[np.int64]] | None = None,
        prefix: Prefix | None = None,
    ) -> Layout:
        """Lay out rows. `positions` [A,n] of each row; by default they count up from 0."""
        ids, start = [row.ids for row in rows], 0
        if prefix is not None:
            start = len(prefix.ids)
            ids = [row_ids[start:] for row_ids in ids]
            all_positions = positions or [np.arange(len(row.ids))[None] for row in rows]
            positions = [row_positions[:, start:] for row_positions in all_positions]
        config = self._config
        tile = self._ops.tile_tokens(
            config.heads, config.kv_heads, config.head_dim, self.embed_tokens.weight.dtype, self._device
        )
        return Layout.of(ids, self._pooling, positions, tile)

    def compute(self, batch: Batch, prefix: Prefix | None = None) -> Tensor:
        return self.decode(batch, self.embed_tokens(batch.ids), prefix)

    def decode(
        self, batch: Batch, x: Tensor, prefix: Prefix | None = None, cache: list[KeysValues] | None = None
    ) -> Tensor:
        """Run embedded tokens x [T,E] through all layers. Their keys and values are appended to `cache`."""
        angles = self._rotary(batch.positions, batch.packed.lengths)
        residual = None
        prefixes: Sequence[KeysValues | None] = [None] * len(self.layers) if prefix is None else prefix.layers
        for layer, layer_prefix in zip(self.layers, prefixes, strict=True):
            pooled = batch.pooled if layer is self.layers[-1] else None
            x, residual = layer(x, residual, angles, batch.packed, pooled, layer_prefix, cache)
        y: Tensor = self.norm(x, residual)[0]
        return y

    def read_prefix(self, ids: Ids) -> Prefix:
        """Compute the keys and values of a prefix in every layer. Valid for causal decoders only."""
        axes = len(self._config.rope.sections)
        positions = [np.tile(np.arange(len(ids)), (axes, 1))]
        layout = self.lay_out([Row(ids)], positions)
        cache: list[KeysValues] = []
        batch = layout.to(self._device)
        self.decode(batch, self.embed_tokens(batch.ids), cache=cache)
        return Prefix(ids, tuple((k[: len(ids)].clone(), v[: len(ids)].clone()) for k, v in cache))


class Layer(nn.Module):
    """Norm, attention, norm, MLP. Each norm adds its input to the residual stream."""

    def __init__(self, ops: Ops, config: DecoderConfig, window: int | None) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(ops, config.hidden_size, config.norm_eps)
        self.self_attn = Attention(ops, config, window)
        self.post_attention_layernorm = RMSNorm(ops, config.hidden_size, config.norm_eps)
        self.mlp = MLP(ops, config)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        angles: Angles,
        packed: Packed,
        pooled: Tensor | None,
        prefix: KeysValues | None,
        cache: list[KeysValues] | None,
    ) -> tuple[Tensor, Tensor]:
        """Run one layer.

        Args:
            pooled: Compute only these rows; later layers do not use the rest.
            prefix: Keys and values before every sequence.
            cache: The keys and values of this layer are appended to it.
        """
        x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(x, angles, packed, pooled, prefix, cache)
        x, residual = self.post_attention_layernorm(x, residual, pooled)
        return self.mlp(x), residual


class Attention(nn.Module):
    """Fused q/k/v, norm of each head if the model has one, rotary positions, grouped-query attention."""

    def __init__(self, ops: Ops, config: DecoderConfig, window: int | None) -> None:
        super().__init__()
        self._ops = ops
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.causal, self.window, self.eps = config.causal, window, config.norm_eps
        self.qkv_proj = FusedLinear(
            ops,
            config.hidden_size,
            (self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim),
            config.qkv_bias,
        )
        self.o_proj = Linear(ops, self.heads * self.head_dim, config.hidden_size, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(ops, self.head_dim, self.eps), RMSNorm(ops, self.head_dim, self.eps)

    def forward(
        self,
        x: Tensor,
        angles: Angles,
        packed: Packed,
        pooled: Tensor | None,
        prefix: KeysValues | None,
        cache: list[KeysValues] | None,
    ) -> Tensor:
        qkv = self.qkv_proj(x)
        self._ops.qk_norm_rope_(qkv, (self.heads, self.kv_heads), *angles, self._norm("q"), self._norm("k"), self.eps)
        q, k, v = qkv.view(len(x), -1, self.head_dim).split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if cache is not None:
            cache.append((k, v))
        scale = self.head_dim**-0.5
        if pooled is None:
            y = self._ops.varlen_attention(q, k, v, packed, self.causal, self.window, scale, prefix)
        else:
            y = self._ops.pooled_attention(q, k, v, packed, pooled, self.window, scale, prefix)
        out: Tensor = self.o_proj(y.flatten(1))
        return out

    def _norm(self, part: str) -> Tensor | None:
        norm = getattr(self, f"{part}_norm", None)
        return None if norm is None else norm.weight


class MLP(nn.Module):
    """SwiGLU with gate and up in one projection."""

    def __init__(self, ops: Ops, config: DecoderConfig) -> None:
        super().__init__()
        self._ops = ops
        self.gate_up_proj = FusedLinear(
            ops, config.hidden_size, (config.intermediate_size, config.intermediate_size), config.mlp_bias
        )
        self.down_proj = Linear(ops, config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self._ops.gated_activation(self.gate_up_proj(x)))
        return y
