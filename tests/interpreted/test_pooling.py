"""The pooling kernel against torch in float64, per sequence: modes, truncation, norms, empty sequences, NaN."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from conftest import DTYPES, assert_close, guarded, random
from triton_embed.kernels.gpu.blocks import Config
from triton_embed.kernels.gpu.pooling import segment_pool
from triton_embed.kernels.packed import Packed

MODES: dict[str, Callable[[Tensor], Tensor]] = {
    "cls": lambda rows: rows[0],
    "last": lambda rows: rows[-1],
    "mean": lambda rows: rows.mean(0),
    "max": lambda rows: rows.amax(0),
}
LENGTHS = (1, 3, 4, 5, 33, 1, 8)  # around blocks of 4 rows
SHAPES = [
    # lengths, width, config
    ((1,), 60, None),
    (LENGTHS, 60, Config(block_m=4)),
    (LENGTHS, 384, None),
    ((7, 1), 1000, None),
    ((2, 19), 1024, None),
    ((1, 9), 3584, None),
]


def packed_batch(lengths: Sequence[int]) -> Packed:
    """Create a packed batch that may contain empty sequences."""
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Packed(guarded(ends), tuple(lengths))


def float64_pool(x: Tensor, lengths: Sequence[int], mode: str) -> Tensor:
    zeros = torch.zeros(x.shape[1], dtype=torch.float64)
    return torch.stack([MODES[mode](rows) if len(rows) else zeros for rows in x.double().split(list(lengths))])


def truncate_and_normalize(vectors: Tensor, dims: Sequence[int]) -> Tensor:
    rows = (F.normalize(row[:size], dim=0) for row, size in zip(vectors, dims, strict=True))
    return torch.stack([F.pad(row, (0, vectors.shape[1] - len(row))) for row in rows])


def check(result: Tensor, expected: Tensor, dims: Sequence[int]) -> None:
    assert result.dtype == torch.float32
    assert_close(result, expected)
    for row, size in zip(result, dims, strict=True):
        assert not row[size:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lengths", "width", "config"), SHAPES)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode(mode: str, lengths: tuple[int, ...], width: int, config: Config | None, dtype: torch.dtype) -> None:
    x = guarded(random(sum(lengths), width, dtype=dtype))
    dims = [width] * len(lengths)
    plain = segment_pool(x, packed_batch(lengths), mode, dims, l2=False, config=config)
    check(plain, float64_pool(x, lengths, mode), dims)
    unit = segment_pool(x, packed_batch(lengths), mode, dims, config=config)
    check(unit, F.normalize(float64_pool(x, lengths, mode)), dims)


@pytest.mark.parametrize("dims", [(60, 1, 20, 7, 59, 60, 2), (20,) * 7], ids=["different", "equal"])
@pytest.mark.parametrize("mode", MODES)
def test_vectors_are_truncated_before_normalization(mode: str, dims: tuple[int, ...]) -> None:
    x = guarded(1e-3 * random(sum(LENGTHS), 60))  # short vectors: an absolute epsilon would show
    result = segment_pool(x, packed_batch(LENGTHS), mode, dims, config=Config(block_m=4))
    check(result, truncate_and_normalize(float64_pool(x, LENGTHS, mode), dims), dims)


@pytest.mark.parametrize("sign", [1, -1])
def test_max_of_values_with_one_sign(sign: int) -> None:
    x = guarded(sign * (1 + random(sum(LENGTHS), 60).abs()))
    result = segment_pool(x, packed_batch(LENGTHS), "max", [60] * len(LENGTHS), l2=False, config=Config(block_m=4))
    check(result, float64_pool(x, LENGTHS, "max"), [60] * len(LENGTHS))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [24, 31, 10])
def test_final_norm_is_applied_before_truncation(size: int, dtype: torch.dtype, mode: str) -> None:
    """Test a norm that maps to strided vectors of another size, in any dtype."""
    lengths, dims = (5, 1, 7), (size, 3, size - 1)
    x, weight, received = guarded(random(13, 24, dtype=dtype)), random(24, size, seed=1).double(), []

    def norm(vectors: Tensor) -> Tensor:
        received.append(vectors)
        return guarded(F.pad(F.rms_norm(vectors.double(), [24], eps=1e-3) @ weight, (0, 5)).to(dtype)[:, :size])

    result = segment_pool(x, packed_batch(lengths), mode, dims, norm)
    assert [(tensor.dtype, tensor.shape) for tensor in received] == [(torch.float32, (3, 24))]
    assert_close(received[0], float64_pool(x, lengths, mode))
    check(result, truncate_and_normalize(norm(received[0]).double(), dims), dims)


def test_norm_may_be_a_module() -> None:
    lengths, norm = (5, 1, 7), nn.LayerNorm(24, eps=1e-3).requires_grad_(False)
    x = guarded(random(13, 24, dtype=torch.bfloat16))
    expected = F.layer_norm(float64_pool(x, lengths, "last"), [24], eps=1e-3)
    check(segment_pool(x, packed_batch(lengths), "last", [24] * 3, norm), F.normalize(expected), [24] * 3)
    check(segment_pool(x, packed_batch(lengths), "last", [24] * 3, norm, l2=False), expected, [24] * 3)


@pytest.mark.parametrize("lengths", [(0,), (3, 1, 0, 0), (0, 4), (2, 0, 5)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_empty_sequences_give_zeros_and_read_nothing(mode: str, lengths: tuple[int, ...]) -> None:
    x, dims = guarded(random(sum(lengths), 24)), [24] * len(lengths)
    result = segment_pool(x, packed_batch(lengths), mode, dims)
    assert torch.equal(result == 0, torch.tensor(lengths)[:, None].expand(-1, 24) == 0)
    assert_close(result, F.normalize(float64_pool(x, lengths, mode)))


def test_strided_rows() -> None:
    x, dims = guarded(random(sum(LENGTHS), 80)[:, :60]), [60] * len(LENGTHS)
    for mode in MODES:
        result = segment_pool(x, packed_batch(LENGTHS), mode, dims, config=Config(block_m=2))
        check(result, F.normalize(float64_pool(x, LENGTHS, mode)), dims)


@pytest.mark.parametrize("mode", MODES)
def test_row_strides_beyond_32_bits(mode: str) -> None:
    near = random(3, 24, dtype=torch.float16)
    far = torch.empty(2**31 + 24, dtype=torch.float16).as_strided((3, 24), (2**30, 1)).copy_(near)
    result = segment_pool(far, packed_batch((2, 1)), mode, [24, 24])
    assert_close(result, F.normalize(float64_pool(near, (2, 1), mode)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("row", range(4, 8))
def test_nan_stays_in_its_sequence(row: int, mode: str) -> None:
    lengths, dims = (4, 4, 4, 1), [24] * 4
    x = random(13, 24)
    clean = segment_pool(guarded(x), packed_batch(lengths), mode, dims, config=Config(block_m=2))
    x[row] = float("nan")
    result = segment_pool(guarded(x), packed_batch(lengths), mode, dims, config=Config(block_m=2))
    if float64_pool(x, lengths, mode)[1].isnan().any():
        assert result[1].isnan().all()
    others = [0, 2, 3] if result[1].isnan().any() else [0, 1, 2, 3]
    assert torch.equal(result[others], clean[others])


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_one_nan_makes_a_unit_vector_nan(mode: str) -> None:
    x = random(5, 24)
    x[2, 3] = float("nan")
    assert segment_pool(guarded(x), packed_batch((5,)), mode, [24]).isnan().all()
    plain = segment_pool(guarded(x), packed_batch((5,)), mode, [24], l2=False)
    assert torch.equal(plain.isnan()[0], torch.arange(24) == 3)


def test_max_of_infinities() -> None:
    x = random(5, 24)
    x[2, 3], x[4, 7] = float("inf"), float("-inf")
    result = segment_pool(guarded(x), packed_batch((5,)), "max", [24], l2=False, config=Config(block_m=2))
    assert torch.equal(result.double(), float64_pool(x, (5,), "max"))


def test_noncontiguous_inputs_are_rejected() -> None:
    with pytest.raises(ValueError, match="not contiguous"):
        segment_pool(random(4, 48)[:, ::2], packed_batch((4,)), "mean", [24])
    with pytest.raises(ValueError, match="not contiguous"):
        segment_pool(random(4, 24), packed_batch((4,)), "mean", [12], lambda vectors: vectors[:, ::2])
