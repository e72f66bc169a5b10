"""Every op at the families' sizes: random inputs, the call, and what it must move or compute."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.run import Run
from triton_embed.kernels.packed import Packed

Inputs = list[Any]
Call = Callable[..., Any]  # call(kernels, *inputs), where kernels is `run.ops`, `reference` or an equivalent


@dataclass(frozen=True)
class Maker:
    """Generator of random inputs on the run's device; the same seed gives the same values."""

    run: Run
    dtype: torch.dtype
    seed: int = 0

    def normal(self, *shape: int, about: float = 0.0, by: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=self._generator(len(shape)), device=self.run.device)
        return (values * by + about).to(dtype or self.dtype)

    def below(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=self._generator(7), device=self.run.device, dtype=torch.int32)

    def angles(self, tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
        turns = self.normal(tokens, head_dim // 2, by=3.0, dtype=torch.float32)
        return turns.cos(), turns.sin()

    def packed(self, lengths: Sequence[int]) -> Packed:
        return Packed.from_lengths(lengths, self.run.device)

    def _generator(self, salt: int) -> torch.Generator:
        return torch.Generator(self.run.device).manual_seed(1_000 * self.seed + salt)


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes:
        moved: Returns the bytes that must move through memory for the inputs and the output; None: every tensor once.
        compute: Returns the floating-point operations of a compute-bound op; None: the op is memory-bound.
        first_of: The part of the op that needs a kernel of its own, such as a head dim or an activation.
    """

    op: str
    name: str
    make: Callable[[Maker], Inputs]
    call: Call
    moved: Callable[[Inputs, Any], int] | None = None
    compute: Callable[[Inputs], float] | None = None
    timed: bool = True
    first_of: str = ""

    def bytes(self, inputs: Inputs, outputs: Any) -> int:
        return nbytes([*inputs, outputs]) if self.moved is None else self.moved(inputs, outputs)


def nbytes(values: Any) -> int:
    """Return the size in bytes of all tensors in a nested list or tuple."""
    if isinstance(values, Tensor):
        return values.numel() * values.element_size()
    return sum(map(nbytes, values)) if isinstance(values, list | tuple) else 0


def mixed(tokens: int, longest: int = 512) -> list[int]:
    """Return lengths of 8 to `longest` tokens, mostly short, that sum to `tokens`; the last may be shorter than 8."""
    lengths: list[int] = []
    for i in range(tokens):
        length = max(8, round(longest ** (((i * 0.618034) % 1.0) * 0.7 + 0.3)))
        lengths.append(min(length, tokens - sum(lengths)))
        if sum(lengths) == tokens:
            break
    return lengths


def cases(run: Run) -> list[Case]:
    """Return cases at the families' sizes; a dry run has few tokens and narrow rows."""
    tokens, scale = run.size(16_384, 48), run.size(1, 16)
    cases: list[Case] = []
    for family, size in (("0.6B", 1_024), ("1.5B", 1_536), ("7B", 4_096)):
        cases.append(rms(family, tokens, size // scale))
    cases += [norms("post_layer_norm", "bge-large", tokens, 1_024 // scale)]
    cases += [norms("add_layer_norm", "CLIP ViT-L", tokens, 1_024 // scale)]
    heads: tuple[tuple[str, int, int, int, bool], ...] = (
        ("Qwen3-0.6B", 16, 8, 128, True),
        ("gte-1.5B", 12, 2, 128, False),
        ("7B", 32, 8, 128, False),
        ("Qwen2-VL vision", 16, 16, 80, False),
    )
    cases += [rope(*shape, tokens=tokens) for shape in (heads[2:] if run.dry else heads)]
    cases.append(embed("bge-large", tokens, 1_024 // scale))
    for family, size in (("0.6B", 3_072), ("1.5B", 8_960), ("7B", 14_336)):
        cases.append(gated(family, tokens, size // scale))
    cases += [activation_case(kind, tokens, 4_096 // scale) for kind in ("gelu_erf", "quick_gelu", "gelu_tanh")]
    cases += [pool(mode, tokens, 1_024 // scale) for mode in ("mean", "cls", "last")]
    cases.append(pooled("Qwen3-0.6B", tokens, 16, 8, 128))
    cases.append(pooled("bge-large", tokens, 16, 16, 64))
    side = run.size(1_344, 56)
    cases.append(patchify_case("Qwen2-VL", side, 14, 2, 2))
    for count in (tokens, max(tokens // 32, 8)):
        for family, outputs, size, act in (
            ("bge-large", 4_096, 1_024, "gelu_erf"),
            ("CLIP ViT-L", 4_096, 1_024, "quick_gelu"),
            ("Qwen2-VL vision", 5_120, 1_280, "quick_gelu"),
        ):
            cases.append(linear_case(family, count, outputs // scale, size // scale, act))
    return cases


def attention_cases(run: Run) -> list[Case]:
    """Return untimed correctness cases: head dims, masks and lengths that reach every branch of the kernel."""
    lengths = [1, 2, 15, 63, 64, 65] + ([] if run.dry else [127, 128, 129, 300, 511, 1_024, 2_500])
    cases = []
    for heads, kv_heads, dim in ((16, 16, 64), (16, 8, 128), (12, 2, 128), (16, 16, 80), (4, 4, 256)):
        for causal, window, prefix in ((False, None, 0), (True, None, 0), (True, 48, 0), (True, None, 21)):
            if run.dry and (dim > 80 or window):
                continue
            cases.append(attention_case(lengths, heads, kv_heads, dim, causal, window, prefix))
    return cases


def copies(inputs: Inputs) -> Inputs:
    return [x.clone() if isinstance(x, Tensor) else x for x in inputs]


def rms(family: str, tokens: int, size: int) -> Case:
    def make(m: Maker) -> Inputs:
        return [m.normal(tokens, size), m.normal(tokens, size), m.normal(size, about=1.0, by=0.1)]

    return Case("add_rms_norm", f"{family} {tokens}x{size}", make, lambda k, x, r, w: k.add_rms_norm(x, r, w, 1e-6))


def norms(op: str, family: str, tokens: int, size: int) -> Case:
    def make(m: Maker) -> Inputs:
        weights = m.normal(size, about=1.0, by=0.1), m.normal(size, by=0.1)
        return [m.normal(tokens, size), m.normal(tokens, size, about=0.3), *weights]

    return Case(op, f"{family} {tokens}x{size}", make, lambda k, *x: getattr(k, op)(*x, 1e-12))


def rope(family: str, heads: int, kv_heads: int, dim: int, norm: bool, tokens: int) -> Case:
    def make(m: Maker) -> Inputs:
        weights = [m.normal(dim, about=1.0, by=0.1) for _ in range(2)] if norm else [None, None]
        return [m.normal(tokens, (heads + 2 * kv_heads) * dim), *m.angles(tokens, dim), *weights]

    def call(k: Any, qkv: Tensor, cos: Tensor, sin: Tensor, q: Tensor | None, w: Tensor | None) -> Any:
        return k.qk_norm_rope_(qkv, (heads, kv_heads), cos, sin, q, w, 1e-6)

    def moved(inputs: Inputs, _: Any) -> int:  # q and k are read and written, v is untouched
        return 2 * nbytes(inputs[0]) * (heads + kv_heads) // (heads + 2 * kv_heads) + nbytes(inputs[1:])

    name = f"{family} {tokens} tokens, {heads}+{kv_heads} heads of {dim}{', normed' if norm else ''}"
    return Case("qk_norm_rope_", name, make, call, moved)


def embed(family: str, tokens: int, size: int) -> Case:
    words, positions = 30_522, 512

    def make(m: Maker) -> Inputs:
        tables = [m.normal(rows, size) for rows in (words, positions, 2)]
        return [m.below(words, tokens), m.below(positions, tokens), *tables, m.normal(size, about=1.0), m.normal(size)]

    def call(k: Any, ids: Tensor, pos: Tensor, *tables: Tensor) -> Any:
        return k.embed_layer_norm(ids, pos, None, *tables, 1e-12)

    def moved(inputs: Inputs, outputs: Any) -> int:
        # Per token one word row is read and one row written; positions and types stay in the cache.
        return 2 * nbytes(outputs) + nbytes(inputs[:2])

    return Case("embed_layer_norm", f"{family} {tokens}x{size}", make, call, moved)


def gated(family: str, tokens: int, size: int) -> Case:
    return Case(
        *("gated_activation", f"{family} {tokens}x{size}"),
        lambda m: [m.normal(tokens, 2 * size)],
        lambda k, x: k.gated_activation(x),
    )


def activation_case(kind: str, tokens: int, size: int) -> Case:
    def make(m: Maker) -> Inputs:
        return [m.normal(tokens, size, by=2.0)]

    return Case("activation", f"{kind} {tokens}x{size}", make, lambda k, x: k.activation(x, kind), first_of=kind)


def pool(mode: str, tokens: int, size: int) -> Case:
    lengths = mixed(tokens)

    def make(m: Maker) -> Inputs:
        return [m.normal(tokens, size, about=0.2), m.packed(lengths)]

    def call(k: Any, x: Tensor, packed: Packed) -> Any:
        dims = [size] * (len(lengths) - 1) + [size // 2]
        return k.segment_pool(x, packed, mode, dims)

    # The other modes read one row per sequence, which is too short to time.
    return Case("segment_pool", f"{mode} {tokens}x{size}", make, call, timed=mode == "mean", first_of=mode)


def pooled(family: str, tokens: int, heads: int, kv_heads: int, dim: int) -> Case:
    lengths = mixed(tokens)

    def make(m: Maker) -> Inputs:
        packed = m.packed(lengths)
        return [m.normal(tokens, (heads + 2 * kv_heads) * dim), packed, packed.cu_seqlens[1:] - 1]

    def call(k: Any, qkv: Tensor, packed: Packed, rows: Tensor) -> Any:
        return k.pooled_attention(*_heads(qkv, heads, kv_heads), packed, rows, None, dim**-0.5)

    def moved(inputs: Inputs, outputs: Any) -> int:  # all keys and values, one query per sequence
        return nbytes(inputs[0]) * 2 * kv_heads // (heads + 2 * kv_heads) + 2 * nbytes(outputs)

    name = f"{family} {tokens} tokens, {heads}/{kv_heads} heads of {dim}"
    return Case("pooled_attention", name, make, call, moved, first_of=str(dim))


def attention_case(
    lengths: list[int], heads: int, kv_heads: int, dim: int, causal: bool, window: int | None, prefix: int
) -> Case:
    def make(m: Maker) -> Inputs:
        shared = (
            [m.normal(prefix, kv_heads, dim), m.normal(prefix, kv_heads, dim, about=0.1)] if prefix else [None, None]
        )
        return [m.normal(sum(lengths), (heads + 2 * kv_heads) * dim), m.packed(lengths), *shared]

    def call(k: Any, qkv: Tensor, packed: Packed, keys: Tensor | None, values: Tensor | None) -> Any:
        prefix_kv = None if keys is None else (keys, values)
        return k.varlen_attention(*_heads(qkv, heads, kv_heads), packed, causal, window, dim**-0.5, prefix_kv)

    mask = "causal" if causal else "full"
    extra = (f", window {window}" if window else "") + (f", prefix {prefix}" if prefix else "")
    name = f"{heads}/{kv_heads} heads of {dim}, {mask}{extra}"
    return Case("varlen_attention", name, make, call, first_of=str(dim))


def _heads(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    """Split one buffer into views q, k and v, as the engine does."""
    return qkv.view(len(qkv), heads + 2 * kv_heads, -1).split((heads, kv_heads, kv_heads), dim=1)


def patchify_case(family: str, side: int, patch: int, merge: int, frames: int) -> Case:
    def make(m: Maker) -> Inputs:
        image = m.below(256, side, side, 3).to(torch.uint8)
        return [
            image,
            *(torch.tensor(values, device=m.run.device) for values in ([0.48, 0.46, 0.41], [0.27, 0.26, 0.28])),
        ]

    def call(k: Any, image: Tensor, mean: Tensor, std: Tensor) -> Any:
        return k.patchify(image, patch, merge, frames, mean, std)

    return Case("patchify", f"{family} {side}x{side} pixels", make, call)


def linear_case(family: str, tokens: int, outputs: int, inputs: int, act: str) -> Case:
    def make(m: Maker) -> Inputs:
        return [m.normal(tokens, inputs), m.normal(outputs, inputs, by=inputs**-0.5), m.normal(outputs, by=0.1)]

    return Case(
        *("linear", f"{family} {tokens} tokens, {inputs} to {outputs}, {act}"),
        make,
        lambda k, x, w, b: k.linear(x, w, b, act),
        compute=lambda _: 2.0 * tokens * outputs * inputs,
    )
