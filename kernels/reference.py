"""Every op in plain torch: the definition of correct, and the path taken on a CPU.

Statistics (norms, softmax, pooling) are computed in fp32 at least, whatever the dtype of the tensors.
Shapes: T tokens, B sequences, H query heads, G key/value heads, D head dim, E hidden, I intermediate.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from triton_embed.kernels.packed import Packed

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_erf": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}
ACTIVATIONS = tuple(_ACTIVATIONS)


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
    """See `ops.varlen_attention`."""
    heads, head_dim = q.shape[1:]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for start, count, length in packed.runs:
        rows = slice(start, start + count * length)
        block_q, block_k, block_v = (
            x[rows].view(count, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)
        )  # [count, heads, length, D]
        shared = 0
        if prefix is not None:
            shared = prefix[0].shape[0]
            block_k, block_v = (
                torch.cat([p.transpose(0, 1).expand(count, -1, -1, -1), x], dim=2)
                for p, x in zip(prefix, (block_k, block_v), strict=True)
            )
        attended = F.scaled_dot_product_attention(
            block_q,
            block_k,
            block_v,
            attn_mask=_visible(length, shared, causal, window, q.device),
            scale=scale,
            enable_gqa=heads != k.shape[1],
        )
        out[rows] = attended.transpose(1, 2).reshape(count * length, heads, head_dim)
    return out


def _visible(length: int, shared: int, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """Bool [length, shared + length]: which keys a query sees; None where it sees all of them."""
    if not causal and window is None:
        return None
    query = torch.arange(shared, shared + length, device=device)[:, None]
    key = torch.arange(shared + length, device=device)[None, :]
    visible = torch.ones(length, shared + length, dtype=torch.bool, device=device)
    if causal:
        visible &= key <= query
    if window is not None:
        visible &= (query - key).abs() < window
    return visible


def qk_norm_rope_(
    qkv: Tensor,
    heads: tuple[int, int],
    cos: Tensor,
    sin: Tensor,
    pos: Tensor,
    sections: Sequence[int],
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> Tensor:
    """See `ops.qk_norm_rope_`."""
    query_heads, kv_heads = heads
    head_dim = qkv.shape[1] // (query_heads + 2 * kv_heads)
    axis = torch.repeat_interleave(torch.arange(len(sections)), torch.tensor(sections)).to(qkv.device)
    column = torch.arange(head_dim // 2, device=qkv.device)
    cos, sin = (table[pos[axis], column[:, None]].T[:, None, :] for table in (cos, sin))  # [T, 1, D/2]
    view = qkv.view(len(qkv), -1, head_dim)
    for weight, part in (
        (q_weight, view[:, :query_heads]),
        (k_weight, view[:, query_heads : query_heads + kv_heads]),
    ):
        x = part.float()
        if weight is not None:
            x = F.rms_norm(x, (head_dim,), weight.float(), eps)
        first, second = x.chunk(2, dim=-1)
        part.copy_(torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1))
    return qkv


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `ops.add_rms_norm`."""
    total = x if residual is None else x + residual
    return F.rms_norm(total.float(), weight.shape, weight.float(), eps).to(x.dtype), total


def add_layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See `ops.add_layer_norm`."""
    return F.layer_norm(x if residual is None else x + residual, weight.shape, weight, bias, eps)


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
    """See `ops.embed_layer_norm`."""
    kind = token_type[0] if types is None else F.embedding(types, token_type)
    return F.layer_norm(F.embedding(ids, word) + kind + F.embedding(pos, position), weight.shape, weight, bias, eps)


def gated_activation(gate_up: Tensor) -> Tensor:
    """See `ops.gated_activation`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def activation(x: Tensor, kind: str) -> Tensor:
    """See `ops.activation`."""
    return _ACTIVATIONS[kind](x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None = None) -> Tensor:
    """See `ops.linear`."""
    y = F.linear(x, weight, bias)
    return y if act is None else activation(y, act)


def segment_pool(
    x: Tensor,
    packed: Packed,
    mode: str,
    dims: Sequence[int],
    norm: Callable[[Tensor], Tensor] | None = None,
    l2: bool = True,
) -> Tensor:
    """See `ops.segment_pool`."""
    starts, ends = packed.cu_seqlens[:-1].long(), packed.cu_seqlens[1:].long()
    if mode == "cls":
        pooled = x[starts].float()
    elif mode == "last":
        pooled = x[ends - 1].float()
    else:
        pooled = torch.segment_reduce(x.float(), "mean", offsets=packed.cu_seqlens.long(), axis=0)
    if norm is not None:
        pooled = norm(pooled).float()
    kept = torch.arange(pooled.shape[1], device=x.device) < torch.tensor(dims, device=x.device)[:, None]
    pooled = pooled * kept
    return F.normalize(pooled, dim=-1) if l2 else pooled


def patchify(image: Tensor, patch: int, merge: int, frames: int, mean: Tensor, std: Tensor) -> Tensor:
    """See `ops.patchify`."""
    height, width, channels = image.shape
    pixels = ((image.float() / 255 - mean) / std).permute(2, 0, 1)
    grid = pixels.view(
        channels, height // (merge * patch), merge, patch, width // (merge * patch), merge, patch
    ).permute(1, 4, 2, 5, 0, 3, 6)  # block row, block column, row in block, column in block, channel, y, x
    return grid.unsqueeze(5).expand(*(-1,) * 5, frames, -1, -1).reshape(-1, channels * frames * patch * patch)
