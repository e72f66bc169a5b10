"""Norms, rotary positions and gates of a CPU against torch and transformers in float64."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from test_loops import fenced
from torch import Tensor, nn
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from triton_embed.kernels import loops, ops, rows
from triton_embed.kernels.packed import Packed

FP32, BF16 = torch.float32, torch.bfloat16
WIDTHS = [*range(1, 49), 64, 384, 1000]
BOUNDS = {FP32: 2e-6, BF16: 2.0**-8}  # relative, and of 1
EPS = 1e-3
# dtype of x, of the residual; the sum is rounded to the latter
PAIRS = [(FP32, None), (BF16, None), (FP32, FP32), (BF16, BF16), (BF16, FP32), (FP32, BF16)]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def random(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def of_wider(x: Tensor) -> Tensor:
    """The same rows, of a wider tensor, with rubbish between them."""
    wide = torch.full((len(x), x.shape[1] + 7), 1e9, dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert wanted.dtype == torch.float64
    assert found.shape == wanted.shape
    assert ((found.double() - wanted).abs() <= BOUNDS[found.dtype] * (wanted.abs() + 1)).all()


def weights(width: int, dtype: torch.dtype = FP32) -> tuple[Tensor, Tensor]:
    return random(width, dtype=dtype, seed=98), random(width, dtype=dtype, seed=99)


def theirs(kind: str, width: int, dtype: torch.dtype = FP32) -> nn.Module:
    weight, bias = weights(width, dtype)
    if kind == "rms":
        norm: nn.Module = nn.RMSNorm(width, eps=EPS, dtype=torch.float64)
    else:
        norm = nn.LayerNorm(width, eps=EPS, dtype=torch.float64)
        norm.bias.data = bias.double()
    norm.weight.data = weight.double()
    return norm.requires_grad_(False)


def ours(
    kind: str, x: Tensor, residual: Tensor | None, places: Tensor | None = None, dtype: torch.dtype = FP32
) -> tuple[Tensor, Tensor]:
    weight, bias = weights(x.shape[1], dtype)
    if kind == "rms":
        return rows.add_rms_norm(x, residual, weight, EPS, places)
    if kind == "layer":
        return rows.add_layer_norm(x, residual, weight, bias, EPS, places)
    return rows.post_layer_norm(x, residual, weight, bias, EPS, places)


@pytest.mark.parametrize(("dtype", "other"), PAIRS, ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_norm_of_a_sum_and_the_sum(kind: str, dtype: torch.dtype, other: torch.dtype | None) -> None:
    """What is normed is the sum as it is carried on: rounded."""
    for width in WIDTHS:
        x = random(5, width, dtype=dtype)
        residual = None if other is None else random(5, width, dtype=other, seed=1)
        found, total = ours(kind, x, residual)
        assert found.dtype == dtype
        if residual is None:
            assert total is x
        else:
            assert total.dtype == other
            assert torch.equal(total, (x.float() + residual.float()).to(other))
        assert_close(found, theirs(kind, width)(total.double()))


@pytest.mark.parametrize(("dtype", "other"), PAIRS, ids=str)
def test_a_norm_that_comes_last_is_given_in_both_dtypes(dtype: torch.dtype, other: torch.dtype | None) -> None:
    for width in WIDTHS:
        x = random(5, width, dtype=dtype)
        residual = None if other is None else random(5, width, dtype=other, seed=1)
        found, carried = ours("post", x, residual)
        assert (found.dtype, carried.dtype) == (dtype, other or dtype)
        wanted = theirs("layer", width)(x.double() + (0 if residual is None else residual.double()))
        assert_close(found, wanted)
        assert_close(carried, wanted)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("dtype", "other"), PAIRS[2:], ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer", "post"])
def test_a_norm_adds_the_rows_it_is_told_to(
    kind: str, dtype: torch.dtype, other: torch.dtype, index: torch.dtype
) -> None:
    """Any of them, in any order, more than once; of wider tensors too."""
    places = torch.tensor([6, 0, 2, 2, 6], dtype=index)
    for width in (1, 15, 16, 17, 384):
        x, residual = of_wider(random(5, width, dtype=dtype)), of_wider(random(7, width, dtype=other, seed=1))
        found, total = ours(kind, x, residual, places)
        summed = x.double() + torch.stack([residual[place] for place in (6, 0, 2, 2, 6)]).double()
        if kind == "post":
            wanted = theirs("layer", width)(summed)
            assert_close(total, wanted)
        else:
            assert_close(total, summed)
            wanted = theirs(kind, width)(total.double())
        assert_close(found, wanted)


@pytest.mark.parametrize(("dtype", "other"), PAIRS, ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer", "post"])
def test_rows_of_a_wider_tensor_are_the_same_rows(kind: str, dtype: torch.dtype, other: torch.dtype | None) -> None:
    for width in (1, 3, 16, 31, 100):
        x = random(4, width, dtype=dtype)
        residual = None if other is None else random(4, width, dtype=other, seed=1)
        wide = ours(kind, of_wider(x), None if residual is None else of_wider(residual))
        for one, other_one in zip(ours(kind, x, residual), wide, strict=True):
            assert torch.equal(one, other_one)


@pytest.mark.parametrize("kind", ["rms", "layer", "post"])
def test_weights_may_be_bf16_and_one_row_serve_all(kind: str) -> None:
    for width in (5, 40):
        x, residual = random(4, width), random(1, width, seed=1).expand(4, -1)
        found, _ = ours(kind, x, residual, dtype=BF16)
        assert_close(found, theirs("rms" if kind == "rms" else "layer", width, BF16)(x.double() + residual.double()))


@pytest.mark.parametrize("mean", [1e3, -1e4])
def test_a_layer_norm_far_from_0(mean: float) -> None:
    """Which the difference of two large sums would lose."""
    for width in (17, 384):
        x = random(5, width) + mean
        wanted = theirs("layer", width)(x.double())
        found, _ = ours("layer", x, None)
        assert (found - wanted).abs().max() < 1e-6 * abs(mean)


@pytest.mark.parametrize("size", [1e-18, 1e-3, 1e6, 1e17])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_norm_of_small_and_large_numbers(kind: str, size: float) -> None:
    x = random(5, 50) * size
    assert_close(ours(kind, x, None)[0], theirs(kind, 50)(x.double()))


def test_a_row_of_zeros_has_a_norm() -> None:
    x = torch.zeros(2, 20)
    assert not ours("rms", x, None)[0].any()
    assert torch.equal(ours("layer", x, None)[0], weights(20)[1].expand(2, -1))


def rotated(
    qkv: Tensor, heads: tuple[int, int], cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None
) -> Tensor:
    """By torch and transformers in float64, [T,(H+G)*D]."""
    size = 2 * cos.shape[1]
    parts = qkv.double().unflatten(1, (-1, size)).split([heads[0], heads[1], heads[1]], dim=1)[:2]
    normed = []
    for part, weight in zip(parts, (q_weight, k_weight), strict=True):
        norm = nn.RMSNorm(size, eps=EPS, dtype=torch.float64).requires_grad_(False)
        if weight is not None:
            norm.weight.data = weight.double()
        normed.append((part if weight is None else norm(part)).transpose(0, 1)[None])
    angles = (torch.cat([x, x], dim=1).double()[None] for x in (cos, sin))
    return torch.cat([x[0].transpose(0, 1) for x in qwen3.apply_rotary_pos_emb(*normed, *angles)], dim=1).flatten(1)


HEADS = [(1, 1), (3, 1), (4, 2)]
NORMED = [(True, True), (False, False), (True, False), (False, True)]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("normed", NORMED, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_rotary_positions(heads: tuple[int, int], normed: tuple[bool, bool], dtype: torch.dtype) -> None:
    """In place, in rows of a wider tensor; values and what lies between rows stay."""
    for width in [x for x in WIDTHS if x % 2 == 0]:
        total, turned = (heads[0] + 2 * heads[1]) * width, sum(heads) * width
        qkv = of_wider(random(5, total, dtype=dtype))
        before = qkv.clone()
        angles = 3 * random(5, width // 2, seed=1)
        cos, sin = angles.cos(), angles.sin()
        given = [random(width, dtype=dtype, seed=2 + n) if own else None for n, own in enumerate(normed)]
        found = rows.qk_norm_rope_(qkv, heads, cos, sin, *given, EPS)
        assert found.data_ptr() == qkv.data_ptr()
        assert_close(qkv[:, :turned], rotated(before, heads, cos, sin, *given))
        assert torch.equal(qkv[:, turned:], before[:, turned:])
        assert (qkv.as_strided((4, 7), (total + 7, 1), total) == torch.tensor(1e9, dtype=dtype)).all()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_gate(dtype: torch.dtype) -> None:
    for width in WIDTHS:
        x = 3 * random(5, 2 * width, dtype=dtype)
        wanted = F.silu(x[:, :width].double()) * x[:, width:].double()
        found = rows.gated_activation(x)
        assert found.dtype == dtype
        assert_close(found, wanted)
        assert torch.equal(rows.gated_activation(of_wider(x)), found)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("size", [20.0, 87.0, 88.5, 100.0, 1e4, 1e20, 1e36, 3e38])
def test_a_large_gate_is_a_number(size: float, dtype: torch.dtype) -> None:
    """Open or shut, never the wrong way round."""
    for width in (3, 16, 21):
        gate = torch.tensor([size, -size] * width)[:width].to(dtype)
        x = torch.cat([gate, torch.full((width,), 0.5, dtype=dtype)])[None]
        assert_close(rows.gated_activation(x)[0], F.silu(gate.double()) * 0.5)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_small_gate_is_half_of_itself(dtype: torch.dtype) -> None:
    x = torch.cat([torch.full((5,), 1e-30), torch.ones(5)])[None].to(dtype)
    assert (rows.gated_activation(x).double() / (x[:, :5].double() / 2) - 1).abs().max() < BOUNDS[dtype]


def of_bits(bits: int, dtype: torch.dtype) -> Tensor:
    wide = torch.from_numpy(np.array([bits], np.uint32).view(np.float32))
    return wide if dtype == FP32 else (wide.view(torch.int32) >> 16).to(torch.int16).view(BF16)


WRONG = {
    "not a number": 0x7FC00000,
    "not a number, as a GPU writes it": 0x7FFFFFFF,
    "not a number with a sign": 0xFFFFFFFF,
    "infinite": 0x7F800000,
    "infinite below": 0xFF800000,
}
Poisoned = Callable[[Tensor, Tensor | None], list[Tensor]]


def _rotate(x: Tensor, residual: Tensor | None) -> list[Tensor]:
    angles = random(len(x), x.shape[1] // 2, seed=1)
    qkv = torch.cat([x, x, x], dim=1)
    return [rows.qk_norm_rope_(qkv, (1, 1), angles.cos(), angles.sin(), weights(x.shape[1])[0], None, EPS)]


POISONED: dict[str, tuple[Poisoned, bool]] = {  # and whether there is a residual
    **{kind: (lambda x, residual, kind=kind: list(ours(kind, x, residual)), True) for kind in ("rms", "layer", "post")},
    "rotary": (_rotate, False),
    "gate": (lambda x, _: [rows.gated_activation(torch.cat([x, torch.ones_like(x)], dim=1))], False),
    "up": (lambda x, _: [rows.gated_activation(torch.cat([torch.ones_like(x), x], dim=1))], False),
}
CASES = [
    pytest.param(op, dtype, other, bits, id=f"{op}-{dtype}-{other}-{name}")
    for op, (_, summed) in POISONED.items()
    for dtype, other in PAIRS
    for name, bits in WRONG.items()
    if (summed or other is None) and not (op == "gate" and name == "infinite below")  # which is shut
]


@pytest.mark.parametrize(("op", "dtype", "other", "bits"), CASES)
def test_what_is_not_finite_stays_in_its_row_and_does_not_vanish(
    op: str, dtype: torch.dtype, other: torch.dtype | None, bits: int
) -> None:
    """Wherever in its row it stands, in x or in the residual."""
    apply, poison = POISONED[op][0], of_bits(bits, dtype)
    for width in (2, 16, 38):
        x = random(5, width, dtype=dtype)
        residual = None if other is None else random(5, width, dtype=other, seed=1)
        clean = apply(x, residual)
        for place in {0, width // 2, width - 1}:
            for target in (x, residual):
                if target is None:
                    continue
                poisoned = [None if one is None else one.clone() for one in (x, residual)]
                one = poisoned[0 if target is x else 1]
                assert one is not None
                one[2, place] = of_bits(bits, target.dtype)[0]
                assert one[2, place].isnan() == poison[0].isnan()
                for found, right in zip(apply(*poisoned), clean, strict=True):
                    others = [0, 1, 3, 4]
                    assert torch.equal(found[others], right[others])
                    assert not found[2].isfinite().all(), f"width {width}, place {place}: {found[2].tolist()}"


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("bits", WRONG.values(), ids=WRONG)
def test_a_norm_of_what_is_not_finite_is_torchs(kind: str, bits: int) -> None:
    for width in (2, 20):
        x = random(1, width)
        x[0, 1] = of_bits(bits, FP32)[0]
        assert torch.equal(ours(kind, x, None)[0].isnan(), theirs(kind, width)(x.double()).isnan())


EVERY: dict[str, Callable[[Tensor, Tensor], Any]] = {
    **{kind: (lambda x, y, kind=kind: ours(kind, x, y)) for kind in ("rms", "layer", "post")},
    "rotary": lambda x, _: _rotate(x, None),
    "gate": lambda x, _: (rows.gated_activation(x),),
}


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("op", EVERY)
def test_nothing_is_written_around_results_nor_read_behind_what_is_given(
    op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def surrounded(x: Tensor, *shape: Any, dtype: torch.dtype | None = None) -> Tensor:
        shape = torch.Size(*shape) if not isinstance(shape[0], int) else torch.Size(shape)
        memory = torch.full((shape.numel() + 128,), 77.0, dtype=dtype or x.dtype)
        made.append(memory)
        return memory[64:-64].view(shape)

    for width in (2, 14, 16, 18, 46):
        x, residual = random(3, width, dtype=dtype), random(3, width, seed=1)
        wanted = EVERY[op](x, residual)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", surrounded)
            found = EVERY[op](fenced(x), fenced(residual))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert made or op == "rotary"
    for memory in made:
        assert (memory[:64] == 77).all()
        assert (memory[-64:] == 77).all()


@pytest.mark.parametrize("op", EVERY)
def test_neither_scratch_nor_the_number_of_threads_matters(op: str) -> None:
    """Work enough for three threads; an odd number of rows."""
    x, residual = random(1501, 38, dtype=BF16), random(1501, 38, seed=1)
    wanted = EVERY[op](x, residual)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        with torch.inference_mode(), torch.inference_mode():
            loops.scratch(1000).fill_(float("nan"))
        found = EVERY[op](x, residual)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("mode", ["mean", "max"])
@pytest.mark.parametrize("token", range(3))
def test_what_is_not_a_number_does_not_vanish_in_a_pool(token: int, mode: str) -> None:
    x = random(5, 20)
    x[1 + token, 7] = float("nan")
    found = ops.segment_pool(x, Packed.from_lengths([1, 3, 1]), mode, [20] * 3)
    assert found[1].isnan().any()
    assert found[[0, 2]].isfinite().all()
