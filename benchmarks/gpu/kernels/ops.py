"""Benchmark of every op at the families' sizes: its accuracy, and its share of the memory bandwidth.

Rows of stage `kernels`: op, case, dtype, right, and the errors. Rows of stage `ops`: the case, milliseconds per engine,
and for memory-bound ops the bytes that must move and the share of the measured copy bandwidth.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.kernels.accuracy import exact, judge
from benchmarks.gpu.kernels.cases import Case, Maker, attention_cases, cases, copies, nbytes
from benchmarks.gpu.run import Row, Run, attempt
from triton_embed.kernels import reference

OTHER_DTYPES = (torch.float16, torch.float32)
KERNELS_SHARE = 0.25  # of the remaining time, for the stage `kernels`


def kernels(run: Run) -> Iterator[Row]:
    """Check each op against float64: all sizes in bf16, then the first size of each kernel in the other dtypes.

    Other dtypes get one size only because a kernel takes seconds to compile.
    """
    everything = [*attention_cases(run), *cases(run)]
    firsts = list({(case.op, case.first_of): case for case in reversed(everything)}.values())[::-1]
    checks = [(case, torch.bfloat16) for case in everything]
    checks += [(case, dtype) for dtype in OTHER_DTYPES for case in firsts]
    min_seconds_left = run.seconds_left * (1 - KERNELS_SHARE)
    for case, dtype in checks:
        about = {"op": case.op, "case": case.name, "dtype": str(dtype).removeprefix("torch.")}
        if run.seconds_left < min_seconds_left:
            yield about | {"skipped": "no time left"}
        else:
            yield attempt(about, lambda case=case, dtype=dtype: check(run, case, dtype))  # type: ignore[misc]


def check(run: Run, case: Case, dtype: torch.dtype) -> Row:
    """Check one case against float64; in-place ops get copies so that each run starts from the same values."""
    with torch.inference_mode():
        inputs = case.make(Maker(run, dtype))
        outputs = case.call(run.ops, *copies(inputs))
        torch_outputs = case.call(reference, *copies(inputs))
        truth = exact(case.call, reference, *inputs)
        return judge(outputs, truth, torch_outputs, dtype)


def speeds(run: Run) -> Iterator[Row]:
    for case in cases(run):
        if case.timed:
            yield attempt({"op": case.op, "case": case.name}, lambda case=case: _speed(run, case))  # type: ignore[misc]


class LeftToTorch:
    """The fallback of `ops.linear` when the table has no config: cuBLAS, then the activation kernel."""

    def __init__(self, run: Run) -> None:
        self._ops = run.ops

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
        return self._ops.activation(reference.linear(x, weight, bias), act)


@torch.inference_mode()
def _speed(run: Run, case: Case) -> Row:
    verdict = check(run, case, torch.bfloat16)
    inputs = case.make(Maker(run, torch.bfloat16))
    outputs = case.call(run.ops, *copies(inputs))
    count = run.timer.sets(nbytes(inputs))
    sets = [inputs, *(case.make(Maker(run, torch.bfloat16, seed)) for seed in range(1, count))]
    engines: dict[str, Any] = {"ours": run.ops, "torch": reference}
    if case.op == "linear":
        engines["cublas, then our activation"] = LeftToTorch(run)
    times = {
        name: run.timer.device_ms(lambda i, module=module: case.call(module, *sets[i]), count)  # type: ignore[misc]
        for name, module in engines.items()
    }
    again = run.timer.device_ms(lambda i: case.call(run.ops, *sets[i]), count)
    ours = times["ours"]["median_ms"]
    row: Row = verdict | {"times": times, "again": again["median_ms"] / ours}
    row["ratio_to_torch"] = times["torch"]["median_ms"] / ours
    if case.compute is not None:
        return row | {"bound": "compute", "tflops": case.compute(inputs) / ours / 1e9}
    moved = case.bytes(inputs, outputs)
    bandwidth = run.results["ceilings"].get("copy_gb_s")
    rate = moved / ours / 1e6
    share = rate / bandwidth if bandwidth else None
    return row | {"bound": "memory", "bytes": moved, "gb_s": rate, "share_of_copy": share}
