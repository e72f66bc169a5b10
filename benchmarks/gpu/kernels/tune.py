"""Block size tuning: time a small grid of configs, reject those that fail or are wrong, and store the fastest.

A config that is clearly faster than the current one is written to `kernels/tables/<architecture>.json` and to a copy
next to the results, because a temporary machine keeps nothing. Each table entry gives one row: the old config and the
new one, with milliseconds.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks.gpu.kernels.accuracy import exact, judge
from benchmarks.gpu.kernels.cases import (
    Case,
    Maker,
    activation_case,
    attention_case,
    copies,
    gated,
    linear_case,
    mixed,
    nbytes,
    norms,
    pool,
    pooled,
    rms,
    rope,
)
from benchmarks.gpu.kernels.ops import LeftToTorch
from benchmarks.gpu.run import Row, Run, attempt
from triton_embed.kernels import reference
from triton_embed.kernels.gpu import blocks
from triton_embed.kernels.gpu.blocks import Config

MAX_TIME_RATIO = 0.97  # new time / old time; a smaller gain is noise
LARGEST_BLOCK = 16_384  # values held by the warps of one program
# (block_m, block_n, warps, stages)
ATTENTION = {
    64: ((128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2)),
    80: ((128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2), (64, 32, 4, 3), (128, 64, 4, 2)),
    128: ((128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2), (128, 128, 8, 2)),
    256: ((128, 32, 8, 2), (64, 32, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2)),
}
# (block_m, block_n, block_k, warps, stages)
FEW_TOKENS = ((16, 64, 128, 4, 4), (32, 64, 128, 4, 4), (32, 32, 128, 4, 4), (64, 64, 64, 4, 4), (64, 128, 64, 4, 4))
MANY_TOKENS = ((128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 32, 8, 4), (128, 64, 64, 4, 4))
LINEAR_TOKENS = (32, 128, 512, 2_048, 16_384)
LINEAR_SIZES = ((1_536, 384), (3_072, 768), (4_096, 1_024), (5_120, 1_280), (5_120, 5_120))  # outputs, inputs
WIDTHS = (128, 512, 1_024, 2_048, 4_096)
HEAD_DIMS = (64, 80, 128, 256)


@dataclass(frozen=True)
class Entry:
    """One table entry: the sizes it applies to, the cases that are timed, and the configs that are tried.

    `torch`: whether falling back to torch is one of the choices.
    """

    kernel: str
    up_to: Mapping[str, int]
    cases: Sequence[Case]
    configs: Sequence[Config]
    torch: bool = False


class Configured:
    """The Triton kernels with one fixed config; on a CPU (dry run) plain torch, which ignores it."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self._config, self._device = config, device

    def __getattr__(self, name: str) -> Any:
        if self._device.type == "cpu":
            return getattr(reference, name)
        from triton_embed.kernels.gpu import backend as accelerated

        return partial(getattr(accelerated, name), config=self._config)


def tune(run: Run) -> Iterator[Row]:
    table = blocks.table_for(run.device)
    file = blocks.DIRECTORY / f"{table.architecture}.json"
    entries_by_kernel: dict[str, list[dict[str, Any]]] = json.loads(file.read_text())
    todo = entries(run)
    for i, entry in enumerate(todo):
        about = {"kernel": entry.kernel, "up_to": dict(entry.up_to)}
        share = run.seconds_left / (len(todo) - i)
        row = attempt(about, lambda entry=entry, share=share: _tune(run, entry, table, share))  # type: ignore[misc]
        if row.get("changed"):
            insert_entry(entries_by_kernel.setdefault(entry.kernel, []), entry.up_to, row["new"])
        yield row
    table_json = table_to_json(entries_by_kernel)
    (run.out / file.name).write_text(table_json)
    if not run.dry:
        file.write_text(table_json)
    blocks.table_for.cache_clear()
    blocks.load_table.cache_clear()


