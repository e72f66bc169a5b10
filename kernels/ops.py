"""The only door to the kernels: one typed function an op, its arguments checked here and nowhere else.

Shapes: T packed tokens, B sequences, H query heads, G key/value heads, D head dim, E hidden, I intermediate.
The last dimension of every tensor is contiguous. Tensors are fp32, bf16 or fp16; statistics are fp32.
On a GPU an op is a Triton kernel, on a CPU oneDNN's product or a loop that Numba compiles. Nothing falls back: what no
kernel can do is a ValueError, unless the operator chose plain torch (`reference.py`) with `use`.
"""

from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from triton_embed.kernels import onednn, reference
from triton_embed.kernels.int8 import Int8Weight
from triton_embed.kernels.packed import Packed

ACTIVATIONS = reference.ACTIVATIONS
POOLING_MODES = ("cls", "last", "mean", "max")
KERNELS = ("auto", "torch", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOOPED = (torch.float32, torch.bfloat16)  # what a CPU has loops for

_chosen = "auto"


def use(kernels: str) -> None:
    """Which kernels this process runs: `auto` (Triton on a GPU, the fastest of torch on a CPU), plain `torch`
    everywhere, or `triton` everywhere, which on a CPU is for tests under TRITON_INTERPRET=1."""
    global _chosen
    _known(kernels, KERNELS)
    _chosen = kernels


def used_on(device: torch.device | str) -> str:
    """`triton` or `torch`: what ops on tensors of that device run as."""
    if _chosen == "auto":
        return "triton" if torch.device(device).type == "cuda" else "torch"
    return _chosen


def require(device: torch.device | str, dtype: torch.dtype) -> None:
    """ValueError, LookupError or ImportError, each a sentence: these kernels cannot run there in that dtype."""
    if dtype not in DTYPES:
        raise ValueError(f"no kernel computes in {dtype}")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"torch {torch.__version__} finds no GPU")
    if torch.device(device).type == "cpu" and _chosen == "auto":
        try:
            _looped()
        except AttributeError as error:
            way = "the parameter kernels: torch does without"
            raise ValueError(f"torch {torch.__version__} has no OpenMP for loops to run on; {way}") from error
    if used_on(device) == "triton":
        if _chosen == "auto" and _triton().interpreted():
            raise ValueError("TRITON_INTERPRET=1 runs kernels in a slow interpreter; unset it to serve")
        _triton().blocks.of(torch.device(device))


def _for(x: Tensor) -> Any:
    """The module whose functions serve this tensor."""
    if _chosen == "torch" or (_chosen == "auto" and not x.is_cuda):
        return _looped() if _chosen == "auto" and x.dtype in LOOPED else reference
    return _triton()


@cache
def _looped() -> ModuleType:
    from triton_embed.kernels import looped  # only here: on a GPU there is no need to load Numba

    return looped


@cache
def _triton() -> ModuleType:
    from triton_embed.kernels import accelerated  # only here: a server on a CPU need not have triton

    return accelerated


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
    _check_attention(q, k, v, packed, prefix)
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"a window of {window} tokens in {'causal' if causal else 'bidirectional'} attention")
    found: Tensor = _for(q).varlen_attention(q, k, v, packed, causal, window, scale, prefix)
    return found


def tile_tokens(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str) -> int | None:
    """How many tokens a tile of `varlen_attention` has, for `Packed` to lay tiles out ahead; None: it needs none."""
    if used_on(device) == "torch":
        return None
    found: int = _triton().tile_tokens(heads, kv_heads, head_dim, dtype, torch.device(device))
    return found


