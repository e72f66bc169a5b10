"""Every op in plain torch: the backend `reference`, and the definition of a correct result.

Statistics (norms, softmax, pooling) are computed in fp32 or wider, whatever the dtype of the tensors.
Shapes: T tokens, B sequences, H query heads, G key/value heads, D head dim, E hidden, I intermediate.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from triton_embed.kernels.cpu import linear_onednn as onednn
from triton_embed.kernels.packed import Packed

name = "reference"

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_erf": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: F.silu(1.702 * x, inplace=True).div_(
        1.702
    ),  # x * sigmoid(1.702 x), with less memory traffic
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
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
    """Attend within each sequence; see `Ops.varlen_attention`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for start, count, length in packed.runs:
        rows = slice(start, start + count * length)
        # [count, heads, length, D]
        dense_q, dense_k, dense_v = (x[rows].view(count, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        if prefix is not None:
            attended = _attend_prefix(dense_q, dense_k, dense_v, prefix, scale, causal, window)
        elif window is None or window >= length:
            attended = _attend(dense_q, dense_k, dense_v, scale, is_causal=causal)
        else:
            attended = _attend_window(dense_q, dense_k, dense_v, scale, window)
        out[rows] = attended.transpose(1, 2).flatten(0, 1)
    return out


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
    """Attend with one query per sequence; see `Ops.pooled_attention`."""
    q = q[rows]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    first = 0
    for start, count, length in packed.runs:
        visible = min(length, window or length)
        block_k, block_v = (
            x[start : start + count * length].view(count, length, *x.shape[1:])[:, length - visible :].transpose(1, 2)
            for x in (k, v)
        )
        if prefix is not None:
            reach = len(prefix[0]) if window is None else min(len(prefix[0]), window - visible)
            block_k, block_v = (
                _after_prefix(shared[len(shared) - reach :], x)
                for shared, x in zip(prefix, (block_k, block_v), strict=True)
            )
        block = slice(first, first + count)
        out[block] = _attend(q[block, :, None], block_k, block_v, scale=scale).squeeze(2)
        first += count
    return out


def _after_prefix(shared: Tensor, x: Tensor) -> Tensor:
    """Return x [N,G,n,D] with the rows `shared` [P,G,D] before each sequence: [N,G,P+n,D]."""
    return torch.cat([shared.transpose(0, 1).expand(len(x), -1, -1, -1), x], dim=2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Compute dense attention: q [N,H,n,D], k and v [N,G,m,D] -> [N,H,n,D]."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1]
    )


def _attend_window(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    """Compute causal attention in blocks of `window` queries, each block over the keys that any of its queries sees.

    Memory and work grow with n * window instead of n * n.
    """
    parts = []
    for start in range(0, q.shape[2], window):
        queries, keys = slice(start, start + window), slice(max(0, start - window + 1), start + window)
        block = q[:, :, queries], k[:, :, keys], v[:, :, keys]
        mask = _visible(block[0].shape[2], block[1].shape[2] - block[0].shape[2], window, q.device)
        parts.append(_attend(*block, scale=scale, mask=mask))
    return torch.cat(parts, dim=2)


def _attend_prefix(
    q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor], scale: float, causal: bool, window: int | None
) -> Tensor:
    """Compute attention with the same keys and values [P,G,D] before every sequence."""
    k, v = (_after_prefix(shared, x) for shared, x in zip(prefix, (k, v), strict=True))
    mask = _visible(q.shape[2], len(prefix[0]), window, q.device) if causal else None
    return _attend(q, k, v, scale=scale, mask=mask)


def _visible(length: int, shared: int, window: int | None, device: torch.device) -> Tensor:
    """Return bool [length, shared + length]: which keys each query sees in causal attention after `shared` keys."""
    query = torch.arange(shared, shared + length, device=device)[:, None]
    key = torch.arange(shared + length, device=device)[None, :]
    visible = key <= query
    return visible if window is None else visible & (query - key < window)


def tile_tokens(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> int | None:
    """Return None: attention has no tiles."""
    return None


def qk_norm_rope_(
    qkv: Tensor,
    heads: tuple[int, int],
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> Tensor:
    """Normalize and rotate q and k in place; see `Ops.qk_norm_rope_`."""
    query_heads, kv_heads = heads
    head_dim = qkv.shape[1] // (query_heads + 2 * kv_heads)
    view = qkv.view(len(qkv), -1, head_dim)
    cos, sin = cos[:, None], sin[:, None]  # [T, 1, D/2]
    for weight, part in (
        (q_weight, view[:, :query_heads]),
        (k_weight, view[:, query_heads : query_heads + kv_heads]),
    ):
        x = part.float() if weight is None else _rms_norm(part, weight, eps)
        (first, second), (to_first, to_second) = x.chunk(2, dim=-1), part.chunk(2, dim=-1)
        turned_first = (first * cos).addcmul_(second, sin, value=-1)
        turned_second = (second * cos).addcmul_(first, sin)
        to_first.copy_(turned_first)
        to_second.copy_(turned_second)
    return qkv


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Add and normalize rows; see `Ops.add_rms_norm`."""
    total = _add(x, residual, rows)
    return _rms_norm(total, weight, eps).to(x.dtype), total


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute RMSNorm in fp32 with one large temporary; `F.rms_norm` has three on a CPU."""
    wide = x.float()
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    y: Tensor = wide * (norm.square_() / x.shape[-1]).add_(eps).rsqrt_()
    return y.mul_(weight.float())


def _add(x: Tensor, residual: Tensor | None, rows: Tensor | None) -> Tensor:
    if residual is None:
        return x
    return x + (residual if rows is None else residual[rows])


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Add and normalize rows; see `Ops.add_layer_norm`."""
    total = _add(x, residual, rows)
    return _layer_norm(total, weight, bias, eps), total


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute LayerNorm in the dtype of x. CUDA's takes no weights of another dtype, as ours often are."""
    if x.dtype == weight.dtype:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(x.dtype)


def post_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Add and normalize rows; see `Ops.post_layer_norm`."""
    y, _ = add_layer_norm(x, residual, weight, bias, eps, rows)
    return y.to(x.dtype), y


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
    """Sum embeddings and normalize them; see `Ops.embed_layer_norm`."""
    kind = token_type[0] if types is None else F.embedding(types, token_type)
    return _layer_norm(F.embedding(ids, word) + kind + F.embedding(pos, position), weight, bias, eps)


def first_residual(x: Tensor) -> Tensor:
    """Return x: in fp32 on a CPU that has instructions for its dtype, else unchanged."""
    return x.float() if x.device.type == "cpu" and onednn.supports(x.dtype) else x


def gated_activation(gate_up: Tensor) -> Tensor:
    """Compute silu(gate) * up; see `Ops.gated_activation`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def activation(x: Tensor, kind: str) -> Tensor:
    """Apply an activation; see `Ops.activation`."""
    return _ACTIVATIONS[kind](x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None = None) -> Tensor:
    """Compute act(x W^T + b); see `Ops.linear`. A plain weight or bias of another dtype is cast to the dtype of x."""
    if weight.is_mkldnn:
        fused = act if onednn.fuses(act) else None
        y = onednn.linear(x, weight, bias, fused)
    else:
        fused = None
        y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return y if act == fused else activation(y, act or "")


def linear_sizes(device: torch.device) -> list[int]:
    """Return an empty list: torch chooses the kernels."""
    return []


def pack_linear(weight: Tensor) -> Tensor:
    """Return a weight [N,K]: in oneDNN's layout on a CPU, else unchanged."""
    return onednn.pack(weight) if weight.device.type == "cpu" else weight


def segment_pool(
    x: Tensor,
    packed: Packed,
    mode: str,
    dims: Sequence[int],
    project: Callable[[Tensor], Tensor] | None = None,
    l2: bool = True,
) -> Tensor:
    """Pool each sequence to one vector; see `Ops.segment_pool`."""
    if mode == "cls":
        pooled = x[packed.cu_seqlens[:-1]].float()
    elif mode == "last":
        pooled = x[packed.cu_seqlens[1:] - 1].float()
    else:
        pooled = torch.segment_reduce(x.float(), mode, offsets=packed.cu_seqlens.long(), axis=0)
    if project is not None:
        pooled = project(pooled).float()
    if min(dims) < pooled.shape[1]:
        kept = torch.arange(pooled.shape[1], device=x.device) < torch.tensor(dims, device=x.device)[:, None]
        pooled = torch.where(kept, pooled, 0.0)
    return F.normalize(pooled, dim=-1) if l2 else pooled


def patchify(image: Tensor, patch: int, merge: int, frames: int, mean: Tensor, std: Tensor) -> Tensor:
    """Cut an image into normalized patches; see `Ops.patchify`."""
    height, width, channels = image.shape
    pixels = ((image.float() / 255 - mean) / std).permute(2, 0, 1)
    grid = pixels.view(
        channels, height // (merge * patch), merge, patch, width // (merge * patch), merge, patch
    ).permute(1, 4, 2, 5, 0, 3, 6)  # block row, block column, row in block, column in block, channel, y, x
    return grid.unsqueeze(5).expand(*(-1,) * 5, frames, -1, -1).reshape(-1, channels * frames * patch * patch)
