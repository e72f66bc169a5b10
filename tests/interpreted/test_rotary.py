"""The rotary kernel against complex numbers and torch's RMSNorm in float64: head layouts, strides, NaN."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from conftest import DTYPES, assert_close, guarded, random
from triton_embed.kernels import reference
from triton_embed.kernels.gpu.blocks import Config
from triton_embed.kernels.gpu.rotary import qk_norm_rope_

EPS = 1e-3
LAYOUTS = [
    # tokens, heads, key heads, head size, config
    (1, 1, 1, 64, None),
    (7, 3, 1, 80, None),
    (33, 2, 2, 80, Config(block_m=16)),
    (7, 4, 2, 128, None),
    (5, 28, 4, 128, None),
    (33, 5, 5, 16, Config(block_m=32)),
    (9, 3, 1, 24, Config(block_m=4)),
    (7, 2, 1, 20, Config(block_m=1)),
    (3, 2, 1, 2, None),
]
Weights = tuple[Tensor | None, Tensor | None]


def angles(tokens: int, half: int) -> tuple[Tensor, Tensor]:
    """Create cos and sin as the first halves of wider rows, the layout of transformers."""
    angle = 10 * random(tokens, 2 * half, seed=9)
    return guarded(angle.cos()[:, :half]), guarded(angle.sin()[:, :half])


def weights(head_dim: int, normed: str, dtype: torch.dtype) -> Weights:
    """Create norm weights for those of q and k that `normed` names."""
    q, k = (
        guarded(random(head_dim, dtype=dtype, seed=seed)) if name in normed else None
        for name, seed in zip("qk", (3, 4), strict=True)
    )
    return q, k


def float64_rotary(qkv: Tensor, heads: tuple[int, int], cos: Tensor, sin: Tensor, norm_weights: Weights) -> Tensor:
    """Rotate each head in float64: its halves are real and imaginary parts, multiplied by exp(i angle)."""
    parts = qkv.double().unflatten(1, (heads[0] + 2 * heads[1], -1)).split([*heads, heads[1]], dim=1)
    rotated = []
    for part, weight in zip(parts, norm_weights, strict=False):
        normed = part if weight is None else F.rms_norm(part, weight.shape, weight.double(), EPS)
        first, second = normed.chunk(2, dim=-1)
        product = torch.complex(first, second) * torch.complex(cos.double(), sin.double())[:, None]
        rotated.append(torch.cat([product.real, product.imag], dim=-1))
    return torch.cat(rotated, dim=1).flatten(1)


def check(
    result: Tensor, original: Tensor, heads: tuple[int, int], cos: Tensor, sin: Tensor, norm_weights: Weights
) -> None:
    width = result.shape[1] * sum(heads) // (sum(heads) + heads[1])
    torch_result = reference.qk_norm_rope_(original.clone(), heads, cos, sin, *norm_weights, EPS)
    assert_close(result[:, :width], float64_rotary(original, heads, cos, sin, norm_weights), torch_result[:, :width])
    assert torch.equal(result[:, width:], original[:, width:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", ["qk", ""], ids=["normed", "plain"])
@pytest.mark.parametrize(("tokens", "query_heads", "kv_heads", "head_dim", "config"), LAYOUTS)
def test_every_layout_of_heads(
    tokens: int,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    config: Config | None,
    normed: str,
    dtype: torch.dtype,
) -> None:
    heads, (cos, sin) = (query_heads, kv_heads), angles(tokens, head_dim // 2)
    norm_weights = weights(head_dim, normed, dtype)
    original = random(tokens, (query_heads + 2 * kv_heads) * head_dim, dtype=dtype)
    qkv = guarded(original)
    assert qk_norm_rope_(qkv, heads, cos, sin, *norm_weights, EPS, config) is qkv
    check(qkv, original, heads, cos, sin, norm_weights)


@pytest.mark.parametrize("normed", ["q", "k"])
def test_norm_of_q_or_k_only(normed: str) -> None:
    heads, (cos, sin), norm_weights = (3, 2), angles(7, 40), weights(80, normed, torch.float32)
    original = random(7, 7 * 80)
    qkv = guarded(original)
    qk_norm_rope_(qkv, heads, cos, sin, *norm_weights, EPS)
    check(qkv, original, heads, cos, sin, norm_weights)


def test_strided_rows() -> None:
    heads, (cos, sin), norm_weights = (3, 1), angles(7, 12), weights(24, "qk", torch.float32)
    original = random(7, 150)[:, :120]
    qkv = guarded(original)
    qk_norm_rope_(qkv, heads, cos, sin, *norm_weights, EPS, Config(block_m=8))
    check(qkv, original, heads, cos, sin, norm_weights)


def test_row_strides_beyond_32_bits() -> None:
    heads, (cos, sin) = (2, 1), angles(3, 8)
    original = random(3, 64, dtype=torch.float16)
    qkv = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((3, 64), (2**30, 1)).copy_(original)
    qk_norm_rope_(qkv, heads, cos, sin, None, None, EPS)
    check(qkv, original, heads, cos, sin, (None, None))


@pytest.mark.parametrize("normed", ["qk", ""], ids=["normed", "plain"])
def test_nan_stays_in_its_head(normed: str) -> None:
    """Set NaN in head 2 of heads 0 to 3, which one program reads and writes."""
    heads, (cos, sin), norm_weights = (3, 1), angles(2, 8), weights(16, normed, torch.float32)
    original = random(2, 80)
    clean = qk_norm_rope_(guarded(original), heads, cos, sin, *norm_weights, EPS)
    original[0, 40] = float("nan")
    result = qk_norm_rope_(guarded(original), heads, cos, sin, *norm_weights, EPS)
    poisoned = torch.zeros_like(result, dtype=torch.bool)
    poisoned[0, 32:48] = True
    assert result[poisoned].isnan().any()
    assert torch.equal(result[~poisoned], clean[~poisoned])


def test_empty_input() -> None:
    qkv = torch.zeros(0, 64)
    assert qk_norm_rope_(qkv, (2, 1), torch.zeros(0, 8), torch.zeros(0, 8), None, None, EPS) is qkv


def test_noncontiguous_inputs_are_rejected() -> None:
    qkv, angle, vector = random(4, 64), random(4, 8), random(16)
    arguments = [qkv, (2, 1), angle, angle, vector, vector]
    replacements = [random(4, 128)[:, ::2], (2, 1), *[random(4, 16)[:, ::2]] * 2, *[random(32)[::2]] * 2]
    for position in (0, 2, 3, 4, 5):
        with pytest.raises(ValueError, match="not contiguous"):
            qk_norm_rope_(*arguments[:position], replacements[position], *arguments[position + 1 :], EPS)
