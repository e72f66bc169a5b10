"""SIMD registers inside compiled loops, against numpy and torch in float64."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from triton_embed.kernels.loops import Loop, pointer
from triton_embed.kernels.simd import (
    COUNT,
    exp2,
    first,
    interleave,
    larger,
    largest,
    load,
    smaller,
    splat,
    store,
    tile,
    total,
    transpose,
)

NAN, INF = float("nan"), float("inf")
RUBBISH = 7e7  # stands where nobody may write
TILES = [(1, 1), (3, 1), (8, 2), (5, 3)]  # rows, registers of columns
_tile_1_1, _tile_3_1, _tile_8_2, _tile_5_3 = (tile(*shape, False) for shape in TILES)
_pairs_1_1, _pairs_3_1, _pairs_8_2, _pairs_5_3 = (tile(*shape, True) for shape in TILES)


@Loop
def _exp2(a: Any) -> None:
    for i in range(0, a[2], COUNT):
        store(exp2(load(a[0] + i * 4, 4)), a[1] + i * 4, 4)


@Loop
def _convert(a: Any) -> None:
    for i in range(0, a[4], COUNT):
        store(load(a[0] + i * a[1], a[1]), a[2] + i * a[3], a[3])


@Loop
def _operations(a: Any) -> None:
    x, y, out, numbers = load(a[0], 4), load(a[1], 4), a[2], pointer(a[3], np.float32)
    store(x + y, out, 4)
    store(x - y, out + 64, 4)
    store(x * y, out + 128, 4)
    store(x / y, out + 192, 4)
    store(larger(x, y), out + 256, 4)
    store(smaller(x, y), out + 320, 4)
    store(first(x, a[4], numbers[0]), out + 384, 4)
    store(splat(numbers[0]), out + 448, 4)
    numbers[1] = largest(x)
    numbers[2] = total(x)


@Loop
def _interleave(a: Any) -> None:
    store(interleave(a[0], a[1]), a[2], 4)


@Loop
def _transpose(a: Any) -> None:
    transpose(a[0], a[1], a[2], a[3], a[4])


@Loop
def _tiles(a: Any) -> None:
    if a[0] == 0:
        _tile_1_1(a[1], a[2], a[3], a[4], a[5], a[6], a[7])
    elif a[0] == 1:
        _tile_3_1(a[1], a[2], a[3], a[4], a[5], a[6], a[7])
    elif a[0] == 2:
        _tile_8_2(a[1], a[2], a[3], a[4], a[5], a[6], a[7])
    else:
        _tile_5_3(a[1], a[2], a[3], a[4], a[5], a[6], a[7])


@Loop
def _pair_tiles(a: Any) -> None:
    if a[0] == 0:
        _pairs_1_1(a[1], a[2], a[3], a[4], a[5], a[6], a[7])
    elif a[0] == 1:
        _pairs_3_1(a[1], a[2], a[3], a[4], a[5], a[6], a[7])
    elif a[0] == 2:
        _pairs_8_2(a[1], a[2], a[3], a[4], a[5], a[6], a[7])
    else:
        _pairs_5_3(a[1], a[2], a[3], a[4], a[5], a[6], a[7])


@Loop
def _plain_pair_tiles(a: Any) -> None:
    """The same again: compiled as for a CPU without products of bf16, and kept under another name."""
    if a[0] == 0:
        _pairs_1_1(a[1], a[2], a[3], a[4], a[5], a[6], a[7])
    elif a[0] == 1:
        _pairs_3_1(a[1], a[2], a[3], a[4], a[5], a[6], a[7])
    elif a[0] == 2:
        _pairs_8_2(a[1], a[2], a[3], a[4], a[5], a[6], a[7])
    else:
        _pairs_5_3(a[1], a[2], a[3], a[4], a[5], a[6], a[7])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of_bits(*bits: int) -> Tensor:
    return torch.from_numpy(np.array(bits, np.uint32).view(np.float32))


def powers(x: Tensor) -> Tensor:
    given = torch.zeros(-(-len(x) // COUNT) * COUNT)
    given[: len(x)] = x
    y = torch.empty_like(given)
    _exp2(0, given, y, len(given))
    return y[: len(x)].double()


@pytest.mark.parametrize(
    ("low", "high"), [(-126, 126), (-30, 30), (-1, 1), (-1e-3, 1e-3), (125, 126), (-126, -125)], ids=str
)
def test_powers_of_two_over_their_range(low: float, high: float) -> None:
    x = torch.linspace(low, high, 200_003)
    wanted = torch.exp2(x.double())
    assert ((powers(x) - wanted).abs() <= 3e-7 * wanted).all()


def test_powers_of_two_around_halves() -> None:
    """Where the whole part changes."""
    halves = torch.arange(-126, 126) + 0.5
    x = torch.cat([halves, *(torch.nextafter(halves, torch.tensor(end)) for end in (-INF, INF))])
    wanted = torch.exp2(x.double())
    assert ((powers(x) - wanted).abs() <= 3e-7 * wanted).all()


def test_whole_powers_of_two_are_exact() -> None:
    x = torch.arange(-126, 127).float()
    assert torch.equal(powers(x), torch.exp2(x.double()))


@pytest.mark.parametrize("far", [128.0, 129.0, 1e4, 1e10, 3e38, INF])
def test_powers_of_two_far_outside(far: float) -> None:
    """Infinite above, and below the least number that is not denormal."""
    assert powers(torch.tensor([far, -far])).tolist() == [INF, 2.0**-126]


def test_a_power_of_what_is_not_a_number_is_none() -> None:
    x = torch.zeros(COUNT)
    x[[1, 15]] = torch.cat([torch.tensor([NAN]), of_bits(0xFFFFFFFF)])
    found = powers(x)
    assert found[[1, 15]].isnan().all()
    assert (found[[0, *range(2, 15)]] == 1).all()


BITS = {
    "zeros": (0x00000000, 0x80000000),
    "ties": (0x3F808000, 0x3F818000, 0x3F828000, 0xBF808000, 0xBF818000, 0x00008000, 0x00018000, 0x80008000),
    "beside ties": (0x3F807FFF, 0x3F808001, 0x3F817FFF, 0x3F818001, 0xBF807FFF, 0xBF808001),
    "denormals": (0x00000001, 0x00007FFF, 0x00008001, 0x007FFFFF, 0x80000001, 0x807FFFFF, 0x00400000),
    "the largest": (0x7F7F0000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0xFF7F7FFF, 0xFF7FFFFF),
    "infinite": (0x7F800000, 0xFF800000),
    "not a number": (0x7FC00000, 0xFFC00000, 0x7F800001, 0x7F80FFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFF8000),
}


def rounded(x: Tensor) -> Tensor:
    found = torch.empty(-(-len(x) // COUNT) * COUNT, dtype=torch.bfloat16)
    given = torch.zeros(len(found))
    given[: len(x)] = x
    _convert(0, given, 4, found, 2, len(found))
    return found[: len(x)]


@pytest.mark.parametrize("bits", BITS.values(), ids=BITS)
def test_rounding_to_bf16_is_torchs(bits: tuple[int, ...]) -> None:
    x = of_bits(*bits)
    found, wanted = rounded(x), x.bfloat16()
    assert torch.equal(found.isnan(), x.isnan())
    numbers = ~x.isnan()
    assert torch.equal(found[numbers].view(torch.int16), wanted[numbers].view(torch.int16))


def test_rounding_of_any_bits_to_bf16_is_torchs() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32)
    x = torch.from_numpy(bits.view(np.float32))
    found, wanted = rounded(x), x.bfloat16()
    assert torch.equal(found.isnan(), x.isnan())
    assert torch.equal(found.nan_to_num(1, 2, 3).view(torch.int16), wanted.nan_to_num(1, 2, 3).view(torch.int16))


def test_every_bf16_number_is_read_as_it_is_and_comes_back() -> None:
    given = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16)
    wide, back = torch.empty(2**16), torch.empty_like(given)
    _convert(0, given, 2, wide, 4, 2**16)
    _convert(0, given, 2, back, 2, 2**16)
    numbers = ~given.isnan()
    assert torch.equal(wide.view(torch.int32), given.view(torch.int16).int() << 16)
    assert torch.equal(back[numbers].view(torch.int16), given[numbers].view(torch.int16))
    assert back[~numbers].isnan().all()


def operate(x: Tensor, y: Tensor, count: int = 0, other: float = 0.0) -> tuple[Tensor, Tensor]:
    out, numbers = torch.empty(8, COUNT), torch.tensor([other, 0.0, 0.0])
    _operations(0, x, y, out, numbers, count)
    return out, numbers[1:]


def test_arithmetic_of_registers() -> None:
    x, y = random(COUNT), random(COUNT, seed=1)
    out, _ = operate(x, y, other=2.5)
    assert torch.equal(out[:4], torch.stack([x + y, x - y, x * y, x / y]))
    assert torch.equal(out[4:6], torch.stack([torch.maximum(x, y), torch.minimum(x, y)]))
    assert (out[7] == 2.5).all()


def test_larger_and_smaller_keep_the_first_where_one_is_not_a_number() -> None:
    x = torch.tensor([NAN, 1.0, NAN, INF, -INF, 0.0, -INF, INF] * 2)
    y = torch.tensor([1.0, NAN, NAN, 1.0, 1.0, 0.0, INF, NAN] * 2)
    out, _ = operate(x, y)
    wanted_larger = torch.tensor([NAN, 1.0, NAN, INF, 1.0, 0.0, INF, INF] * 2)
    wanted_smaller = torch.tensor([NAN, 1.0, NAN, 1.0, -INF, 0.0, -INF, INF] * 2)
    assert torch.equal(out[4].nan_to_num(9), wanted_larger.nan_to_num(9))
    assert torch.equal(out[5].nan_to_num(9), wanted_smaller.nan_to_num(9))


@pytest.mark.parametrize("count", [-20, -1, *range(COUNT + 1), 17, 1000])
def test_the_first_numbers_stay_and_others_follow(count: int) -> None:
    x = random(COUNT)
    out, _ = operate(x, x, count, -INF)
    kept = torch.arange(COUNT) < count
    assert torch.equal(out[6], torch.where(kept, x, -INF))


def test_what_is_not_a_number_does_not_come_from_behind_the_first() -> None:
    out, _ = operate(torch.full((COUNT,), NAN), torch.ones(COUNT), 5, 3.0)
    assert out[6].isnan().tolist() == [True] * 5 + [False] * 11
    assert (out[6, 5:] == 3).all()


@pytest.mark.parametrize("place", range(COUNT))
def test_the_largest_and_the_total_see_every_place(place: int) -> None:
    x = -1 - random(COUNT).abs()
    x[place] = 500.0
    _, (found, summed) = operate(x, x)
    assert found == 500
    assert abs(summed - x.double().sum()) <= 1e-6 * x.double().abs().sum()
    x[place] = -INF
    _, (found, summed) = operate(x, x)
    assert found == x.max()
    assert summed == -INF
    x[place] = NAN
    _, (_, summed) = operate(x, x)
    assert summed.isnan()


def test_the_largest_of_nothing_but_infinity() -> None:
    _, (found, _) = operate(torch.full((COUNT,), -INF), torch.ones(COUNT))
    assert found == -INF


def test_interleaved_numbers_stand_side_by_side_bit_for_bit() -> None:
    """Of any two addresses, odd ones too; NaNs and their payload as they are."""
    numbers = np.random.default_rng(0).integers(0, 2**16, 50).astype(np.uint16)
    numbers[[3, 20]] = 0x7F81, 0xFFFF
    bits = torch.from_numpy(numbers)
    out = torch.empty(COUNT, dtype=torch.int32)
    for low, high in ((0, 16), (16, 0), (1, 20), (34, 33), (5, 5)):
        _interleave(0, bits[low:], bits[high:], out)
        wanted = torch.stack([bits[low : low + COUNT], bits[high : high + COUNT]], dim=1)
        assert torch.equal(out.view(torch.int16).view(COUNT, 2), wanted.view(torch.int16))


@pytest.mark.parametrize("rows", range(1, COUNT + 1))
def test_words_are_transposed_and_the_last_row_stands_for_missing_ones(rows: int) -> None:
    generator = np.random.default_rng(rows)
    x = torch.from_numpy(generator.integers(-(2**31), 2**31, (rows, 23), np.int32))
    y = torch.full((COUNT, 19), -5, dtype=torch.int32)
    _transpose(0, x, x.stride(0) * 4, rows, y, y.stride(0) * 4)
    wanted = x[:, :COUNT].T
    assert torch.equal(y[:, :rows], wanted)
    assert torch.equal(y[:, rows:COUNT], wanted[:, -1:].expand(-1, COUNT - rows))
    assert (y[:, COUNT:] == -5).all()


def test_words_are_transposed_from_odd_addresses() -> None:
    given = torch.arange(COUNT * 40).to(torch.int16)
    x = given[3:]
    y = torch.empty(COUNT, COUNT, dtype=torch.int32)
    _transpose(0, x, 38 * 2, COUNT, y, COUNT * 4)
    wanted = torch.stack([x[row * 38 :][: 2 * COUNT].clone().view(torch.int32) for row in range(COUNT)])
    assert torch.equal(y, wanted.T)


INNER = [0, 1, 2, 3, 7, 16, 31, 64, 257]


def assert_product(found: Tensor, x: Tensor, y: Tensor) -> None:
    """Within what sums in fp32 may be off; nothing around it."""
    x, y = x.double(), y.double()
    columns = y.shape[1]
    assert ((found[:, :columns] - x @ y).abs() <= (x.shape[1] + 2) * 2**-23 * (x.abs() @ y.abs())).all()
    assert (found[:, columns:] == RUBBISH).all()


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(("rows", "columns"), TILES, ids=str)
def test_products_of_tiles(rows: int, columns: int, inner: int) -> None:
    wide = columns * COUNT
    x, y = random(rows, inner + 3), random(inner + 1, wide + 5, seed=1)
    z = torch.full((rows, wide + 9), RUBBISH)
    strides = [4 * one.stride(0) for one in (x, y, z)]
    _tiles(0, TILES.index((rows, columns)), x, strides[0], y, strides[1], inner, z, strides[2])
    assert_product(z, x[:, :inner], y[:inner, :wide])


@pytest.fixture(params=["of this CPU", "of a CPU without bf16"])
def pair_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    if request.param == "of this CPU":
        yield _pair_tiles
    else:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        yield _plain_pair_tiles


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(("rows", "columns"), TILES, ids=str)
def test_products_of_tiles_of_pairs(rows: int, columns: int, inner: int, pair_tiles: Loop) -> None:
    """x lies at addresses that are no multiple of its words."""
    wide = columns * COUNT
    x = random(rows, 2 * inner + 5).bfloat16()[:, 1:]
    y = random(inner + 1, wide + 5, 2, seed=1).bfloat16()
    z = torch.full((rows, wide + 9), RUBBISH)
    strides = [one.itemsize * one.stride(0) for one in (x, y, z)]
    pair_tiles(0, TILES.index((rows, columns)), x, strides[0], y, strides[1], inner, z, strides[2])
    assert_product(z, x[:, : 2 * inner], y[:inner, :wide].transpose(1, 2).reshape(2 * inner, wide))


@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
def test_what_is_not_finite_stays_in_its_row_or_column_of_pairs(wrong: float, pair_tiles: Loop) -> None:
    for odd in (0, 1):
        x, y = torch.ones(3, 10).bfloat16(), torch.ones(5, COUNT, 2).bfloat16()
        x[1, 4 + odd] = wrong
        y[2, 6, odd] = wrong
        z = torch.empty(3, COUNT)
        pair_tiles(0, TILES.index((3, 1)), x, 20, y, 4 * COUNT, 5, z, 4 * COUNT)
        finite = torch.ones(3, COUNT, dtype=torch.bool)
        finite[1], finite[:, 6] = False, False
        assert torch.equal(z.isfinite(), finite)
        assert (z[finite] == 10).all()
