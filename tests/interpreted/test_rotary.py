"""The rotary kernel against complex numbers and torch's RMSNorm in float64: head layouts, strides, NaN."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from conftest import DTYPES, assert_close, guarded, random
from triton_embed.kernels import reference
from triton_embed.kernels.blocks import Config
from triton_embed.kernels.rotary import qk_norm_rope_

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
    """cos and sin as the first halves of wider rows, which is how transformers lays them out."""
    angle = 10 * random(tokens, 2 * half, seed=9)
    return guarded(angle.cos()[:, :half]), guarded(angle.sin()[:, :half])


def weights(head_dim: int, normed: str, dtype: torch.dtype) -> Weights:
    """`normed`: which of q and k have one."""
    q, k = (
        guarded(random(head_dim, dtype=dtype, seed=seed)) if name in normed else None
        for name, seed in zip("qk", (3, 4), strict=True)
    )
    return q, k


def expected(qkv: Tensor, heads: tuple[int, int], cos: Tensor, sin: Tensor, both: Weights) -> Tensor:
    """A head's halves as real and imaginary parts, turned by exp(i angle), all in float64."""
    parts = qkv.double().unflatten(1, (heads[0] + 2 * heads[1], -1)).split([*heads, heads[1]], dim=1)
    turned = []
    for part, weight in zip(parts, both, strict=False):
        normed = part if weight is None else F.rms_norm(part, weight.shape, weight.double(), EPS)
        first, second = normed.chunk(2, dim=-1)
        product = torch.complex(first, second) * torch.complex(cos.double(), sin.double())[:, None]
        turned.append(torch.cat([product.real, product.imag], dim=-1))
    return torch.cat(turned, dim=1).flatten(1)


def check(found: Tensor, given: Tensor, heads: tuple[int, int], cos: Tensor, sin: Tensor, both: Weights) -> None:
    size = found.shape[1] * sum(heads) // (sum(heads) + heads[1])
    theirs = reference.qk_norm_rope_(given.clone(), heads, cos, sin, *both, EPS)
    assert_close(found[:, :size], expected(given, heads, cos, sin, both), theirs[:, :size])
    assert torch.equal(found[:, size:], given[:, size:])


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
    both = weights(head_dim, normed, dtype)
    given = random(tokens, (query_heads + 2 * kv_heads) * head_dim, dtype=dtype)
    qkv = guarded(given)
    assert qk_norm_rope_(qkv, heads, cos, sin, *both, EPS, config) is qkv
    check(qkv, given, heads, cos, sin, both)


@pytest.mark.parametrize("normed", ["q", "k"])
def test_a_norm_of_one_of_them_alone(normed: str) -> None:
    heads, (cos, sin), both = (3, 2), angles(7, 40), weights(80, normed, torch.float32)
    given = random(7, 7 * 80)
    qkv = guarded(given)
    qk_norm_rope_(qkv, heads, cos, sin, *both, EPS)
    check(qkv, given, heads, cos, sin, both)


def test_rows_that_lie_apart() -> None:
    heads, (cos, sin), both = (3, 1), angles(7, 12), weights(24, "qk", torch.float32)
    given = random(7, 150)[:, :120]
    qkv = guarded(given)
    qk_norm_rope_(qkv, heads, cos, sin, *both, EPS, Config(block_m=8))
    check(qkv, given, heads, cos, sin, both)


def test_rows_more_than_32_bits_apart() -> None:
    heads, (cos, sin) = (2, 1), angles(3, 8)
    given = random(3, 64, dtype=torch.float16)
    qkv = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((3, 64), (2**30, 1)).copy_(given)
    qk_norm_rope_(qkv, heads, cos, sin, None, None, EPS)
    check(qkv, given, heads, cos, sin, (None, None))


@pytest.mark.parametrize("normed", ["qk", ""], ids=["normed", "plain"])
def test_not_a_number_stays_in_its_head(normed: str) -> None:
    """Heads 0 to 3 are read and written by one program, of which head 2 is poisoned."""
    heads, (cos, sin), both = (3, 1), angles(2, 8), weights(16, normed, torch.float32)
    given = random(2, 80)
    clean = qk_norm_rope_(guarded(given), heads, cos, sin, *both, EPS)
    given[0, 40] = float("nan")
    found = qk_norm_rope_(guarded(given), heads, cos, sin, *both, EPS)
    poisoned = torch.zeros_like(found, dtype=torch.bool)
    poisoned[0, 32:48] = True
    assert found[poisoned].isnan().any()
    assert torch.equal(found[~poisoned], clean[~poisoned])


def test_no_tokens_at_all() -> None:
    qkv = torch.zeros(0, 64)
    assert qk_norm_rope_(qkv, (2, 1), torch.zeros(0, 8), torch.zeros(0, 8), None, None, EPS) is qkv


def test_what_is_not_contiguous_is_refused() -> None:
    qkv, angle, vector = random(4, 64), random(4, 8), random(16)
    given = [qkv, (2, 1), angle, angle, vector, vector]
    wrong = [random(4, 128)[:, ::2], (2, 1), *[random(4, 16)[:, ::2]] * 2, *[random(32)[::2]] * 2]
    for place in (0, 2, 3, 4, 5):
        with pytest.raises(ValueError, match="not contiguous"):
            qk_norm_rope_(*given[:place], wrong[place], *given[place + 1 :], EPS)
