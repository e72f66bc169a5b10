"""CPU norms, rotary positions, gates and pooling against torch and transformers in float64."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from test_loops import before_guard_page
from torch import Tensor, nn
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from triton_embed.kernels.cpu import backend as cpu
from triton_embed.kernels.cpu import loops
from triton_embed.kernels.packed import Packed

FP32, BF16 = torch.float32, torch.bfloat16
WIDTHS = [*range(1, 49), 64, 384, 1000]
BOUNDS = {FP32: 2e-6, BF16: 2.0**-8}  # error relative to |expected| + 1
EPS = 1e-3
# dtypes of x and of the residual; the sum is rounded to the dtype of the residual
PAIRS = [(FP32, None), (BF16, None), (FP32, FP32), (BF16, BF16), (BF16, FP32), (FP32, BF16)]


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def random(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def strided(x: Tensor) -> Tensor:
    """Return the same rows as part of a wider tensor, with garbage between them."""
    wide = torch.full((len(x), x.shape[1] + 7), 1e9, dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def assert_close(result: Tensor, expected: Tensor) -> None:
    assert expected.dtype == torch.float64
    assert result.shape == expected.shape
    assert ((result.double() - expected).abs() <= BOUNDS[result.dtype] * (expected.abs() + 1)).all()


def weights(width: int, dtype: torch.dtype = FP32) -> tuple[Tensor, Tensor]:
    return random(width, dtype=dtype, seed=98), random(width, dtype=dtype, seed=99)


def float64_norm(kind: str, width: int, dtype: torch.dtype = FP32) -> nn.Module:
    weight, bias = weights(width, dtype)
    if kind == "rms":
        norm: nn.Module = nn.RMSNorm(width, eps=EPS, dtype=torch.float64)
    else:
        norm = nn.LayerNorm(width, eps=EPS, dtype=torch.float64)
        norm.bias.data = bias.double()
    norm.weight.data = weight.double()
    return norm.requires_grad_(False)


def apply_norm(
    kind: str, x: Tensor, residual: Tensor | None, indices: Tensor | None = None, dtype: torch.dtype = FP32
) -> tuple[Tensor, Tensor]:
    weight, bias = weights(x.shape[1], dtype)
    if kind == "rms":
        return cpu.add_rms_norm(x, residual, weight, EPS, indices)
    if kind == "layer":
        return cpu.add_layer_norm(x, residual, weight, bias, EPS, indices)
    return cpu.post_layer_norm(x, residual, weight, bias, EPS, indices)


@pytest.mark.parametrize(("dtype", "other"), PAIRS, ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_of_a_sum_and_the_sum(kind: str, dtype: torch.dtype, other: torch.dtype | None) -> None:
    """Check that the norm uses the rounded sum, which is passed on."""
    for width in WIDTHS:
        x = random(5, width, dtype=dtype)
        residual = None if other is None else random(5, width, dtype=other, seed=1)
        result, total = apply_norm(kind, x, residual)
        assert result.dtype == dtype
        if residual is None:
            assert total is x
        else:
            assert total.dtype == other
            assert torch.equal(total, (x.float() + residual.float()).to(other))
        assert_close(result, float64_norm(kind, width)(total.double()))


@pytest.mark.parametrize(("dtype", "other"), PAIRS, ids=str)
def test_post_norm_returns_both_dtypes(dtype: torch.dtype, other: torch.dtype | None) -> None:
    for width in WIDTHS:
        x = random(5, width, dtype=dtype)
        residual = None if other is None else random(5, width, dtype=other, seed=1)
        result, carried = apply_norm("post", x, residual)
        assert (result.dtype, carried.dtype) == (dtype, other or dtype)
        expected = float64_norm("layer", width)(x.double() + (0 if residual is None else residual.double()))
        assert_close(result, expected)
        assert_close(carried, expected)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("dtype", "other"), PAIRS[2:], ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer", "post"])
def test_norm_adds_the_selected_residual_rows(
    kind: str, dtype: torch.dtype, other: torch.dtype, index: torch.dtype
) -> None:
    """Select rows in any order and more than once, from strided tensors too."""
    indices = torch.tensor([6, 0, 2, 2, 6], dtype=index)
    for width in (1, 15, 16, 17, 384):
        x, residual = strided(random(5, width, dtype=dtype)), strided(random(7, width, dtype=other, seed=1))
        result, total = apply_norm(kind, x, residual, indices)
        summed = x.double() + torch.stack([residual[i] for i in (6, 0, 2, 2, 6)]).double()
        if kind == "post":
            expected = float64_norm("layer", width)(summed)
            assert_close(total, expected)
        else:
            assert_close(total, summed)
            expected = float64_norm(kind, width)(total.double())
        assert_close(result, expected)


@pytest.mark.parametrize(("dtype", "other"), PAIRS, ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer", "post"])
def test_strided_rows_give_the_same_result(kind: str, dtype: torch.dtype, other: torch.dtype | None) -> None:
    for width in (1, 3, 16, 31, 100):
        x = random(4, width, dtype=dtype)
        residual = None if other is None else random(4, width, dtype=other, seed=1)
        strided_results = apply_norm(kind, strided(x), None if residual is None else strided(residual))
        for dense_result, strided_result in zip(apply_norm(kind, x, residual), strided_results, strict=True):
            assert torch.equal(dense_result, strided_result)


@pytest.mark.parametrize("kind", ["rms", "layer", "post"])
def test_bf16_weights_and_a_broadcast_residual(kind: str) -> None:
    for width in (5, 40):
        x, residual = random(4, width), random(1, width, seed=1).expand(4, -1)
        result, _ = apply_norm(kind, x, residual, dtype=BF16)
        assert_close(
            result, float64_norm("rms" if kind == "rms" else "layer", width, BF16)(x.double() + residual.double())
        )


@pytest.mark.parametrize("mean", [1e3, -1e4])
def test_layer_norm_with_a_large_mean(mean: float) -> None:
    """Check that the variance is not a difference of two large sums, which would lose it."""
    for width in (17, 384):
        x = random(5, width) + mean
        expected = float64_norm("layer", width)(x.double())
        result, _ = apply_norm("layer", x, None)
        assert (result - expected).abs().max() < 1e-6 * abs(mean)


@pytest.mark.parametrize("magnitude", [1e-18, 1e-3, 1e6, 1e17])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_of_tiny_and_huge_numbers(kind: str, magnitude: float) -> None:
    x = random(5, 50) * magnitude
    assert_close(apply_norm(kind, x, None)[0], float64_norm(kind, 50)(x.double()))


def test_norm_of_a_zero_row() -> None:
    x = torch.zeros(2, 20)
    assert not apply_norm("rms", x, None)[0].any()
    assert torch.equal(apply_norm("layer", x, None)[0], weights(20)[1].expand(2, -1))


def rotated(
    qkv: Tensor, heads: tuple[int, int], cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None
) -> Tensor:
    """Rotate with torch and transformers in float64: [T,(H+G)*D]."""
    head_dim = 2 * cos.shape[1]
    parts = qkv.double().unflatten(1, (-1, head_dim)).split([heads[0], heads[1], heads[1]], dim=1)[:2]
    normed = []
    for part, weight in zip(parts, (q_weight, k_weight), strict=True):
        norm = nn.RMSNorm(head_dim, eps=EPS, dtype=torch.float64).requires_grad_(False)
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
def test_rotary_matches_float64(heads: tuple[int, int], normed: tuple[bool, bool], dtype: torch.dtype) -> None:
    """Rotate in place in a strided tensor, without changing v or the memory between rows."""
    for width in [x for x in WIDTHS if x % 2 == 0]:
        total, rotated_width = (heads[0] + 2 * heads[1]) * width, sum(heads) * width
        qkv = strided(random(5, total, dtype=dtype))
        before = qkv.clone()
        angles = 3 * random(5, width // 2, seed=1)
        cos, sin = angles.cos(), angles.sin()
        norm_weights = [
            random(width, dtype=dtype, seed=2 + n) if has_weight else None for n, has_weight in enumerate(normed)
        ]
        result = cpu.qk_norm_rope_(qkv, heads, cos, sin, *norm_weights, EPS)
        assert result.data_ptr() == qkv.data_ptr()
        assert_close(qkv[:, :rotated_width], rotated(before, heads, cos, sin, *norm_weights))
        assert torch.equal(qkv[:, rotated_width:], before[:, rotated_width:])
        assert (qkv.as_strided((4, 7), (total + 7, 1), total) == torch.tensor(1e9, dtype=dtype)).all()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_gate_matches_float64(dtype: torch.dtype) -> None:
    for width in WIDTHS:
        x = 3 * random(5, 2 * width, dtype=dtype)
        expected = F.silu(x[:, :width].double()) * x[:, width:].double()
        result = cpu.gated_activation(x)
        assert result.dtype == dtype
        assert_close(result, expected)
        assert torch.equal(cpu.gated_activation(strided(x)), result)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("magnitude", [20.0, 87.0, 88.5, 100.0, 1e4, 1e20, 1e36, 3e38])
def test_large_gate_saturates(magnitude: float, dtype: torch.dtype) -> None:
    """Check that the gate is fully open or fully closed, according to its sign."""
    for width in (3, 16, 21):
        gate = torch.tensor([magnitude, -magnitude] * width)[:width].to(dtype)
        x = torch.cat([gate, torch.full((width,), 0.5, dtype=dtype)])[None]
        assert_close(cpu.gated_activation(x)[0], F.silu(gate.double()) * 0.5)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_tiny_gate_is_halved(dtype: torch.dtype) -> None:
    x = torch.cat([torch.full((5,), 1e-30), torch.ones(5)])[None].to(dtype)
    assert (cpu.gated_activation(x).double() / (x[:, :5].double() / 2) - 1).abs().max() < BOUNDS[dtype]


def from_bits(bits: int, dtype: torch.dtype) -> Tensor:
    wide = torch.from_numpy(np.array([bits], np.uint32).view(np.float32))
    return wide if dtype == FP32 else (wide.view(torch.int32) >> 16).to(torch.int16).view(BF16)


NONFINITE = {
    "nan": 0x7FC00000,
    "nan written by a GPU": 0x7FFFFFFF,
    "negative nan": 0xFFFFFFFF,
    "inf": 0x7F800000,
    "-inf": 0xFF800000,
}
Poisoned = Callable[[Tensor, Tensor | None], list[Tensor]]


def _rotate(x: Tensor, residual: Tensor | None) -> list[Tensor]:
    angles = random(len(x), x.shape[1] // 2, seed=1)
    qkv = torch.cat([x, x, x], dim=1)
    return [cpu.qk_norm_rope_(qkv, (1, 1), angles.cos(), angles.sin(), weights(x.shape[1])[0], None, EPS)]


POISONED: dict[str, tuple[Poisoned, bool]] = {  # op, and whether it takes a residual
    **{
        kind: (lambda x, residual, kind=kind: list(apply_norm(kind, x, residual)), True)
        for kind in ("rms", "layer", "post")
    },
    "rotary": (_rotate, False),
    "gate": (lambda x, _: [cpu.gated_activation(torch.cat([x, torch.ones_like(x)], dim=1))], False),
    "up": (lambda x, _: [cpu.gated_activation(torch.cat([torch.ones_like(x), x], dim=1))], False),
}
CASES = [
    pytest.param(op, dtype, other, bits, id=f"{op}-{dtype}-{other}-{name}")
    for op, (_, summed) in POISONED.items()
    for dtype, other in PAIRS
    for name, bits in NONFINITE.items()
    if (summed or other is None) and not (op == "gate" and name == "-inf")  # a gate of -inf is closed
]


@pytest.mark.parametrize(("op", "dtype", "other", "bits"), CASES)
def test_nonfinite_values_stay_in_their_row_and_do_not_vanish(
    op: str, dtype: torch.dtype, other: torch.dtype | None, bits: int
) -> None:
    """Place the value in several columns, in x and in the residual."""
    apply, poison = POISONED[op][0], from_bits(bits, dtype)
    for width in (2, 16, 38):
        x = random(5, width, dtype=dtype)
        residual = None if other is None else random(5, width, dtype=other, seed=1)
        clean = apply(x, residual)
        for column in {0, width // 2, width - 1}:
            for target in (x, residual):
                if target is None:
                    continue
                poisoned = [None if tensor is None else tensor.clone() for tensor in (x, residual)]
                tensor = poisoned[0 if target is x else 1]
                assert tensor is not None
                tensor[2, column] = from_bits(bits, target.dtype)[0]
                assert tensor[2, column].isnan() == poison[0].isnan()
                for result, expected in zip(apply(*poisoned), clean, strict=True):
                    others = [0, 1, 3, 4]
                    assert torch.equal(result[others], expected[others])
                    assert not result[2].isfinite().all(), f"width {width}, column {column}: {result[2].tolist()}"


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("bits", NONFINITE.values(), ids=NONFINITE)
def test_norm_of_nonfinite_values_matches_torch(kind: str, bits: int) -> None:
    for width in (2, 20):
        x = random(1, width)
        x[0, 1] = from_bits(bits, FP32)[0]
        assert torch.equal(apply_norm(kind, x, None)[0].isnan(), float64_norm(kind, width)(x.double()).isnan())


OPS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    **{kind: (lambda x, y, kind=kind: apply_norm(kind, x, y)) for kind in ("rms", "layer", "post")},
    "rotary": lambda x, _: _rotate(x, None),
    "gate": lambda x, _: (cpu.gated_activation(x),),
}


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_no_out_of_bounds_reads_or_writes(op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = []

    def allocate_surrounded(x: Tensor, *shape: Any, dtype: torch.dtype | None = None) -> Tensor:
        shape = torch.Size(*shape) if not isinstance(shape[0], int) else torch.Size(shape)
        memory = torch.full((shape.numel() + 128,), 77.0, dtype=dtype or x.dtype)
        allocated.append(memory)
        return memory[64:-64].view(shape)

    for width in (2, 14, 16, 18, 46):
        x, residual = random(3, width, dtype=dtype), random(3, width, seed=1)
        expected = OPS[op](x, residual)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", allocate_surrounded)
            result = OPS[op](before_guard_page(x), before_guard_page(residual))
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    assert allocated or op == "rotary"
    for memory in allocated:
        assert (memory[:64] == 77).all()
        assert (memory[-64:] == 77).all()


@pytest.mark.parametrize("op", OPS)
def test_result_is_independent_of_scratch_and_threads(op: str) -> None:
    """Use enough work for three threads, and an odd number of rows."""
    x, residual = random(1501, 38, dtype=BF16), random(1501, 38, seed=1)
    expected = OPS[op](x, residual)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        with torch.inference_mode(), torch.inference_mode():
            loops.scratch(1000).fill_(float("nan"))
        result = OPS[op](x, residual)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("mode", ["mean", "max"])
@pytest.mark.parametrize("token", range(3))
def test_pooling_propagates_nan(token: int, mode: str) -> None:
    x = random(5, 20)
    x[1 + token, 7] = float("nan")
    result = cpu.segment_pool(x, Packed.from_lengths([1, 3, 1]), mode, [20] * 3)
    assert result[1].isnan().any()
    assert result[[0, 2]].isfinite().all()
