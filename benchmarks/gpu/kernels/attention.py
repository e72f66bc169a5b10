"""Benchmark of attention over packed tokens, compared with libraries on the same device.

The libraries are SDPA's flash and cuDNN backends, and FlashAttention-2 and cuDNN over variable lengths. Each case gives
one row: milliseconds and TFLOP/s per engine, each engine's time as a multiple of ours, and whether our result is right.
If a library does not support grouped heads, it gets repeated keys and values; the repetition is not timed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.kernels.accuracy import exact, judge
from benchmarks.gpu.kernels.cases import Maker, mixed, nbytes
from benchmarks.gpu.run import Row, Run, attempt
from triton_embed.kernels import reference
from triton_embed.kernels.packed import Packed

SDPA = {"sdpa-flash": SDPBackend.FLASH_ATTENTION, "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION}
MAX_DIFFERENCE = 2e-2  # relative, between two kernels in bf16
MAX_SCORE_BYTES = 6e9  # for the float64 scores of the checked heads


@dataclass(frozen=True)
class Case:
    """One attention problem. `group`: the target that it counts for."""

    group: str
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    dim: int
    causal: bool

    @property
    def name(self) -> str:
        equal_lengths = len(set(self.lengths)) == 1
        length = (
            f"{len(self.lengths)}x{self.lengths[0]}"
            if equal_lengths
            else f"{len(self.lengths)} of {min(self.lengths)}-{max(self.lengths)}"
        )
        return (
            f"{length} tokens, {self.heads}/{self.kv_heads} heads of {self.dim}, {'causal' if self.causal else 'full'}"
        )

    @property
    def flop(self) -> float:
        pairs = sum(n * (n + 1) / 2 if self.causal else n * n for n in self.lengths)
        return 4.0 * self.heads * self.dim * pairs

    @property
    def scale(self) -> float:
        return float(self.dim**-0.5)


def cases(run: Run) -> list[Case]:
    tokens = run.size(16_384, 128)
    lengths = (32, 64) if run.dry else (512, 1_024, 2_048, 4_096, 16_384)
    cases = []
    for length in lengths:
        equal = (length,) * (tokens // length)
        cases.append(Case("d64 full", equal, 16, 16, 64, False))
        cases.append(Case("d128 full", equal, 16, 16, 128, False))
        cases.append(Case("d128 causal", equal, 16, 16, 128, True))
        cases.append(Case("d128 causal GQA", equal, 16, 8, 128, True))
    patches = run.size(1_024, 64)  # of 448 x 448 pixels
    cases.append(Case("d80 vision", (patches,) * (tokens // patches), 16, 16, 80, False))
    mixed_lengths, short_lengths = tuple(mixed(tokens)), tuple(8 + i % 15 for i in range(tokens // 15))
    for group, group_lengths in (("mixed lengths", mixed_lengths), ("short queries", short_lengths)):
        cases.append(Case(group, group_lengths, 16, 16, 64, False))
        cases.append(Case(group, group_lengths, 16, 8, 128, True))
    return cases


def attention(run: Run) -> Iterator[Row]:
    for case in cases(run):
        about = {"group": case.group, "case": case.name, "longest": max(case.lengths)}
        yield attempt(about, lambda case=case: _measure(run, case))  # type: ignore[misc]


@torch.inference_mode()
def _measure(run: Run, case: Case) -> Row:
    width = (case.heads + 2 * case.kv_heads) * case.dim
    tokens = sum(case.lengths)
    size = tokens * width * 2
    count = run.timer.sets(size)
    packed = Packed.from_lengths(case.lengths, run.device)
    buffers = [Maker(run, torch.bfloat16, seed).normal(tokens, width) for seed in range(count)]
    sets = [_split(case, buffer) for buffer in buffers]
    verdict = _check(run, case, sets[0], packed)
    times: dict[str, Any] = {"ours": run.timer.device_ms(_ours(run, case, sets, packed), count)}
    expected = reference.varlen_attention(*sets[0], packed, case.causal, None, case.scale)
    for name, make in _rivals(run, case, packed).items():
        times[name] = attempt({}, lambda make=make: _rival(run, case, make(sets), count, expected))  # type: ignore[misc]
    again = run.timer.device_ms(_ours(run, case, sets, packed), count)["median_ms"]
    ours = times["ours"]["median_ms"]
    medians_ms = {name: timing["median_ms"] for name, timing in times.items() if "median_ms" in timing}
    return verdict | {
        "times": times,
        "again": again / ours,
        "bytes": nbytes(buffers[0]) + tokens * case.heads * case.dim * 2,
        "tflops": {name: case.flop / ms / 1e9 for name, ms in medians_ms.items()},
        "ours_times": {name: ms / ours for name, ms in medians_ms.items() if name != "ours"},
    }


def _rival(run: Run, case: Case, call: Callable[[int], Any], count: int, expected: Tensor) -> Row:
    """Time a rival.

    Raises:
        ValueError: If its result differs from plain torch, because its speed would then be meaningless.
    """
    result = call(0)
    out = result if isinstance(result, Tensor) else result[0]
    if out.dim() == 4:  # [B,H,S,D]
        out = out.transpose(1, 2).flatten(0, 1)
    difference = float((out.float() - expected.float()).norm() / expected.float().norm())
    if not difference <= MAX_DIFFERENCE:
        raise ValueError(f"result differs from plain torch: relative error {difference:.1e}")
    return run.timer.device_ms(call, count)


def _split(case: Case, qkv: Tensor) -> tuple[Tensor, ...]:
    """Split one buffer into views q, k and v, as the engine does."""
    return qkv.view(len(qkv), -1, case.dim).split((case.heads, case.kv_heads, case.kv_heads), dim=1)


def _check(run: Run, case: Case, qkv: tuple[Tensor, ...], packed: Packed) -> Row:
    """Check against float64 for as many head groups as fit in memory; heads are independent of each other."""
    group = case.heads // case.kv_heads
    scores = max(8 * n * n * case.lengths.count(n) for n in set(case.lengths)) * group
    groups = max(1, min(case.kv_heads, int(MAX_SCORE_BYTES / scores)))
    outputs = run.ops.varlen_attention(*qkv, packed, case.causal, None, case.scale)
    q, k, v = qkv[0][:, : groups * group], qkv[1][:, :groups], qkv[2][:, :groups]
    torch_outputs = reference.varlen_attention(q, k, v, packed, case.causal, None, case.scale)
    truth = exact(reference.varlen_attention, q, k, v, packed, case.causal, None, case.scale)
    return judge(outputs[:, : groups * group], truth, torch_outputs, q.dtype)


def _ours(run: Run, case: Case, sets: list[tuple[Tensor, ...]], packed: Packed) -> Callable[[int], object]:
    return lambda i: run.ops.varlen_attention(*sets[i], packed, case.causal, None, case.scale)


Make = Callable[[list[tuple[Tensor, ...]]], Callable[[int], object]]


def _rivals(run: Run, case: Case, packed: Packed) -> dict[str, Make]:
    """Return the libraries that support these lengths; on a CPU, only torch's default SDPA backend."""
    if run.device.type == "cpu":
        return {"sdpa": lambda sets: _sdpa(case, sets, None)} if len(set(case.lengths)) == 1 else {}
    variable: dict[str, Make] = {
        "fa2-varlen": lambda sets: _flash_varlen(case, sets, packed),
        "cudnn-varlen": lambda sets: _cudnn_varlen(case, sets, packed),
    }
    if len(set(case.lengths)) > 1:
        return variable
    dense: dict[str, Make] = {
        name: lambda sets, backend=backend: _sdpa(case, sets, backend)  # type: ignore[misc]
        for name, backend in SDPA.items()
    }
    return dense | variable


