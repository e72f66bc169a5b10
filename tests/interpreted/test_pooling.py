"""The pooling kernel against torch in float64, one sequence at a time: modes, cuts, norms, empty sequences, NaN."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from conftest import DTYPES, assert_close, guarded, random
from triton_embed.kernels.blocks import Config
from triton_embed.kernels.packed import Packed
from triton_embed.kernels.pooling import segment_pool

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


def packed(lengths: Sequence[int]) -> Packed:
    """Sequences of no tokens too."""
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Packed(guarded(ends), tuple(lengths))


def pooled(x: Tensor, lengths: Sequence[int], mode: str) -> Tensor:
    nothing = torch.zeros(x.shape[1], dtype=torch.float64)
    return torch.stack([MODES[mode](rows) if len(rows) else nothing for rows in x.double().split(list(lengths))])


def finished(whole: Tensor, dims: Sequence[int]) -> Tensor:
    """Cut and normalised."""
    rows = (F.normalize(row[:size], dim=0) for row, size in zip(whole, dims, strict=True))
    return torch.stack([F.pad(row, (0, whole.shape[1] - len(row))) for row in rows])


def check(found: Tensor, expected: Tensor, dims: Sequence[int]) -> None:
    assert found.dtype == torch.float32
    assert_close(found, expected)
    for row, size in zip(found, dims, strict=True):
        assert not row[size:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lengths", "width", "config"), SHAPES)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode(mode: str, lengths: tuple[int, ...], width: int, config: Config | None, dtype: torch.dtype) -> None:
    x = guarded(random(sum(lengths), width, dtype=dtype))
    dims = [width] * len(lengths)
    plain = segment_pool(x, packed(lengths), mode, dims, l2=False, config=config)
    check(plain, pooled(x, lengths, mode), dims)
    unit = segment_pool(x, packed(lengths), mode, dims, config=config)
    check(unit, F.normalize(pooled(x, lengths, mode)), dims)


@pytest.mark.parametrize("dims", [(60, 1, 20, 7, 59, 60, 2), (20,) * 7], ids=["each its own", "all the same"])
@pytest.mark.parametrize("mode", MODES)
def test_vectors_are_cut_before_they_are_normalised(mode: str, dims: tuple[int, ...]) -> None:
    x = guarded(1e-3 * random(sum(LENGTHS), 60))  # short vectors: an absolute epsilon would show
    found = segment_pool(x, packed(LENGTHS), mode, dims, config=Config(block_m=4))
    check(found, finished(pooled(x, LENGTHS, mode), dims), dims)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_of_values_on_one_side_of_zero(sign: int) -> None:
    x = guarded(sign * (1 + random(sum(LENGTHS), 60).abs()))
    found = segment_pool(x, packed(LENGTHS), "max", [60] * len(LENGTHS), l2=False, config=Config(block_m=4))
    check(found, pooled(x, LENGTHS, "max"), [60] * len(LENGTHS))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [24, 31, 10])
def test_a_final_norm_comes_before_the_cut(size: int, dtype: torch.dtype, mode: str) -> None:
    """The norm is a map to vectors of another size, which lie apart, in any dtype."""
    lengths, dims = (5, 1, 7), (size, 3, size - 1)
    x, weight, given = guarded(random(13, 24, dtype=dtype)), random(24, size, seed=1).double(), []

    def norm(vectors: Tensor) -> Tensor:
        given.append(vectors)
        return guarded(F.pad(F.rms_norm(vectors.double(), [24], eps=1e-3) @ weight, (0, 5)).to(dtype)[:, :size])

    found = segment_pool(x, packed(lengths), mode, dims, norm)
    assert [(one.dtype, one.shape) for one in given] == [(torch.float32, (3, 24))]
    assert_close(given[0], pooled(x, lengths, mode))
    check(found, finished(norm(given[0]).double(), dims), dims)


def test_a_norm_that_is_a_module() -> None:
    lengths, norm = (5, 1, 7), nn.LayerNorm(24, eps=1e-3).requires_grad_(False)
    x = guarded(random(13, 24, dtype=torch.bfloat16))
    expected = F.layer_norm(pooled(x, lengths, "last"), [24], eps=1e-3)
    check(segment_pool(x, packed(lengths), "last", [24] * 3, norm), F.normalize(expected), [24] * 3)
    check(segment_pool(x, packed(lengths), "last", [24] * 3, norm, l2=False), expected, [24] * 3)


@pytest.mark.parametrize("lengths", [(0,), (3, 1, 0, 0), (0, 4), (2, 0, 5)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_sequences_of_no_tokens_are_zeros_and_read_nothing(mode: str, lengths: tuple[int, ...]) -> None:
    x, dims = guarded(random(sum(lengths), 24)), [24] * len(lengths)
    found = segment_pool(x, packed(lengths), mode, dims)
    assert torch.equal(found == 0, torch.tensor(lengths)[:, None].expand(-1, 24) == 0)
    assert_close(found, F.normalize(pooled(x, lengths, mode)))


def test_rows_that_lie_apart() -> None:
    x, dims = guarded(random(sum(LENGTHS), 80)[:, :60]), [60] * len(LENGTHS)
    for mode in MODES:
        found = segment_pool(x, packed(LENGTHS), mode, dims, config=Config(block_m=2))
        check(found, F.normalize(pooled(x, LENGTHS, mode)), dims)


@pytest.mark.parametrize("mode", MODES)
def test_rows_more_than_32_bits_apart(mode: str) -> None:
    near = random(3, 24, dtype=torch.float16)
    far = torch.empty(2**31 + 24, dtype=torch.float16).as_strided((3, 24), (2**30, 1)).copy_(near)
    found = segment_pool(far, packed((2, 1)), mode, [24, 24])
    assert_close(found, F.normalize(pooled(near, (2, 1), mode)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("row", range(4, 8))
def test_not_a_number_stays_in_its_sequence(row: int, mode: str) -> None:
    lengths, dims = (4, 4, 4, 1), [24] * 4
    x = random(13, 24)
    clean = segment_pool(guarded(x), packed(lengths), mode, dims, config=Config(block_m=2))
    x[row] = float("nan")
    found = segment_pool(guarded(x), packed(lengths), mode, dims, config=Config(block_m=2))
    if pooled(x, lengths, mode)[1].isnan().any():
        assert found[1].isnan().all()
    others = [0, 2, 3] if found[1].isnan().any() else [0, 1, 2, 3]
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_one_value_that_is_not_a_number_spoils_a_unit_vector(mode: str) -> None:
    x = random(5, 24)
    x[2, 3] = float("nan")
    assert segment_pool(guarded(x), packed((5,)), mode, [24]).isnan().all()
    plain = segment_pool(guarded(x), packed((5,)), mode, [24], l2=False)
    assert torch.equal(plain.isnan()[0], torch.arange(24) == 3)


def test_infinity_is_the_largest() -> None:
    x = random(5, 24)
    x[2, 3], x[4, 7] = float("inf"), float("-inf")
    found = segment_pool(guarded(x), packed((5,)), "max", [24], l2=False, config=Config(block_m=2))
    assert torch.equal(found.double(), pooled(x, (5,), "max"))


def test_what_is_not_contiguous_is_refused() -> None:
    with pytest.raises(ValueError, match="not contiguous"):
        segment_pool(random(4, 48)[:, ::2], packed((4,)), "mean", [24])
    with pytest.raises(ValueError, match="not contiguous"):
        segment_pool(random(4, 24), packed((4,)), "mean", [12], lambda vectors: vectors[:, ::2])
