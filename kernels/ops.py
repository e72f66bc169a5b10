"""The entry point of the kernels: one method per op. Arguments are checked here and nowhere else.

Shapes: T packed tokens, B sequences, H query heads, G key/value heads, D head dim, E hidden, I intermediate.
The last dimension of every tensor is contiguous. Tensors are fp32, bf16 or fp16; statistics are fp32. There is no
silent fallback: an argument that the backend does not support is a ValueError.
"""

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from triton_embed.kernels import reference
from triton_embed.kernels.backend import Backend, PackedWeight, choose, resolve
from triton_embed.kernels.cpu.linear_int8 import Int8Weight
from triton_embed.kernels.packed import Packed

__all__ = ["ACTIVATIONS", "POOLING_MODES", "Ops", "resolve"]

ACTIVATIONS = reference.ACTIVATIONS
POOLING_MODES = ("cls", "last", "mean", "max")


class Ops:
    """Every op on one backend, which a network gets when it is built."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @classmethod
    def on(cls, device: torch.device | str, dtype: torch.dtype, kernels: str = "auto") -> Self:
        """Return the ops for a device and dtype; see `backend.choose`.

        Raises:
            ValueError, LookupError, ImportError: with one sentence that says why there are none.
        """
        return cls(choose(kernels, device, dtype))

    @classmethod
    def reference(cls) -> Self:
        """Return the ops of plain torch, which other backends are compared with."""
        return cls(reference)

    @property
    def name(self) -> str:
        """The backend: `triton`, `cpu` or `reference`."""
        return self._backend.name

    def varlen_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        packed: Packed,
        causal: bool,
        window: int | None,
        scale: float,
        prefix: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Compute attention inside each packed sequence: q [T,H,D], k and v [T,G,D] -> [T,H,D].

        Query head h reads key head h // (H / G).

        Args:
            window: A query sees the keys with i - j < window (transformers' rule); causal attention only.
            prefix: Keys and values [P,G,D] before every sequence.
        """
        _check_attention(q, k, v, packed, prefix)
        if window is not None and (window < 1 or not causal):
            raise ValueError(f"a window of {window} tokens in {'causal' if causal else 'bidirectional'} attention")
        return self._backend.varlen_attention(q, k, v, packed, causal, window, scale, prefix)

    def tile_tokens(
        self, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> int | None:
        """Return the tokens per tile of `varlen_attention`, which `Packed` lays out in advance; None without tiles."""
        return self._backend.tile_tokens(heads, kv_heads, head_dim, dtype, torch.device(device))

    def pooled_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        packed: Packed,
        rows: Tensor,
        window: int | None,
        scale: float,
        prefix: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Compute attention of one query per sequence over all of its keys: q [T,H,D], k and v [T,G,D] -> [B,H,D].

        The last layer needs no other queries than those of the pooled tokens. Query b is q[rows[b]], rows int [B]: the
        last token of a causal sequence, or any token of a bidirectional one.

        Args:
            window: The query is the last token and sees this many keys, its own included.
            prefix: As in `varlen_attention`.
        """
        _check_attention(q, k, v, packed, prefix)
        if rows.shape != (len(packed.lengths),):
            raise ValueError(f"pooled rows {tuple(rows.shape)} of {len(packed.lengths)} sequences")
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        return self._backend.pooled_attention(q, k, v, packed, rows, window, scale, prefix)

    def qk_norm_rope_(
        self,
        qkv: Tensor,
        heads: tuple[int, int],
        cos: Tensor,
        sin: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
    ) -> Tensor:
        """Apply per-head RMSNorm (if there are weights), then rotary positions, to q and k of `qkv` in place.

        qkv [T,(H+2G)*D] with `heads` = (H, G); cos, sin fp32 [T, D/2] of the angles of each token, which are the same
        in every layer and computed once per forward pass.
        """
        head_dim, rest = divmod(qkv.shape[1], heads[0] + 2 * heads[1])
        if rest or not cos.shape == sin.shape == (len(qkv), head_dim / 2):
            raise ValueError(f"rotary over qkv {tuple(qkv.shape)} with heads {heads}, cos and sin {tuple(cos.shape)}")
        _check_weight_size(qkv[:, :head_dim], *(weight for weight in (q_weight, k_weight) if weight is not None))
        return self._backend.qk_norm_rope_(qkv, heads, cos, sin, q_weight, k_weight, eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return RMSNorm of x + residual, and the sum itself (the next residual): both [N,E] in the dtype of x.

        Args:
            rows: int [N]: row n of x is added to row rows[n] of the residual.
        """
        self._check_sum(x, residual, rows)
        _check_weight_size(x, weight)
        return self._backend.add_rms_norm(x, residual, weight, eps, rows)

    def add_layer_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return LayerNorm of x + residual, and the sum itself, as `add_rms_norm` does: for pre-norm blocks."""
        self._check_sum(x, residual, rows)
        _check_weight_size(x, weight, bias)
        return self._backend.add_layer_norm(x, residual, weight, bias, eps, rows)

    def first_residual(self, x: Tensor) -> Tensor:
        """Return x as the first residual: fp32 on a CPU, where that is cheap and avoids a third of bf16's error."""
        return self._backend.first_residual(x)

    def post_layer_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return LayerNorm of x + residual in the dtype of x, and in the dtype of the residual (the next residual): for
        post-norm blocks."""
        self._check_sum(x, residual, rows)
        _check_weight_size(x, weight, bias)
        return self._backend.post_layer_norm(x, residual, weight, bias, eps, rows)

    def embed_layer_norm(
        self,
        ids: Tensor,
        pos: Tensor,
        types: Tensor | None,
        word: Tensor,
        position: Tensor,
        token_type: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
    ) -> Tensor:
        """Return LayerNorm of word + position + token-type embeddings: [T] -> [T,E]. `types` None: all type 0."""
        if ids.shape != pos.shape or (types is not None and types.shape != ids.shape):
            raise ValueError(f"ids {tuple(ids.shape)} and positions {tuple(pos.shape)} or their types differ")
        return self._backend.embed_layer_norm(ids, pos, types, word, position, token_type, weight, bias, eps)

    def gated_activation(self, gate_up: Tensor) -> Tensor:
        """Return silu(gate) * up: [T,2I] -> [T,I]."""
        if gate_up.shape[-1] % 2:
            raise ValueError(f"gate and up must be halves of the last dimension, got {tuple(gate_up.shape)}")
        return self._backend.gated_activation(gate_up)

    def activation(self, x: Tensor, kind: str) -> Tensor:
        """Apply one of `ACTIVATIONS` elementwise."""
        _check_choice(kind, ACTIVATIONS)
        return self._backend.activation(x, kind)

    def linear(self, x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None, act: str | None = None) -> Tensor:
        """Return act(x @ weight.T + bias): [T,K] -> [T,N].

        The weight [N,K] is plain or from `pack_linear`; a packed weight determines the dtype, else x does. On a GPU a
        plain product is cuBLAS's; with an activation, the table of the architecture chooses between cuBLAS and our
        kernel.
        """
        if act is not None:
            _check_choice(act, ACTIVATIONS)
        if x.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
            raise ValueError(f"linear over x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {bias is not None}")
        if x.dtype == torch.float32 and (not isinstance(weight, Tensor) or weight.is_mkldnn):
            x = x.to(weight.dtype)
        if not isinstance(weight, Tensor):
            fused = act if weight.fuses(act) else None
            y = weight.linear(x, bias, fused)
            return y if act == fused else self.activation(y, act or "")
        return self._backend.linear(x, weight, bias, act)

    def linear_sizes(self, device: torch.device | str) -> list[int]:
        """Return one token count for each kernel that `linear` may choose; empty where torch chooses the kernel."""
        return self._backend.linear_sizes(torch.device(device))

    def pack_linear(self, weight: Tensor, in_int8: bool = False) -> Tensor | PackedWeight:
        """Return a weight [N,K] in the layout `linear` reads fastest, or rounded to int8, after loading."""
        return Int8Weight.pack(weight) if in_int8 else self._backend.pack_linear(weight)

    def segment_pool(
        self,
        x: Tensor,
        packed: Packed,
        mode: str,
        dims: Sequence[int],
        project: Callable[[Tensor], Tensor] | None = None,
        l2: bool = True,
    ) -> Tensor:
        """Return one fp32 vector per sequence, [T,E] -> [B,F]: pool, project, keep dims[b] values, normalize.

        Values past dims[b] are 0.

        Args:
            mode: One of `POOLING_MODES`.
            project: A map [B,E] -> [B,F] of fp32, such as Dense layers; None: F is E.
            l2: Whether to L2-normalize.
        """
        _check_choice(mode, POOLING_MODES)
        if packed.tokens != x.shape[0] or len(dims) != len(packed.lengths):
            raise ValueError(f"pooling {tuple(x.shape)} over {packed.tokens} tokens with {len(dims)} dims")
        if min(dims) < 1 or (project is None and max(dims) > x.shape[1]):
            raise ValueError(f"dims {tuple(dims)} of vectors of {x.shape[1]}")
        return self._backend.segment_pool(x, packed, mode, dims, project, l2)

    def patchify(self, image: Tensor, patch: int, merge: int, frames: int, mean: Tensor, std: Tensor) -> Tensor:
        """Return the normalized patches of one image: uint8 [height, width, C] -> fp32 [patches, C*frames*patch*patch].

        Patches are ordered by `merge` x `merge` block as Qwen2-VL's merger needs them (merge=1: row by row), and the
        image is repeated over `frames`. Height and width are multiples of patch * merge; mean and std are [C].
        """
        if image.dim() != 3 or image.shape[0] % (patch * merge) or image.shape[1] % (patch * merge):
            raise ValueError(f"an image of {tuple(image.shape)} has no whole {patch * merge}-pixel blocks")
        return self._backend.patchify(image, patch, merge, frames, mean, std)

    def _check_sum(self, x: Tensor, residual: Tensor | None, rows: Tensor | None) -> None:
        if residual is None:
            if rows is not None:
                raise ValueError("rows need a residual")
            return
        if x.shape[1:] != residual.shape[1:] or len(x) != len(residual if rows is None else rows):
            raise ValueError(f"shapes {tuple(x.shape)} and {tuple(residual.shape)} differ")
        if x.is_cuda or self.name == "triton" or residual.dtype != torch.float32:
            _check_dtype_and_device(x, residual)


def _check_attention(q: Tensor, k: Tensor, v: Tensor, packed: Packed, prefix: tuple[Tensor, Tensor] | None) -> None:
    if q.dim() != 3 or k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"attention over q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if packed.tokens != q.shape[0]:
        raise ValueError(f"the packed batch has {packed.tokens} tokens, q has {q.shape[0]}")
    if prefix is not None and not prefix[0].shape == prefix[1].shape == (len(prefix[0]), *k.shape[1:]):
        raise ValueError(f"a prefix of {tuple(prefix[0].shape)} and {tuple(prefix[1].shape)} for k {tuple(k.shape)}")
    _check_dtype_and_device(q, k, v, *(prefix or ()))


def _check_dtype_and_device(x: Tensor, *others: Tensor) -> None:
    for y in others:
        if y.dtype != x.dtype or y.device != x.device:
            raise ValueError(f"tensors of {x.dtype} on {x.device} and of {y.dtype} on {y.device} in one op")


def _check_weight_size(x: Tensor, *weights: Tensor) -> None:
    for weight in weights:
        if weight.shape != x.shape[-1:]:
            raise ValueError(f"a weight of {tuple(weight.shape)} for x {tuple(x.shape)}")


def _check_choice(name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise ValueError(f"'{name}' is none of {', '.join(names)}")
