"""SIMD registers inside compiled loops, against numpy and torch in float64."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from triton_embed.kernels.cpu.loops import Address, loop, pointer
from triton_embed.kernels.cpu.simd import (
    LANES,
    exp2,
    interleave,
    keep_first,
    larger,
    load,
    reduce_max,
    reduce_sum,
    smaller,
    splat,
    store,
    tile_product,
    transpose,
)

Loop = Callable[..., None]
NAN, INF = float("nan"), float("inf")
GARBAGE = 7e7  # fills memory that must not be written
TILES = [(1, 1), (3, 1), (8, 2), (5, 3)]  # rows, registers of columns
_tile_1_1, _tile_3_1, _tile_8_2, _tile_5_3 = (tile_product(*shape, False) for shape in TILES)
_pairs_1_1, _pairs_3_1, _pairs_8_2, _pairs_5_3 = (tile_product(*shape, True) for shape in TILES)


@loop
def _exp2(x: Address, y: Address, count: int) -> None:
    for i in range(0, count, LANES):
        store(exp2(load(x + i * 4, 4)), y + i * 4, 4)


@loop
def _convert(x: Address, x_itemsize: int, y: Address, y_itemsize: int, count: int) -> None:
    for i in range(0, count, LANES):
        store(load(x + i * x_itemsize, x_itemsize), y + i * y_itemsize, y_itemsize)


@loop
def _operations(a: Address, b: Address, out: Address, results: Address, count: int) -> None:
    x, y, numbers = load(a, 4), load(b, 4), pointer(results, np.float32)
    store(x + y, out, 4)
    store(x - y, out + 64, 4)
    store(x * y, out + 128, 4)
    store(x / y, out + 192, 4)
    store(larger(x, y), out + 256, 4)
    store(smaller(x, y), out + 320, 4)
    store(keep_first(x, count, numbers[0]), out + 384, 4)
    store(splat(numbers[0]), out + 448, 4)
    numbers[1] = reduce_max(x)
    numbers[2] = reduce_sum(x)


@loop
def _interleave(low: Address, high: Address, out: Address) -> None:
    store(interleave(low, high), out, 4)


@loop
def _transpose(x: Address, x_stride: int, rows: int, y: Address, y_stride: int) -> None:
    transpose(x, x_stride, rows, y, y_stride)


@loop
def _tiles(
    shape: int, x: Address, x_stride: int, y: Address, y_stride: int, inner: int, z: Address, z_stride: int
) -> None:
    if shape == 0:
        _tile_1_1(x, x_stride, y, y_stride, inner, z, z_stride)
    elif shape == 1:
        _tile_3_1(x, x_stride, y, y_stride, inner, z, z_stride)
    elif shape == 2:
        _tile_8_2(x, x_stride, y, y_stride, inner, z, z_stride)
    else:
        _tile_5_3(x, x_stride, y, y_stride, inner, z, z_stride)


@loop
def _pair_tiles(
    shape: int, x: Address, x_stride: int, y: Address, y_stride: int, inner: int, z: Address, z_stride: int
) -> None:
    if shape == 0:
        _pairs_1_1(x, x_stride, y, y_stride, inner, z, z_stride)
    elif shape == 1:
        _pairs_3_1(x, x_stride, y, y_stride, inner, z, z_stride)
    elif shape == 2:
        _pairs_8_2(x, x_stride, y, y_stride, inner, z, z_stride)
    else:
        _pairs_5_3(x, x_stride, y, y_stride, inner, z, z_stride)


@loop
def _plain_pair_tiles(
    shape: int, x: Address, x_stride: int, y: Address, y_stride: int, inner: int, z: Address, z_stride: int
) -> None:
    """Compile the same loop under another name, which is cached for a CPU without bf16 products."""
    if shape == 0:
        _pairs_1_1(x, x_stride, y, y_stride, inner, z, z_stride)
    elif shape == 1:
        _pairs_3_1(x, x_stride, y, y_stride, inner, z, z_stride)
    elif shape == 2:
        _pairs_8_2(x, x_stride, y, y_stride, inner, z, z_stride)
    else:
        _pairs_5_3(x, x_stride, y, y_stride, inner, z, z_stride)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def from_bits(*bits: int) -> Tensor:
    return torch.from_numpy(np.array(bits, np.uint32).view(np.float32))


def compute_exp2(x: Tensor) -> Tensor:
    padded = torch.zeros(-(-len(x) // LANES) * LANES)
    padded[: len(x)] = x
    y = torch.empty_like(padded)
    _exp2(0, x=padded, y=y, count=len(padded))
    return y[: len(x)].double()


@pytest.mark.parametrize(
    ("low", "high"), [(-126, 126), (-30, 30), (-1, 1), (-1e-3, 1e-3), (125, 126), (-126, -125)], ids=str
)
def test_exp2_over_its_range(low: float, high: float) -> None:
    x = torch.linspace(low, high, 200_003)
    expected = torch.exp2(x.double())
    assert ((compute_exp2(x) - expected).abs() <= 3e-7 * expected).all()


def test_exp2_around_halves() -> None:
    """Test where the integer part changes."""
    halves = torch.arange(-126, 126) + 0.5
    x = torch.cat([halves, *(torch.nextafter(halves, torch.tensor(end)) for end in (-INF, INF))])
    expected = torch.exp2(x.double())
    assert ((compute_exp2(x) - expected).abs() <= 3e-7 * expected).all()


def test_exp2_of_integers_is_exact() -> None:
    x = torch.arange(-126, 127).float()
    assert torch.equal(compute_exp2(x), torch.exp2(x.double()))


@pytest.mark.parametrize("far", [128.0, 129.0, 1e4, 1e10, 3e38, INF])
def test_exp2_far_outside_its_range(far: float) -> None:
    """Return infinity above the range, and the smallest normal number below it."""
    assert compute_exp2(torch.tensor([far, -far])).tolist() == [INF, 2.0**-126]


def test_exp2_of_nan_is_nan() -> None:
    x = torch.zeros(LANES)
    x[[1, 15]] = torch.cat([torch.tensor([NAN]), from_bits(0xFFFFFFFF)])
    result = compute_exp2(x)
    assert result[[1, 15]].isnan().all()
    assert (result[[0, *range(2, 15)]] == 1).all()


BITS = {
    "zeros": (0x00000000, 0x80000000),
    "ties": (0x3F808000, 0x3F818000, 0x3F828000, 0xBF808000, 0xBF818000, 0x00008000, 0x00018000, 0x80008000),
    "next to ties": (0x3F807FFF, 0x3F808001, 0x3F817FFF, 0x3F818001, 0xBF807FFF, 0xBF808001),
    "denormals": (0x00000001, 0x00007FFF, 0x00008001, 0x007FFFFF, 0x80000001, 0x807FFFFF, 0x00400000),
    "largest": (0x7F7F0000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0xFF7F7FFF, 0xFF7FFFFF),
    "inf": (0x7F800000, 0xFF800000),
    "nan": (0x7FC00000, 0xFFC00000, 0x7F800001, 0x7F80FFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFF8000),
}


def round_to_bf16(x: Tensor) -> Tensor:
    result = torch.empty(-(-len(x) // LANES) * LANES, dtype=torch.bfloat16)
    padded = torch.zeros(len(result))
    padded[: len(x)] = x
    _convert(0, x=padded, x_itemsize=4, y=result, y_itemsize=2, count=len(result))
    return result[: len(x)]


@pytest.mark.parametrize("bits", BITS.values(), ids=BITS)
def test_bf16_rounding_matches_torch(bits: tuple[int, ...]) -> None:
    x = from_bits(*bits)
    result, expected = round_to_bf16(x), x.bfloat16()
    assert torch.equal(result.isnan(), x.isnan())
    numbers = ~x.isnan()
    assert torch.equal(result[numbers].view(torch.int16), expected[numbers].view(torch.int16))


def test_bf16_rounding_of_random_bits_matches_torch() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32)
    x = torch.from_numpy(bits.view(np.float32))
    result, expected = round_to_bf16(x), x.bfloat16()
    assert torch.equal(result.isnan(), x.isnan())
    assert torch.equal(result.nan_to_num(1, 2, 3).view(torch.int16), expected.nan_to_num(1, 2, 3).view(torch.int16))


def test_every_bf16_number_survives_a_round_trip() -> None:
    values = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16)
    wide, back = torch.empty(2**16), torch.empty_like(values)
    _convert(0, x=values, x_itemsize=2, y=wide, y_itemsize=4, count=2**16)
    _convert(0, x=values, x_itemsize=2, y=back, y_itemsize=2, count=2**16)
    numbers = ~values.isnan()
    assert torch.equal(wide.view(torch.int32), values.view(torch.int16).int() << 16)
    assert torch.equal(back[numbers].view(torch.int16), values[numbers].view(torch.int16))
    assert back[~numbers].isnan().all()


def operate(x: Tensor, y: Tensor, count: int = 0, other: float = 0.0) -> tuple[Tensor, Tensor]:
    out, numbers = torch.empty(8, LANES), torch.tensor([other, 0.0, 0.0])
    _operations(0, a=x, b=y, out=out, results=numbers, count=count)
    return out, numbers[1:]


def test_register_arithmetic() -> None:
    x, y = random(LANES), random(LANES, seed=1)
    out, _ = operate(x, y, other=2.5)
    assert torch.equal(out[:4], torch.stack([x + y, x - y, x * y, x / y]))
    assert torch.equal(out[4:6], torch.stack([torch.maximum(x, y), torch.minimum(x, y)]))
    assert (out[7] == 2.5).all()


def test_larger_and_smaller_return_the_first_if_either_is_nan() -> None:
    x = torch.tensor([NAN, 1.0, NAN, INF, -INF, 0.0, -INF, INF] * 2)
    y = torch.tensor([1.0, NAN, NAN, 1.0, 1.0, 0.0, INF, NAN] * 2)
    out, _ = operate(x, y)
    expected_larger = torch.tensor([NAN, 1.0, NAN, INF, 1.0, 0.0, INF, INF] * 2)
    expected_smaller = torch.tensor([NAN, 1.0, NAN, 1.0, -INF, 0.0, -INF, INF] * 2)
    assert torch.equal(out[4].nan_to_num(9), expected_larger.nan_to_num(9))
    assert torch.equal(out[5].nan_to_num(9), expected_smaller.nan_to_num(9))


@pytest.mark.parametrize("count", [-20, -1, *range(LANES + 1), 17, 1000])
def test_keep_first_replaces_the_other_numbers(count: int) -> None:
    x = random(LANES)
    out, _ = operate(x, x, count, -INF)
    mask = torch.arange(LANES) < count
    assert torch.equal(out[6], torch.where(mask, x, -INF))


def test_keep_first_drops_nan_from_the_other_numbers() -> None:
    out, _ = operate(torch.full((LANES,), NAN), torch.ones(LANES), 5, 3.0)
    assert out[6].isnan().tolist() == [True] * 5 + [False] * 11
    assert (out[6, 5:] == 3).all()


@pytest.mark.parametrize("lane", range(LANES))
def test_reductions_read_every_lane(lane: int) -> None:
    x = -1 - random(LANES).abs()
    x[lane] = 500.0
    _, (maximum, summed) = operate(x, x)
    assert maximum == 500
    assert abs(summed - x.double().sum()) <= 1e-6 * x.double().abs().sum()
    x[lane] = -INF
    _, (maximum, summed) = operate(x, x)
    assert maximum == x.max()
    assert summed == -INF
    x[lane] = NAN
    _, (_, summed) = operate(x, x)
    assert summed.isnan()


def test_reduce_max_of_negative_infinities() -> None:
    _, (maximum, _) = operate(torch.full((LANES,), -INF), torch.ones(LANES))
    assert maximum == -INF


def test_interleave_is_bit_exact() -> None:
    """Test arbitrary addresses, unaligned ones too, and the payloads of NaN."""
    numbers = np.random.default_rng(0).integers(0, 2**16, 50).astype(np.uint16)
    numbers[[3, 20]] = 0x7F81, 0xFFFF
    bits = torch.from_numpy(numbers)
    out = torch.empty(LANES, dtype=torch.int32)
    for low, high in ((0, 16), (16, 0), (1, 20), (34, 33), (5, 5)):
        _interleave(0, low=bits[low:], high=bits[high:], out=out)
        expected = torch.stack([bits[low : low + LANES], bits[high : high + LANES]], dim=1)
        assert torch.equal(out.view(torch.int16).view(LANES, 2), expected.view(torch.int16))


@pytest.mark.parametrize("rows", range(1, LANES + 1))
def test_transpose_repeats_the_last_row_for_missing_rows(rows: int) -> None:
    generator = np.random.default_rng(rows)
    x = torch.from_numpy(generator.integers(-(2**31), 2**31, (rows, 23), np.int32))
    y = torch.full((LANES, 19), -5, dtype=torch.int32)
    _transpose(0, x=x, x_stride=x.stride(0) * 4, rows=rows, y=y, y_stride=y.stride(0) * 4)
    expected = x[:, :LANES].T
    assert torch.equal(y[:, :rows], expected)
    assert torch.equal(y[:, rows:LANES], expected[:, -1:].expand(-1, LANES - rows))
    assert (y[:, LANES:] == -5).all()


def test_transpose_from_unaligned_addresses() -> None:
    values = torch.arange(LANES * 40).to(torch.int16)
    x = values[3:]
    y = torch.empty(LANES, LANES, dtype=torch.int32)
    _transpose(0, x=x, x_stride=38 * 2, rows=LANES, y=y, y_stride=LANES * 4)
    expected = torch.stack([x[row * 38 :][: 2 * LANES].clone().view(torch.int32) for row in range(LANES)])
    assert torch.equal(y, expected.T)


INNER = [0, 1, 2, 3, 7, 16, 31, 64, 257]


def assert_product(result: Tensor, x: Tensor, y: Tensor) -> None:
    """Check the product within fp32 rounding error, and that nothing around it was written."""
    x, y = x.double(), y.double()
    columns = y.shape[1]
    assert ((result[:, :columns] - x @ y).abs() <= (x.shape[1] + 2) * 2**-23 * (x.abs() @ y.abs())).all()
    assert (result[:, columns:] == GARBAGE).all()


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(("rows", "columns"), TILES, ids=str)
def test_tile_product(rows: int, columns: int, inner: int) -> None:
    width = columns * LANES
    x, y = random(rows, inner + 3), random(inner + 1, width + 5, seed=1)
    z = torch.full((rows, width + 9), GARBAGE)
    strides = {"x_stride": x.stride(0) * 4, "y_stride": y.stride(0) * 4, "z_stride": z.stride(0) * 4}
    _tiles(0, shape=TILES.index((rows, columns)), x=x, y=y, inner=inner, z=z, **strides)
    assert_product(z, x[:, :inner], y[:inner, :width])


@pytest.fixture(params=["this CPU", "CPU without bf16"])
def pair_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    if request.param == "this CPU":
        yield _pair_tiles
    else:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        yield _plain_pair_tiles


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(("rows", "columns"), TILES, ids=str)
def test_tile_product_of_bf16_pairs(rows: int, columns: int, inner: int, pair_tiles: Loop) -> None:
    """Test addresses of x that are not multiples of a word."""
    width = columns * LANES
    x = random(rows, 2 * inner + 5).bfloat16()[:, 1:]
    y = random(inner + 1, width + 5, 2, seed=1).bfloat16()
    z = torch.full((rows, width + 9), GARBAGE)
    strides = {f"{name}_stride": t.itemsize * t.stride(0) for name, t in (("x", x), ("y", y), ("z", z))}
    pair_tiles(0, shape=TILES.index((rows, columns)), x=x, y=y, inner=inner, z=z, **strides)
    assert_product(z, x[:, : 2 * inner], y[:inner, :width].transpose(1, 2).reshape(2 * inner, width))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_nonfinite_values_stay_in_their_row_and_column(value: float, pair_tiles: Loop) -> None:
    for odd in (0, 1):
        x, y = torch.ones(3, 10).bfloat16(), torch.ones(5, LANES, 2).bfloat16()
        x[1, 4 + odd] = value
        y[2, 6, odd] = value
        z = torch.empty(3, LANES)
        pair_tiles(
            0, shape=TILES.index((3, 1)), x=x, x_stride=20, y=y, y_stride=4 * LANES, inner=5, z=z, z_stride=4 * LANES
        )
        finite = torch.ones(3, LANES, dtype=torch.bool)
        finite[1], finite[:, 6] = False, False
        assert torch.equal(z.isfinite(), finite)
        assert (z[finite] == 10).all()
