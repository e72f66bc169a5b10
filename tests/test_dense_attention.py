"""Dense attention against float64 softmax attention, one sequence at a time."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from triton_embed.kernels import dense_attention, ops
from triton_embed.kernels.packed import Packed

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 0.03}
SHAPES = {  # query heads, key heads, head dim
    "minilm": (12, 12, 32),
    "clip": (8, 8, 64),
    "grouped": (6, 2, 48),
    "one key head": (5, 1, 20),
    "qwen3": (4, 2, 128),
}
LENGTHS = {
    "one token": [1],
    "one text": [130],
    "equal": [32] * 4,
    "nearly equal": [60, 61, 61, 64, 66, 70, 70],
    "short": [5, 5, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11] * 3,
    "short and long": [3, 90, 91, 400],
    "in no order": [70, 3, 71, 68, 5, 64],
    "over two blocks of queries": [257, 260],
    "over three": [600],
}


def drawn(heads: tuple[int, int, int], tokens: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, ...]:
    """q, k and v as a projection gives them: views of one tensor."""
    query, key, size = heads
    torch.manual_seed(tokens)
    qkv = torch.randn(tokens, query + 2 * key, size)
    qkv[:, : query + key] *= scale
    return qkv.to(dtype).split((query, key, key), dim=1)


def expected(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool, scale: float) -> Tensor:
    repeats, found = q.shape[1] // k.shape[1], []
    for a, b, c in zip(*(x.double().split(lengths) for x in (q, k, v)), strict=True):
        b, c = b.repeat_interleave(repeats, dim=1), c.repeat_interleave(repeats, dim=1)
        scores = torch.einsum("ihd,jhd->hij", a, b) * scale
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
        found.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), c))
    return torch.cat(found)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("heads", SHAPES.values(), ids=SHAPES)
def test_shapes(heads: tuple[int, int, int], lengths: list[int], dtype: torch.dtype, causal: bool) -> None:
    q, k, v = drawn(heads, sum(lengths), dtype)
    found = ops.varlen_attention(q, k, v, Packed.from_lengths(lengths), causal, None, heads[2] ** -0.5)
    wanted = expected(q, k, v, lengths, causal, heads[2] ** -0.5)
    assert found.shape == q.shape
    assert found.dtype == dtype
    assert (found - wanted).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("offset", [0.0, 60.0, -60.0])
@pytest.mark.parametrize("spread", [4.0, 12.0, 40.0])
def test_scores_far_from_0(spread: float, offset: float, causal: bool) -> None:
    """Keys that all lean one way, and scores of which exp2 is infinite or 0."""
    lengths = [40, 44, 50, 130]
    q, k, v = drawn((4, 4, 32), sum(lengths), torch.float32, spread)
    q, k = q + offset, k + offset
    found = dense_attention.attention(q, k, v, Packed.from_lengths(lengths), causal, 32**-0.5)
    wanted = expected(q, k, v, lengths, causal, 32**-0.5)
    # Rounding moves a score by its size; the fallback, torch's own, has no more.
    largest = (q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max() * 32**-0.5).item()
    assert (found - wanted).abs().max() < 1e-6 * max(8.0, largest)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_what_is_out_of_range_is_noticed(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch's attention to fall back on, the result above would be wrong."""
    calls = []
    whole = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **options: calls.append(args[0].shape[2]) or whole(*args, **options),
    )
    q, k, v = drawn((4, 4, 32), 200, dtype)
    dense_attention.attention(q, k, v, Packed.from_lengths([200]), False, 32**-0.5)
    assert not calls
    dense_attention.attention(q * 50, k * 50, v, Packed.from_lengths([200]), False, 32**-0.5)
    assert len(calls) == 1


def test_a_short_text_alone_does_not_attend_to_fillers() -> None:
    for causal in (False, True):
        q, k, v = drawn((4, 2, 32), 12, torch.float32)
        packed = Packed(torch.tensor([0, 10, 11, 12], dtype=torch.int32), (10, 1, 1), fillers=2)
        found = dense_attention.attention(q, k, v, packed, causal, 32**-0.5)
        assert found.shape == q.shape
        assert (found[:10] - expected(q[:10], k[:10], v[:10], [10], causal, 32**-0.5)).abs().max() < 3e-6


def test_fillers_are_not_attended() -> None:
    q, k, v = drawn((4, 4, 32), 103, torch.float32)
    packed = Packed(torch.tensor([0, 100, 101, 102, 103], dtype=torch.int32), (100, 1, 1, 1), fillers=3)
    found = dense_attention.attention(q, k, v, packed, False, 32**-0.5)
    assert (found[:100] - expected(q[:100], k[:100], v[:100], [100], False, 32**-0.5)).abs().max() < 3e-6
    assert not found[100:].any()


@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=60),
    ordered=st.booleans(),
    heads=st.integers(1, 32),
    longest=st.sampled_from([0, 64, 256, 10_000]),
)
def test_groups_are_the_sequences_in_order(lengths: list[int], ordered: bool, heads: int, longest: int) -> None:
    lengths = sorted(lengths) if ordered else lengths
    found = dense_attention.groups(lengths, heads, longest)
    packed = torch.arange(sum(lengths))
    first, rest = 0, lengths
    for group in found:
        assert group.first == first
        own = packed[first : first + group.tokens]
        if group.places is None:
            members = [group.length] * group.count
            assert group.tokens == group.length * group.count
        else:
            assert group.real is not None
            assert group.found is not None
            block = packed[group.places].view(group.count, group.length)
            rows = [row[real.flatten()] for row, real in zip(block, group.real, strict=True)]
            assert all(len(row) for row in rows)  # a query that sees no key is not a number
            count = next(n for n in range(len(rows) + 1) if sum(map(len, rows[:n])) == group.tokens)
            members = [len(row) for row in rows[:count]]
            assert torch.equal(torch.cat(rows[:count]), own)
            assert torch.equal(block.flatten()[group.found], own)
            assert max(members) <= longest
            assert group.count * 7 <= len(members) * 8
        assert rest[: len(members)] == members
        rest, first = rest[len(members) :], first + group.tokens
    assert not rest


def test_shapes_are_few() -> None:
    """However many texts of whatever lengths share a pass."""
    draw = random.Random(0)
    shapes = set()
    for _ in range(300):
        lengths = sorted(draw.choices(range(5, 257), k=draw.randint(1, 40)))
        shapes |= {(group.count, group.length) for group in dense_attention.groups(lengths, 12, 256)}
    assert {count for count, _ in shapes} <= {1, 2, 4, 8, 16, 32}
    assert len({length for _, length in shapes}) <= 8 + 4 + 4