def pooled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: Packed,
    rows: Tensor,
    window: int | None,
    scale: float,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of one query a sequence, which sees all of it: q [T,H,D], k and v [T,G,D] -> [B,H,D].

    What the last layer owes to a pooled row: the last row of a causal sequence, any row of a bidirectional one. Query
    b is q[rows[b]], rows int [B]. `window`: it is the last row and sees that many keys, its own included. `prefix` as
    in `varlen_attention`.
    """
    _check_attention(q, k, v, packed, prefix)
    if rows.shape != (len(packed.lengths),):
        raise ValueError(f"pooled rows {tuple(rows.shape)} of {len(packed.lengths)} sequences")
    if window is not None and window < 1:
        raise ValueError(f"an attention window of {window} tokens sees nothing")
    found: Tensor = _for(q).pooled_attention(q, k, v, packed, rows, window, scale, prefix)
    return found


def _check_attention(q: Tensor, k: Tensor, v: Tensor, packed: Packed, prefix: tuple[Tensor, Tensor] | None) -> None:
    if q.dim() != 3 or k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"attention over q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if packed.tokens != q.shape[0]:
        raise ValueError(f"the packed batch has {packed.tokens} tokens, q has {q.shape[0]}")
    if prefix is not None and not prefix[0].shape == prefix[1].shape == (len(prefix[0]), *k.shape[1:]):
        raise ValueError(f"a prefix of {tuple(prefix[0].shape)} and {tuple(prefix[1].shape)} for k {tuple(k.shape)}")
    _same_place(q, k, v, *(prefix or ()))


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
    _same_size(qkv[:, :head_dim], *(weight for weight in (q_weight, k_weight) if weight is not None))
    found: Tensor = _for(qkv).qk_norm_rope_(qkv, heads, cos, sin, q_weight, k_weight, eps)
    return found


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """RMSNorm of x + residual, and the sum itself (the next residual): both as x, [N,E].

    `rows` int [N]: row n of x is added to row rows[n] of the residual.
    """
    _check_sum(x, residual, rows)
    _same_size(x, weight)
    found: tuple[Tensor, Tensor] = _for(x).add_rms_norm(x, residual, weight, eps, rows)
    return found


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """LayerNorm of x + residual, and the sum itself, as `add_rms_norm`: for blocks that norm first."""
    _check_sum(x, residual, rows)
    _same_size(x, weight, bias)
    found: tuple[Tensor, Tensor] = _for(x).add_layer_norm(x, residual, weight, bias, eps, rows)
    return found


def residual(x: Tensor) -> Tensor:
    """x as what a network adds to: fp32 on a CPU, where that costs little and is a third of what bf16 takes from the
    vectors."""
    return x.float() if x.device.type == "cpu" and used_on("cpu") == "torch" and onednn.packs(x.dtype) else x


def post_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """LayerNorm of x + residual, for blocks that norm last: as x, and the same in the dtype of the residual, which is
    the next one."""
    _check_sum(x, residual, rows)
    _same_size(x, weight, bias)
    found: tuple[Tensor, Tensor] = _for(x).post_layer_norm(x, residual, weight, bias, eps, rows)
    return found


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
    if ids.shape != pos.shape or (types is not None and types.shape != ids.shape):
        raise ValueError(f"ids {tuple(ids.shape)} and positions {tuple(pos.shape)} or their types differ")
    found: Tensor = _for(word).embed_layer_norm(ids, pos, types, word, position, token_type, weight, bias, eps)
    return found


def gated_activation(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [T,2I] -> [T,I]."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate and up must be halves of the last dimension, got {tuple(gate_up.shape)}")
    found: Tensor = _for(gate_up).gated_activation(gate_up)
    return found


def activation(x: Tensor, kind: str) -> Tensor:
    """One of `ACTIVATIONS`, elementwise."""
    _known(kind, ACTIVATIONS)
    found: Tensor = _for(x).activation(x, kind)
    return found


class PackedWeight(Protocol):
    """A weight [N,K] laid out for products on a CPU, which stands where the tensor does."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> torch.Size: ...

    def fuses(self, act: str | None) -> bool:
        """Whether `linear` applies this activation."""

    def linear(self, x: Tensor, bias: Tensor | None, act: str | None) -> Tensor: ...


def linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None, act: str | None = None) -> Tensor:
    """act(x @ weight.T + bias): [T,K] -> [T,N], weight [N,K] as it is or from `pack_linear`, which then decides the
    dtype; else x does.

    On a GPU a plain product is cuBLAS's; with an activation the table of the architecture says whose.
    """
    if act is not None:
        _known(act, ACTIVATIONS)
    if x.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(f"linear over x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {bias is not None}")
    if x.dtype == torch.float32 and (not isinstance(weight, Tensor) or weight.is_mkldnn):
        x = x.to(weight.dtype)
    if not isinstance(weight, Tensor):
        fused = act if weight.fuses(act) else None
        y = weight.linear(x, bias, fused)
        return y if act == fused else activation(y, act or "")
    if weight.is_mkldnn:
        if onednn.fuses(act):
            return onednn.linear(x, weight, bias, act)
        return activation(onednn.linear(x, weight, bias, None), act or "")
    if act is None or used_on(x.device) == "torch":
        return reference.linear(x, weight, bias, act)
    sizes = {"tokens": len(x), "outputs": weight.shape[0], "inputs": weight.shape[1], "itemsize": x.itemsize}
    config = _triton().blocks.of(x.device).choice("linear", **sizes)
    if config is None:
        return activation(reference.linear(x, weight, bias), act)
    found: Tensor = _triton().linear(x, weight, bias, act, config)
    return found


def linear_sizes(device: torch.device | str) -> list[int]:
    """Numbers of tokens of which each makes `linear` run another kernel than the one before; none where it is torch."""
    if used_on(device) == "torch":
        return []
    limits: list[int] = _triton().blocks.of(torch.device(device)).limits("linear", "tokens")
    return [*limits, max(limits, default=0) + 1]


def pack_linear(weight: Tensor, in_int8: bool = False) -> Tensor | PackedWeight:
    """A weight [N,K] in the layout `linear` reads fastest on its device, or rounded for a CPU; once, after loading."""
    if in_int8:
        return Int8Weight.pack(weight)
    if weight.device.type != "cpu" or used_on("cpu") != "torch":
        return weight
    packed: PackedWeight | None = _looped().pack_linear(weight) if _chosen == "auto" else None
    return packed or onednn.pack(weight)


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
    found: Tensor = _for(x).segment_pool(x, packed, mode, dims, norm, l2)
    return found


def patchify(image: Tensor, patch: int, merge: int, frames: int, mean: Tensor, std: Tensor) -> Tensor:
    """Normalised patches of one image: uint8 [height, width, C] -> fp32 [patches, C*frames*patch*patch].

    Patches are ordered by `merge` x `merge` block as Qwen2-VL's merger wants them (merge=1: row by row), and the
    image is repeated over `frames`. Height and width are multiples of patch * merge; mean and std are [C].
    """
    if image.dim() != 3 or image.shape[0] % (patch * merge) or image.shape[1] % (patch * merge):
        raise ValueError(f"an image of {tuple(image.shape)} has no whole {patch * merge}-pixel blocks")
    found: Tensor = _for(image).patchify(image, patch, merge, frames, mean, std)
    return found


def _check_sum(x: Tensor, residual: Tensor | None, rows: Tensor | None) -> None:
    if residual is None:
        if rows is not None:
            raise ValueError("rows of a residual that is not there")
        return
    if x.shape[1:] != residual.shape[1:] or len(x) != len(residual if rows is None else rows):
        raise ValueError(f"shapes {tuple(x.shape)} and {tuple(residual.shape)} differ")
    if x.is_cuda or _chosen == "triton" or residual.dtype != torch.float32:
        _same_place(x, residual)


def _same_place(x: Tensor, *others: Tensor) -> None:
    for y in others:
        if y.dtype != x.dtype or y.device != x.device:
            raise ValueError(f"tensors of {x.dtype} on {x.device} and of {y.dtype} on {y.device} in one op")


def _same_size(x: Tensor, *weights: Tensor) -> None:
    for weight in weights:
        if weight.shape != x.shape[-1:]:
            raise ValueError(f"a weight of {tuple(weight.shape)} for x {tuple(x.shape)}")


def _known(name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise ValueError(f"'{name}' is none of {', '.join(names)}")
