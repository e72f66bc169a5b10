"""The only door to the kernels: one typed function an op, its arguments checked here and nowhere else.

Shapes: T packed tokens, B sequences, H query heads, G key/value heads, D head dim, E hidden, I intermediate.
The last dimension of every tensor is contiguous. Tensors are fp32, bf16 or fp16; statistics are fp32.
Every op runs as plain torch (`reference.py`), on whatever device its tensors are; only `linear` on a CPU has a
faster path of its own.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from triton_embed.kernels import linear as onednn
from triton_embed.kernels import reference
from triton_embed.kernels.packed import Packed

ACTIVATIONS = reference.ACTIVATIONS
POOLING_MODES = ("cls", "last", "mean", "max")


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
    """Attention inside each packed sequence: q [T,H,D], k and v [T,G,D] -> [T,H,D].

    `window`: a query sees the keys with i - j < window (transformers' rule); causal attention only. `prefix`: keys
    and values [P,G,D] that stand before every sequence. Query head h reads key head h // (H / G).
    """
    if q.dim() != 3 or k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"attention over q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if packed.tokens != q.shape[0]:
        raise ValueError(f"the packed batch has {packed.tokens} tokens, q has {q.shape[0]}")
    if prefix is not None and not prefix[0].shape == prefix[1].shape == (len(prefix[0]), *k.shape[1:]):
        raise ValueError(f"a prefix of {tuple(prefix[0].shape)} and {tuple(prefix[1].shape)} for k {tuple(k.shape)}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"a window of {window} tokens in {'causal' if causal else 'bidirectional'} attention")
    return reference.varlen_attention(q, k, v, packed, causal, window, scale, prefix)


def pooled_attention(q: Tensor, k: Tensor, v: Tensor, packed: Packed, window: int | None, scale: float) -> Tensor:
    """Attention of one query a sequence, which sees all of it: q [B,H,D], k and v [T,G,D] -> [B,H,D].

    What the last layer owes to a pooled row: the last row of a causal sequence, any row of a bidirectional one.
    `window`: the query is the last row and sees that many keys, its own included.
    """
    if q.dim() != 3 or k.shape != v.shape or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"attention over q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if packed.tokens != k.shape[0] or len(packed.lengths) != q.shape[0]:
        raise ValueError(f"{len(packed.lengths)} sequences of {packed.tokens} tokens, q {q.shape[0]}, k {k.shape[0]}")
    if window is not None and window < 1:
        raise ValueError(f"an attention window of {window} tokens sees nothing")
    return reference.pooled_attention(q, k, v, packed, window, scale)


def qk_norm_rope_(
    qkv: Tensor,
    heads: tuple[int, int],
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> Tensor:
    """Per-head RMSNorm (where a weight is given), then rotary positions, on q and k of `qkv` in place.

    qkv [T,(H+2G)*D] with `heads` = (H, G); cos, sin fp32 [T, D/2]: the angles of each token, the same in every layer
    and so computed once a forward, whatever axes its position has.
    """
    head_dim, rest = divmod(qkv.shape[1], heads[0] + 2 * heads[1])
    if rest or not cos.shape == sin.shape == (len(qkv), head_dim / 2):
        raise ValueError(f"rotary over qkv {tuple(qkv.shape)} with heads {heads}, cos and sin {tuple(cos.shape)}")
    return reference.qk_norm_rope_(qkv, heads, cos, sin, q_weight, k_weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of x + residual, and the sum itself (the next residual): both [T,E]."""
    _same_shape(x, residual)
    _same_size(x, weight)
    return reference.add_rms_norm(x, residual, weight, eps)


def add_layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of x + residual: [T,E]."""
    _same_shape(x, residual)
    _same_size(x, weight, bias)
    return reference.add_layer_norm(x, residual, weight, bias, eps)


def embed_layer_norm(
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
    """Sum of word, position and token-type embeddings, then LayerNorm: [T] -> [T,E]. `types` None: all type 0."""
    _same_shape(ids, pos)
    return reference.embed_layer_norm(ids, pos, types, word, position, token_type, weight, bias, eps)


def gated_activation(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [T,2I] -> [T,I]."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate and up must be halves of the last dimension, got {tuple(gate_up.shape)}")
    return reference.gated_activation(gate_up)


def activation(x: Tensor, kind: str) -> Tensor:
    """One of `ACTIVATIONS`, elementwise."""
    _known(kind, ACTIVATIONS)
    return reference.activation(x, kind)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None = None) -> Tensor:
    """act(x @ weight.T + bias): [T,K] -> [T,N], weight [N,K] as it is or from `pack_linear`."""
    if act is not None:
        _known(act, ACTIVATIONS)
    if x.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(f"linear over x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {bias is not None}")
    if not weight.is_mkldnn:
        return reference.linear(x, weight, bias, act)
    if onednn.fuses(act):
        return onednn.linear(x, weight, bias, act)
    return activation(onednn.linear(x, weight, bias, None), act or "")


def pack_linear(weight: Tensor) -> Tensor:
    """A weight [N,K] in the layout `linear` reads fastest on its device; do it once, after loading."""
    return onednn.pack(weight) if weight.device.type == "cpu" else weight


def segment_pool(
    x: Tensor,
    packed: Packed,
    mode: str,
    dims: Sequence[int],
    norm: Callable[[Tensor], Tensor] | None = None,
    l2: bool = True,
) -> Tensor:
    """One fp32 vector a sequence: [T,E] -> [B,F]. Pool, `norm`, keep the first dims[b] values, L2-normalise.

    Values past dims[b] are 0. `mode` is one of `POOLING_MODES`. `norm`, or any map [B,E] -> [B,F], gets fp32.
    """
    _known(mode, POOLING_MODES)
    if packed.tokens != x.shape[0] or len(dims) != len(packed.lengths):
        raise ValueError(f"pooling {tuple(x.shape)} over {packed.tokens} tokens with {len(dims)} dims")
    if min(dims) < 1 or (norm is None and max(dims) > x.shape[1]):
        raise ValueError(f"dims {tuple(dims)} of vectors of {x.shape[1]}")
    return reference.segment_pool(x, packed, mode, dims, norm, l2)


def patchify(image: Tensor, patch: int, merge: int, frames: int, mean: Tensor, std: Tensor) -> Tensor:
    """Normalised patches of one image: uint8 [height, width, C] -> fp32 [patches, C*frames*patch*patch].

    Patches are ordered by `merge` x `merge` block as Qwen2-VL's merger wants them (merge=1: row by row), and the
    image is repeated over `frames`. Height and width are multiples of patch * merge; mean and std are [C].
    """
    if image.dim() != 3 or image.shape[0] % (patch * merge) or image.shape[1] % (patch * merge):
        raise ValueError(f"an image of {tuple(image.shape)} has no whole {patch * merge}-pixel blocks")
    return reference.patchify(image, patch, merge, frames, mean, std)


def _same_shape(x: Tensor, y: Tensor | None) -> None:
    if y is not None and x.shape != y.shape:
        raise ValueError(f"shapes {tuple(x.shape)} and {tuple(y.shape)} differ")


def _same_size(x: Tensor, *weights: Tensor) -> None:
    for weight in weights:
        if weight.shape != x.shape[-1:]:
            raise ValueError(f"a weight of {tuple(weight.shape)} for x {tuple(x.shape)}")


def _known(name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise ValueError(f"'{name}' is none of {', '.join(names)}")