def _sdpa(case: Case, sets: list[tuple[Tensor, ...]], backend: SDPBackend | None) -> Callable[[int], object]:
    dense = [tuple(_dense(case, x) for x in qkv) for qkv in sets]

    def call(i: int) -> object:
        q, k, v = dense[i]
        if backend is None:
            return scaled_dot_product_attention(q, k, v, is_causal=case.causal, scale=case.scale)
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=case.causal, scale=case.scale)

    return call


def _dense(case: Case, x: Tensor) -> Tensor:
    """Return a contiguous [B,H,S,D] copy with grouped heads repeated."""
    rows = x.unflatten(0, (len(case.lengths), case.lengths[0]))
    return rows.repeat_interleave(case.heads // x.shape[1], dim=2).transpose(1, 2).contiguous()


def _flash_varlen(case: Case, sets: list[tuple[Tensor, ...]], packed: Packed) -> Callable[[int], object]:
    """Call FlashAttention-2 as torch's varlen_attn does; its first ten arguments are unchanged since torch 2.1."""
    longest, cu_seqlens = max(case.lengths), packed.cu_seqlens
    dense = [tuple(x.contiguous() for x in qkv) for qkv in sets]
    flash = torch.ops.aten._flash_attention_forward
    return lambda i: flash(
        *dense[i], cu_seqlens, cu_seqlens, longest, longest, 0.0, case.causal, False, scale=case.scale
    )


def _cudnn_varlen(case: Case, sets: list[tuple[Tensor, ...]], packed: Packed) -> Callable[[int], object]:
    longest, cu_seqlens = max(case.lengths), packed.cu_seqlens
    dense = [tuple(x.repeat_interleave(case.heads // x.shape[1], dim=1).contiguous() for x in qkv) for qkv in sets]
    cudnn = torch.ops.aten._cudnn_attention_forward
    return lambda i: cudnn(
        *dense[i], None, cu_seqlens, cu_seqlens, longest, longest, True, 0.0, case.causal, False, scale=case.scale
    )