def entries(run: Run) -> list[Entry]:
    """Return all table entries to tune, the most important first."""
    tokens, scale = run.size(16_384, 48), run.size(1, 16)
    entries = [_attention(run, tokens, dim) for dim in (HEAD_DIMS[:2] if run.dry else HEAD_DIMS)]
    for kernel, sizes, cases in (
        (
            "elementwise",
            {},
            [gated("", tokens, 3_072 // scale), activation_case("gelu_erf", tokens, 64)],
        ),
        ("rotary", {"half": 32}, [rope("", 16, 8, 64, True, tokens)]),
        ("rotary", {"half": 40}, [rope("", 16, 16, 80, False, tokens)]),
        ("rotary", {"half": 64}, [rope("", 16, 8, 128, True, tokens)]),
    ):
        configs = _elementwise() if kernel == "elementwise" else _rows(2 * sizes["half"], (1, 2, 4, 8))
        entries.append(Entry(kernel, sizes, cases, configs))
    for width in WIDTHS[:2] if run.dry else WIDTHS:
        cases = [rms("", tokens, width), norms("post_layer_norm", "", tokens, width)]
        entries.append(Entry("rowwise", {"width": width}, cases, _rows(width, (1, 2, 4, 8))))
    for width in WIDTHS[2:3] if run.dry else WIDTHS[1:]:
        entries.append(Entry("pooling", {"width": width}, [pool("mean", tokens, width)], _rows(width, (4, 8, 16))))
    for dim in (64,) if run.dry else (64, 128):
        cases = [pooled("", tokens, 16, 16 if dim == 64 else 8, dim)]
        configs = [Config(16, n, 1, warps, stages) for n, warps, stages in product((32, 64, 128), (2, 4), (2, 3))]
        entries.append(Entry("pooled_attention", {"itemsize": 2, "head_dim": dim}, cases, configs))
    entries += _linear(run)
    return entries


def _attention(run: Run, tokens: int, dim: int) -> Entry:
    """Return the attention entry of one head dim, timed on long sequences and on a realistic mix of lengths."""
    causal = dim in (128, 256)
    heads, kv_heads = (16, 8) if causal else (16, 16)
    lengths = [run.size(2_048, 24)] * (tokens // run.size(2_048, 24))
    cases = [
        attention_case(case_lengths, heads, kv_heads, dim, causal, None, 0) for case_lengths in (lengths, mixed(tokens))
    ]
    configs = [Config(m, n, 1, warps, stages) for m, n, warps, stages in ATTENTION[dim]]
    return Entry("attention", {"itemsize": 2, "head_dim": dim}, cases, configs)


def _rows(width: int, warps: Sequence[int]) -> list[Config]:
    block = 1 << (width - 1).bit_length()
    candidates = product((1, 2, 4, 8, 16, 32, 64), [*warps, *([16] if width > 2_048 else [])])
    # 4 to 64 values per thread.
    return [
        Config(m, num_warps=w) for m, w in candidates if m * block <= LARGEST_BLOCK and 4 <= m * block / (32 * w) <= 64
    ]


def _elementwise() -> list[Config]:
    candidates = product((1, 2, 4, 8), (256, 512, 1_024, 2_048), (4, 8))
    return [Config(m, n, num_warps=w) for m, n, w in candidates if 8 <= m * n / (32 * w) <= 32]


def _linear(run: Run) -> list[Entry]:
    """Return the linear entries ordered by tokens, because the first matching entry wins (see `insert_entry`)."""
    entries = []
    sizes = ((64, 32),) if run.dry else LINEAR_SIZES
    for tokens in (16, 48) if run.dry else LINEAR_TOKENS:
        configs = [Config(*config) for config in (FEW_TOKENS if tokens <= 512 else MANY_TOKENS)]
        for outputs, inputs in sizes:
            up_to = {"itemsize": 2, "tokens": tokens if tokens < max(LINEAR_TOKENS) else 1 << 30}
            up_to |= {"outputs": outputs, "inputs": inputs}
            case = linear_case("", tokens, outputs, inputs, "gelu_erf")
            entries.append(Entry("linear", up_to, [case], configs, torch=True))
    return entries


def _tune(run: Run, entry: Entry, table: blocks.Table, seconds: float) -> Row:
    """Time the old config first, then the others until `seconds` have passed."""
    stop = time.monotonic() + seconds
    sizes = {**dict.fromkeys(("tokens", "outputs", "inputs", "width", "itemsize", "half"), 1), **entry.up_to}
    old = table.find_config(entry.kernel, **sizes)
    trials = [_Trial(run, case) for case in entry.cases]
    choices: list[Config | None] = [old, *(config for config in entry.configs if config != old)]
    if entry.torch and old is not None:
        choices.insert(1, None)
    times: dict[Config | None, float] = {}
    refused: dict[str, str] = {}
    for config in choices:
        if times and time.monotonic() > stop:
            break
        kernels = LeftToTorch(run) if config is None else Configured(config, run.device)
        result = attempt({}, lambda kernels=kernels: {"ms": sum(trial.ms(kernels) for trial in trials)})  # type: ignore[misc]
        if "ms" in result:
            times[config] = result["ms"]
        else:
            refused[_name(config)] = result["error"][:120]
    if not times:
        raise RuntimeError(f"none of the {len(choices)} configs works: {refused}")
    best = min(times, key=times.__getitem__)
    changed = best != old and times[best] < MAX_TIME_RATIO * times.get(old, math.inf)
    return {
        "old": config_fields(old),
        "new": config_fields(best if changed else old),
        "old_ms": times.get(old),
        "new_ms": times[best] if changed else times.get(old),
        "changed": changed,
        "tried": {_name(config): ms for config, ms in times.items()},
        "refused": refused,
        "not_tried": len(choices) - len(times) - len(refused),
    }


class _Trial:
    """A case's inputs and exact outputs, reused for every config."""

    @torch.inference_mode()
    def __init__(self, run: Run, case: Case) -> None:
        self._run, self._call = run, case.call
        make = partial(Maker, run, torch.bfloat16)
        inputs = case.make(make())
        self._first = inputs
        self._torch_outputs = case.call(reference, *copies(inputs))
        self._truth = exact(case.call, reference, *inputs)
        count = run.timer.sets(nbytes(inputs))
        self._sets = [copies(inputs), *(case.make(make(seed)) for seed in range(1, count))]

    @torch.inference_mode()
    def ms(self, kernels: Any) -> float:
        """Return the median time in milliseconds.

        Raises:
            ValueError: If the output is wrong.
        """
        outputs = self._call(kernels, *copies(self._first))
        verdict = judge(outputs, self._truth, self._torch_outputs, torch.bfloat16)
        if not verdict["right"]:
            raise ValueError(f"wrong result: relative error {verdict.get('error_to_exact', math.nan):.1e}")
        times = self._run.timer.device_ms(lambda i: self._call(kernels, *self._sets[i]), len(self._sets))
        return float(times["median_ms"])


def insert_entry(entries: list[dict[str, Any]], up_to: Mapping[str, int], config: dict[str, int] | None) -> None:
    """Replace the entry for the same sizes, or insert a new one before the first entry that covers it."""
    entry = {"up_to": dict(up_to)} | ({} if config is None else {"config": config})
    for i, other in enumerate(entries):
        limits = other.get("up_to", {})
        if limits == dict(up_to):
            entries[i] = entry if up_to else {key: entry[key] for key in ("config",) if key in entry}
            return
        if limits.keys() <= up_to.keys() and all(up_to[name] <= limit for name, limit in limits.items()):
            entries.insert(i, entry)
            return
    entries.append(entry)


def config_fields(config: Config | None) -> dict[str, int] | None:
    """Return the config as stored in a table file: block sizes and stages above 1, and always the warps."""
    if config is None:
        return None
    fields: dict[str, int] = {name: value for name, value in asdict(config).items() if value > 1 or name == "num_warps"}
    return fields


def table_to_json(entries_by_kernel: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Format a table as JSON with one entry per line."""
    parts = []
    for kernel, entries in entries_by_kernel.items():
        lines = ",\n".join(f"    {json.dumps(entry)}" for entry in entries)
        parts.append(f'  "{kernel}": [\n{lines}\n  ]')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _name(config: Config | None) -> str:
    if config is None:
        return "torch"
    blocks = f"{config.block_m}x{config.block_n}x{config.block_k}"
    return f"{blocks}, {config.num_warps} warps, {config.num_stages} stages"
