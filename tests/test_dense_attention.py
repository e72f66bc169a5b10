"""Attention of a CPU against float64 softmax attention, one sequence at a time."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loops import fenced
from torch import Tensor

from triton_embed.kernels import loops, ops
from triton_embed.kernels.dense_attention import attention
from triton_embed.kernels.packed import Packed

FP32, BF16 = torch.float32, torch.bfloat16
TOLERANCE = {FP32: 3e-6, BF16: 0.03}
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
    "short": [5, 5, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11] * 3,
    "short and long": [3, 90, 91, 400],
    "in no order": [70, 3, 71, 68, 5, 64],
    "longest first": [100, 33, 32, 31, 17, 16, 15, 9, 8, 7, 2, 1],
}
SIZES = [(FP32, size) for size in (1, 2, 3, 5, 6, 7, 8, 15, 16, 17, 20, 31, 32, 33, 48, 63, 64, 65, 80, 96, 128, 160)]
SIZES += [(BF16, size) for size in (2, 6, 8, 14, 16, 18, 20, 30, 32, 34, 48, 64, 66, 80, 96, 128, 160)]
BOTH_WAYS_OR_CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
EACH_DTYPE = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def drawn(heads: tuple[int, int, int], tokens: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, ...]:
    """q, k and v as a projection gives them: views of one tensor."""
    query, key, size = heads
    torch.manual_seed(tokens)
    qkv = torch.randn(tokens, query + 2 * key, size)
    qkv[:, : query + key] *= scale
    return qkv.to(dtype).split((query, key, key), dim=1)


def expected(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], causal: bool, scale: float) -> Tensor:
    repeats, found = q.shape[1] // k.shape[1], []
    for a, b, c in zip(*(x.double().split(list(lengths)) for x in (q, k, v)), strict=True):
        b, c = b.repeat_interleave(repeats, dim=1), c.repeat_interleave(repeats, dim=1)
        scores = torch.einsum("ihd,jhd->hij", a, b) * scale
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
        found.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), c))
    return torch.cat(found)


def assert_attends(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], causal: bool, scale: float | None = None
) -> None:
    scale = q.shape[2] ** -0.5 if scale is None else scale
    found = attention(q, k, v, Packed.from_lengths(lengths), causal, scale)
    assert found.shape == q.shape
    assert found.dtype == q.dtype
    assert found.is_contiguous()
    assert (found - expected(q, k, v, lengths, causal, scale)).abs().max() < TOLERANCE[q.dtype]


@BOTH_WAYS_OR_CAUSAL
@EACH_DTYPE
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("heads", SHAPES.values(), ids=SHAPES)
def test_shapes(heads: tuple[int, int, int], lengths: list[int], dtype: torch.dtype, causal: bool) -> None:
    assert_attends(*drawn(heads, sum(lengths), dtype), lengths, causal)


@BOTH_WAYS_OR_CAUSAL
@EACH_DTYPE
def test_each_length_alone(dtype: torch.dtype, causal: bool) -> None:
    for length in range(1, 71):
        assert_attends(*drawn((2, 1, 10), length, dtype), [length], causal)


@BOTH_WAYS_OR_CAUSAL
@EACH_DTYPE
def test_each_length_among_others(dtype: torch.dtype, causal: bool) -> None:
    """In an order that leaves traces of a long one where a short one is computed."""
    lengths = [length for pair in zip(range(70, 35, -1), range(1, 36), strict=True) for length in pair]
    assert_attends(*drawn((3, 3, 16), sum(lengths), dtype), lengths, causal)


@BOTH_WAYS_OR_CAUSAL
@pytest.mark.parametrize(("dtype", "size"), SIZES, ids=str)
def test_head_sizes(dtype: torch.dtype, size: int, causal: bool) -> None:
    lengths = [1, 2, 9, 33, 40]
    assert_attends(*drawn((4, 2, size), sum(lengths), dtype), lengths, causal)


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 80), min_size=1, max_size=7),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 3), (6, 2)]),
    size=st.integers(1, 40),
    causal=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
    threads=st.integers(1, 3),
)
def test_any_lengths_and_heads(
    lengths: list[int], heads: tuple[int, int], size: int, causal: bool, dtype: torch.dtype, threads: int
) -> None:
    torch.set_num_threads(threads)
    size *= 1 if dtype == FP32 else 2
    assert_attends(*drawn((*heads, size), sum(lengths), dtype), lengths, causal)


@pytest.mark.parametrize("scale", [1e-3, 0.05, 1.0])
def test_the_scale_is_that_of_the_caller(scale: float) -> None:
    assert_attends(*drawn((4, 2, 16), 50, FP32), [20, 30], False, scale)


@BOTH_WAYS_OR_CAUSAL
@EACH_DTYPE
@pytest.mark.parametrize("offset", [0.0, 60.0, -60.0])
@pytest.mark.parametrize("spread", [4.0, 12.0, 40.0, 1000.0])
def test_scores_far_from_0(spread: float, offset: float, dtype: torch.dtype, causal: bool) -> None:
    """Keys that all lean one way, and scores of which exp2 is infinite or 0."""
    lengths = [40, 44, 50, 130]
    q, k, v = drawn((4, 4, 32), sum(lengths), dtype, spread)
    q, k = q + offset, k + offset
    found = attention(q, k, v, Packed.from_lengths(lengths), causal, 32**-0.5)
    wanted = expected(q, k, v, lengths, causal, 32**-0.5)
    # Rounding moves a score by its size, whatever the dtype of what it is made of: products are summed in fp32.
    largest = (q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max() * 32**-0.5).item()
    assert (found - wanted).abs().max() < (0 if dtype == FP32 else TOLERANCE[dtype]) + 1e-6 * max(8.0, largest)


@BOTH_WAYS_OR_CAUSAL
@EACH_DTYPE
@pytest.mark.parametrize("score", [-1e6, -300.0, 300.0, 1e6])
def test_equal_scores_are_weighed_alike_however_large(score: float, dtype: torch.dtype, causal: bool) -> None:
    """Exactly: 32 keys, and products that are whole."""
    q, k, v = drawn((2, 2, 16), 32, dtype)
    q, k = torch.ones_like(q), torch.full_like(k, score / 16).bfloat16().to(dtype)
    found = attention(q, k, v, Packed.from_lengths([32]), causal, 1.0)
    wanted = v.double().cumsum(0) / torch.arange(1, 33)[:, None, None] if causal else v.double().mean(0).expand_as(v)
    assert (found - wanted).abs().max() < (1e-6 if dtype == FP32 else 0.01)


@EACH_DTYPE
def test_one_key_far_above_the_others_is_all_there_is(dtype: torch.dtype) -> None:
    q, k, v = (x.clone() for x in drawn((2, 2, 16), 45, dtype))
    q[:], k[:] = 1, -100
    k[37] = 100
    found = attention(q, k, v, Packed.from_lengths([45]), False, 1.0)
    assert torch.equal(found, v[37].expand_as(found))


def starts_of(lengths: Sequence[int]) -> list[int]:
    return [0, *accumulate(lengths)][:-1]


PLACES = {"first": lambda n: 0, "last": lambda n: n - 1, "middle": lambda n: n // 2}


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("place", PLACES)
@EACH_DTYPE
@pytest.mark.parametrize("heads", [(12, 12, 32), (6, 2, 48), (5, 1, 10), (2, 2, 128)], ids=str)
def test_one_query_of_each_sequence(
    heads: tuple[int, int, int], dtype: torch.dtype, place: str, index: torch.dtype
) -> None:
    """It sees all of its sequence, which at its last row is what a causal one sees."""
    lengths = [1, 2, 7, 8, 9, 31, 32, 33, 1, 70]
    q, k, v = drawn(heads, sum(lengths), dtype)
    own = [start + PLACES[place](n) for start, n in zip(starts_of(lengths), lengths, strict=True)]
    packed, scale = Packed.from_lengths(lengths), heads[2] ** -0.5
    found = attention(q, k, v, packed, False, scale, torch.tensor(own, dtype=index))
    assert found.shape == (len(lengths), *q.shape[1:])
    assert found.dtype == dtype
    assert (found - expected(q, k, v, lengths, False, scale)[own]).abs().max() < TOLERANCE[dtype]
    if place == "last":
        assert (found - expected(q, k, v, lengths, True, scale)[own]).abs().max() < TOLERANCE[dtype]


@EACH_DTYPE
def test_inputs_may_be_views_of_whatever_tensor_or_none(dtype: torch.dtype) -> None:
    """Of one projection, of three that are wider, each its own: the same bits."""
    lengths = [9, 40]
    q, k, v = drawn((4, 2, 18), 49, dtype)
    packed = Packed.from_lengths(lengths)
    wanted = attention(q, k, v, packed, False, 0.3)
    assert torch.equal(attention(*(x.contiguous() for x in (q, k, v)), packed, False, 0.3), wanted)
    wider = [torch.full((49, x.shape[1] + n, 18), 1e9, dtype=dtype) for n, x in enumerate((q, k, v), 1)]
    for n, (wide, x) in enumerate(zip(wider, (q, k, v), strict=True), 1):
        wide[:, n:] = x
    views = [wide[:, n:] for n, wide in enumerate(wider, 1)]
    assert torch.equal(attention(*views, packed, False, 0.3), wanted)


def test_heads_may_stand_anywhere_in_a_token() -> None:
    """Only the last dimension of what an op is given need be contiguous."""
    lengths = [9, 20]
    q, k, v = torch.randn(29, 3, 4, 16, generator=torch.Generator().manual_seed(0)).unbind(2)[:3]
    found = ops.varlen_attention(q, k, v, Packed.from_lengths(lengths), False, None, 0.25)
    assert (found - expected(q, k, v, lengths, False, 0.25)).abs().max() < TOLERANCE[FP32]


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], how: str) -> list[Tensor]:
    """The rows of each sequence."""
    rows = torch.tensor(starts_of(lengths)) if how == "one query" else None
    found = attention(q, k, v, Packed.from_lengths(lengths), how == "causal", 0.3, rows)
    return list(found.split([1] * len(lengths) if rows is not None else list(lengths)))


HOW = pytest.mark.parametrize("how", ["both ways", "causal", "one query"])


@HOW
@EACH_DTYPE
@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_what_is_not_finite_stays_in_its_sequence(which: str, wrong: float, dtype: torch.dtype, how: str) -> None:
    """On one thread, where each sequence finds what the one before it has left."""
    lengths = [40, 33, 1, 7, 34]
    clean = drawn((2, 1, 18), sum(lengths), dtype)
    wanted = attend(*clean, lengths, how)
    for sequence in range(len(lengths)):
        given = [x.clone() for x in clean]
        given["qkv".index(which)][starts_of(lengths)[sequence]] = wrong
        found = attend(*given, lengths, how)
        for n, (one, right) in enumerate(zip(found, wanted, strict=True)):
            assert n == sequence or torch.equal(one, right)
        if wrong != wrong or which == "v":
            assert not found[sequence][0].isfinite().any()


@EACH_DTYPE
def test_a_query_that_is_not_a_number_is_alone_with_it(dtype: torch.dtype) -> None:
    q, k, v = (x.clone() for x in drawn((2, 2, 16), 21, dtype))
    wanted = attention(q, k, v, Packed.from_lengths([21]), False, 0.3)
    q[9, 1, 3] = NAN
    found = attention(q, k, v, Packed.from_lengths([21]), False, 0.3)
    assert found[9, 1].isnan().all()
    found[9, 1] = wanted[9, 1]
    assert torch.equal(found, wanted)


@HOW
@EACH_DTYPE
def test_what_stood_in_scratch_does_not_matter(dtype: torch.dtype, how: str) -> None:
    lengths = [1, 15, 34, 70]
    given = drawn((3, 1, 22), sum(lengths), dtype)
    with torch.inference_mode():
        loops.scratch(200_000).zero_()
    wanted = attend(*given, lengths, how)
    for rubbish in (NAN, INF, 3e38):
        with torch.inference_mode(), torch.inference_mode():
            loops.scratch(1).fill_(rubbish)
        assert torch.equal(torch.cat(attend(*given, lengths, how)), torch.cat(wanted))


@HOW
@EACH_DTYPE
def test_neither_the_number_of_threads_nor_neighbours_change_a_bit(dtype: torch.dtype, how: str) -> None:
    lengths = [1, 90, 31, 8, 64, 200, 2, 33]
    q, k, v = drawn((4, 2, 48), sum(lengths), dtype)
    wanted = attend(q, k, v, lengths, how)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert torch.equal(torch.cat(attend(q, k, v, lengths, how)), torch.cat(wanted))
    parts = [x.split(lengths) for x in (q, k, v)]
    for n, length in enumerate(lengths):
        (alone,) = attend(*(part[n] for part in parts), [length], how)
        assert torch.equal(alone, wanted[n])
    backwards = attend(*(torch.cat(part[::-1]) for part in parts), lengths[::-1], how)
    assert torch.equal(torch.cat(backwards[::-1]), torch.cat(wanted))


@HOW
@EACH_DTYPE
def test_nothing_is_written_around_results_nor_read_behind_what_is_given(
    dtype: torch.dtype, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def surrounded(x: Tensor, *shape: Any) -> Tensor:
        size = torch.Size(shape if isinstance(shape[0], int) else shape[0])
        memory = torch.full((size.numel() + 256,), 77.0, dtype=x.dtype)
        memory[128:-128] = NAN
        made.append(memory)
        return memory[128:-128].view(size)

    for size in (2, 16, 22, 34):
        for lengths in ([1], [7], [8, 16], [30, 1], [3, 33]):
            q, k, v = drawn((4, 2, size), sum(lengths), dtype)
            wanted = torch.cat(attend(q, k, v, lengths, how))
            assert wanted.isfinite().all()
            # Each of them the last of its tensor.
            ends = [fenced(torch.cat([torch.ones_like(x), x], dim=1))[:, x.shape[1] :] for x in (q, k, v)]
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "new_empty", surrounded)
                assert torch.equal(torch.cat(attend(*ends, lengths, how)), wanted)
    assert made
    for memory in made:
        assert (memory[:128] == 77).all()
        assert (memory[-128:] == 77).all()


@EACH_DTYPE
def test_what_is_given_stays_as_it_is(dtype: torch.dtype) -> None:
    given = drawn((4, 2, 20), 60, dtype)
    before = [x.clone() for x in given]
    attention(*given, Packed.from_lengths([27, 33]), True, 0.3)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


@EACH_DTYPE
def test_ops_give_a_cpu_this_attention(dtype: torch.dtype) -> None:
    lengths = [5, 40]
    packed, last = Packed.from_lengths(lengths), torch.tensor([4, 44])
    q, k, v = drawn((4, 2, 16), 45, dtype)
    for causal in (False, True):
        for window in (None, 40) if causal else (None,):
            found = ops.varlen_attention(q, k, v, packed, causal, window, 0.3)
            assert torch.equal(found, attention(q, k, v, packed, causal, 0.3))
    found = ops.pooled_attention(q, k, v, packed, last, None, 0.3)
    assert torch.equal(found, attention(q, k, v, packed, False, 0.3, last))
