"""CPU attention against float64 softmax attention, one sequence at a time."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loops import before_guard_page
from torch import Tensor

from triton_embed.kernels.cpu import loops
from triton_embed.kernels.cpu.attention import attention
from triton_embed.kernels.ops import Ops
from triton_embed.kernels.packed import Packed

ops = Ops.on("cpu", torch.float32)

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
    "unordered": [70, 3, 71, 68, 5, 64],
    "longest first": [100, 33, 32, 31, 17, 16, 15, 9, 8, 7, 2, 1],
}
SIZES = [(FP32, size) for size in (1, 2, 3, 5, 6, 7, 8, 15, 16, 17, 20, 31, 32, 33, 48, 63, 64, 65, 80, 96, 128, 160)]
SIZES += [(BF16, size) for size in (2, 6, 8, 14, 16, 18, 20, 30, 32, 34, 48, 64, 66, 80, 96, 128, 160)]
CAUSAL_OR_NOT = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
EACH_DTYPE = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def random_qkv(heads: tuple[int, int, int], tokens: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, ...]:
    """Create q, k and v as a projection does: views of one tensor."""
    query_heads, kv_heads, head_dim = heads
    torch.manual_seed(tokens)
    qkv = torch.randn(tokens, query_heads + 2 * kv_heads, head_dim)
    qkv[:, : query_heads + kv_heads] *= scale
    return qkv.to(dtype).split((query_heads, kv_heads, kv_heads), dim=1)


def float64_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], causal: bool, scale: float) -> Tensor:
    repeats, outputs = q.shape[1] // k.shape[1], []
    for query, key, value in zip(*(x.double().split(list(lengths)) for x in (q, k, v)), strict=True):
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        scores = torch.einsum("ihd,jhd->hij", query, key) * scale
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
        outputs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), value))
    return torch.cat(outputs)


def assert_matches_float64(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], causal: bool, scale: float | None = None
) -> None:
    scale = q.shape[2] ** -0.5 if scale is None else scale
    result = attention(q, k, v, Packed.from_lengths(lengths), causal, scale)
    assert result.shape == q.shape
    assert result.dtype == q.dtype
    assert result.is_contiguous()
    assert (result - float64_attention(q, k, v, lengths, causal, scale)).abs().max() < TOLERANCE[q.dtype]


@CAUSAL_OR_NOT
@EACH_DTYPE
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("heads", SHAPES.values(), ids=SHAPES)
def test_every_shape_matches_float64(
    heads: tuple[int, int, int], lengths: list[int], dtype: torch.dtype, causal: bool
) -> None:
    assert_matches_float64(*random_qkv(heads, sum(lengths), dtype), lengths, causal)


@CAUSAL_OR_NOT
@EACH_DTYPE
def test_every_length_alone(dtype: torch.dtype, causal: bool) -> None:
    for length in range(1, 71):
        assert_matches_float64(*random_qkv((2, 1, 10), length, dtype), [length], causal)


@CAUSAL_OR_NOT
@EACH_DTYPE
def test_every_length_in_a_mixed_batch(dtype: torch.dtype, causal: bool) -> None:
    """Order the lengths so that a long sequence leaves data in scratch before a short one is computed."""
    lengths = [length for pair in zip(range(70, 35, -1), range(1, 36), strict=True) for length in pair]
    assert_matches_float64(*random_qkv((3, 3, 16), sum(lengths), dtype), lengths, causal)


@CAUSAL_OR_NOT
@pytest.mark.parametrize(("dtype", "size"), SIZES, ids=str)
def test_every_head_size(dtype: torch.dtype, size: int, causal: bool) -> None:
    lengths = [1, 2, 9, 33, 40]
    assert_matches_float64(*random_qkv((4, 2, size), sum(lengths), dtype), lengths, causal)


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 80), min_size=1, max_size=7),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 3), (6, 2)]),
    size=st.integers(1, 40),
    causal=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
    threads=st.integers(1, 3),
)
def test_random_lengths_and_heads(
    lengths: list[int], heads: tuple[int, int], size: int, causal: bool, dtype: torch.dtype, threads: int
) -> None:
    torch.set_num_threads(threads)
    size *= 1 if dtype == FP32 else 2
    assert_matches_float64(*random_qkv((*heads, size), sum(lengths), dtype), lengths, causal)


@pytest.mark.parametrize("scale", [1e-3, 0.05, 1.0])
def test_scale_is_applied(scale: float) -> None:
    assert_matches_float64(*random_qkv((4, 2, 16), 50, FP32), [20, 30], False, scale)


@CAUSAL_OR_NOT
@EACH_DTYPE
@pytest.mark.parametrize("offset", [0.0, 60.0, -60.0])
@pytest.mark.parametrize("spread", [4.0, 12.0, 40.0, 1000.0])
def test_extreme_scores(spread: float, offset: float, dtype: torch.dtype, causal: bool) -> None:
    """Use keys with a common offset, and scores whose exp2 is infinite or 0."""
    lengths = [40, 44, 50, 130]
    q, k, v = random_qkv((4, 4, 32), sum(lengths), dtype, spread)
    q, k = q + offset, k + offset
    result = attention(q, k, v, Packed.from_lengths(lengths), causal, 32**-0.5)
    expected = float64_attention(q, k, v, lengths, causal, 32**-0.5)
    # Products are summed in fp32, so the rounding error of a score is proportional to its size in every dtype.
    largest = (q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max() * 32**-0.5).item()
    assert (result - expected).abs().max() < (0 if dtype == FP32 else TOLERANCE[dtype]) + 1e-6 * max(8.0, largest)


@CAUSAL_OR_NOT
@EACH_DTYPE
@pytest.mark.parametrize("score", [-1e6, -300.0, 300.0, 1e6])
def test_equal_scores_get_equal_weights(score: float, dtype: torch.dtype, causal: bool) -> None:
    """Use 32 keys and integer products, so that the weights are exact."""
    q, k, v = random_qkv((2, 2, 16), 32, dtype)
    q, k = torch.ones_like(q), torch.full_like(k, score / 16).bfloat16().to(dtype)
    result = attention(q, k, v, Packed.from_lengths([32]), causal, 1.0)
    expected = v.double().cumsum(0) / torch.arange(1, 33)[:, None, None] if causal else v.double().mean(0).expand_as(v)
    assert (result - expected).abs().max() < (1e-6 if dtype == FP32 else 0.01)


@EACH_DTYPE
def test_dominant_key_gets_all_weight(dtype: torch.dtype) -> None:
    q, k, v = (x.clone() for x in random_qkv((2, 2, 16), 45, dtype))
    q[:], k[:] = 1, -100
    k[37] = 100
    result = attention(q, k, v, Packed.from_lengths([45]), False, 1.0)
    assert torch.equal(result, v[37].expand_as(result))


def start_offsets(lengths: Sequence[int]) -> list[int]:
    return [0, *accumulate(lengths)][:-1]


QUERY_INDEX = {"first": lambda n: 0, "last": lambda n: n - 1, "middle": lambda n: n // 2}


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("position", QUERY_INDEX)
@EACH_DTYPE
@pytest.mark.parametrize("heads", [(12, 12, 32), (6, 2, 48), (5, 1, 10), (2, 2, 128)], ids=str)
def test_one_query_per_sequence(
    heads: tuple[int, int, int], dtype: torch.dtype, position: str, index: torch.dtype
) -> None:
    """Check that a query sees its full sequence, which in the last row equals causal attention."""
    lengths = [1, 2, 7, 8, 9, 31, 32, 33, 1, 70]
    q, k, v = random_qkv(heads, sum(lengths), dtype)
    rows = [start + QUERY_INDEX[position](n) for start, n in zip(start_offsets(lengths), lengths, strict=True)]
    packed, scale = Packed.from_lengths(lengths), heads[2] ** -0.5
    result = attention(q, k, v, packed, False, scale, torch.tensor(rows, dtype=index))
    assert result.shape == (len(lengths), *q.shape[1:])
    assert result.dtype == dtype
    assert (result - float64_attention(q, k, v, lengths, False, scale)[rows]).abs().max() < TOLERANCE[dtype]
    if position == "last":
        assert (result - float64_attention(q, k, v, lengths, True, scale)[rows]).abs().max() < TOLERANCE[dtype]


@EACH_DTYPE
def test_strided_and_contiguous_inputs_agree(dtype: torch.dtype) -> None:
    """Compare views of one projection, contiguous tensors and views of three wider tensors bit for bit."""
    lengths = [9, 40]
    q, k, v = random_qkv((4, 2, 18), 49, dtype)
    packed = Packed.from_lengths(lengths)
    expected = attention(q, k, v, packed, False, 0.3)
    assert torch.equal(attention(*(x.contiguous() for x in (q, k, v)), packed, False, 0.3), expected)
    wider = [torch.full((49, x.shape[1] + n, 18), 1e9, dtype=dtype) for n, x in enumerate((q, k, v), 1)]
    for n, (wide, x) in enumerate(zip(wider, (q, k, v), strict=True), 1):
        wide[:, n:] = x
    views = [wide[:, n:] for n, wide in enumerate(wider, 1)]
    assert torch.equal(attention(*views, packed, False, 0.3), expected)


def test_heads_may_have_any_stride() -> None:
    """Check that only the last dimension of an input needs to be contiguous."""
    lengths = [9, 20]
    q, k, v = torch.randn(29, 3, 4, 16, generator=torch.Generator().manual_seed(0)).unbind(2)[:3]
    result = ops.varlen_attention(q, k, v, Packed.from_lengths(lengths), False, None, 0.25)
    assert (result - float64_attention(q, k, v, lengths, False, 0.25)).abs().max() < TOLERANCE[FP32]


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], mode: str) -> list[Tensor]:
    """Compute attention and return the rows of each sequence."""
    rows = torch.tensor(start_offsets(lengths)) if mode == "one query" else None
    result = attention(q, k, v, Packed.from_lengths(lengths), mode == "causal", 0.3, rows)
    return list(result.split([1] * len(lengths) if rows is not None else list(lengths)))


EACH_MODE = pytest.mark.parametrize("mode", ["bidirectional", "causal", "one query"])


@EACH_MODE
@EACH_DTYPE
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_nonfinite_values_stay_in_their_sequence(which: str, value: float, dtype: torch.dtype, mode: str) -> None:
    """Run on one thread, where each sequence uses scratch memory that still holds data of the one before it."""
    lengths = [40, 33, 1, 7, 34]
    clean = random_qkv((2, 1, 18), sum(lengths), dtype)
    expected = attend(*clean, lengths, mode)
    for sequence in range(len(lengths)):
        inputs = [x.clone() for x in clean]
        inputs["qkv".index(which)][start_offsets(lengths)[sequence]] = value
        result = attend(*inputs, lengths, mode)
        for n, (rows, expected_rows) in enumerate(zip(result, expected, strict=True)):
            assert n == sequence or torch.equal(rows, expected_rows)
        if value != value or which == "v":
            assert not result[sequence][0].isfinite().any()


@EACH_DTYPE
def test_nan_query_affects_only_its_own_row(dtype: torch.dtype) -> None:
    q, k, v = (x.clone() for x in random_qkv((2, 2, 16), 21, dtype))
    expected = attention(q, k, v, Packed.from_lengths([21]), False, 0.3)
    q[9, 1, 3] = NAN
    result = attention(q, k, v, Packed.from_lengths([21]), False, 0.3)
    assert result[9, 1].isnan().all()
    result[9, 1] = expected[9, 1]
    assert torch.equal(result, expected)


@EACH_MODE
@EACH_DTYPE
def test_scratch_contents_do_not_matter(dtype: torch.dtype, mode: str) -> None:
    lengths = [1, 15, 34, 70]
    inputs = random_qkv((3, 1, 22), sum(lengths), dtype)
    with torch.inference_mode():
        loops.scratch(200_000).zero_()
    expected = attend(*inputs, lengths, mode)
    for garbage in (NAN, INF, 3e38):
        with torch.inference_mode(), torch.inference_mode():
            loops.scratch(1).fill_(garbage)
        assert torch.equal(torch.cat(attend(*inputs, lengths, mode)), torch.cat(expected))


@EACH_MODE
@EACH_DTYPE
def test_result_is_independent_of_threads_and_neighbors(dtype: torch.dtype, mode: str) -> None:
    lengths = [1, 90, 31, 8, 64, 200, 2, 33]
    q, k, v = random_qkv((4, 2, 48), sum(lengths), dtype)
    expected = attend(q, k, v, lengths, mode)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert torch.equal(torch.cat(attend(q, k, v, lengths, mode)), torch.cat(expected))
    parts = [x.split(lengths) for x in (q, k, v)]
    for n, length in enumerate(lengths):
        (alone,) = attend(*(part[n] for part in parts), [length], mode)
        assert torch.equal(alone, expected[n])
    backwards = attend(*(torch.cat(part[::-1]) for part in parts), lengths[::-1], mode)
    assert torch.equal(torch.cat(backwards[::-1]), torch.cat(expected))


@EACH_MODE
@EACH_DTYPE
def test_no_out_of_bounds_reads_or_writes(dtype: torch.dtype, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = []

    def allocate_surrounded(x: Tensor, *shape: Any) -> Tensor:
        size = torch.Size(shape if isinstance(shape[0], int) else shape[0])
        memory = torch.full((size.numel() + 256,), 77.0, dtype=x.dtype)
        memory[128:-128] = NAN
        allocated.append(memory)
        return memory[128:-128].view(size)

    for size in (2, 16, 22, 34):
        for lengths in ([1], [7], [8, 16], [30, 1], [3, 33]):
            q, k, v = random_qkv((4, 2, size), sum(lengths), dtype)
            expected = torch.cat(attend(q, k, v, lengths, mode))
            assert expected.isfinite().all()
            # Each is the last part of its tensor.
            fenced = [before_guard_page(torch.cat([torch.ones_like(x), x], dim=1))[:, x.shape[1] :] for x in (q, k, v)]
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "new_empty", allocate_surrounded)
                assert torch.equal(torch.cat(attend(*fenced, lengths, mode)), expected)
    assert allocated
    for memory in allocated:
        assert (memory[:128] == 77).all()
        assert (memory[-128:] == 77).all()


@EACH_DTYPE
def test_inputs_are_unchanged(dtype: torch.dtype) -> None:
    inputs = random_qkv((4, 2, 20), 60, dtype)
    before = [x.clone() for x in inputs]
    attention(*inputs, Packed.from_lengths([27, 33]), True, 0.3)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@EACH_DTYPE
def test_ops_use_this_attention_on_a_cpu(dtype: torch.dtype) -> None:
    lengths = [5, 40]
    packed, last = Packed.from_lengths(lengths), torch.tensor([4, 44])
    q, k, v = random_qkv((4, 2, 16), 45, dtype)
    for causal in (False, True):
        for window in (None, 40) if causal else (None,):
            result = ops.varlen_attention(q, k, v, packed, causal, window, 0.3)
            assert torch.equal(result, attention(q, k, v, packed, causal, 0.3))
    result = ops.pooled_attention(q, k, v, packed, last, None, 0.3)
    assert torch.equal(result, attention(q, k, v, packed, False, 0.3, last))
