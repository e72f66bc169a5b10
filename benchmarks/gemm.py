"""What the machine can do at most: the four linears of a MiniLM layer, as fast as oneDNN multiplies them.

`python -m benchmarks.gemm` is a worker like an engine's; its workloads are the dtypes of DTYPES.
"""

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.worker import answer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYERS = 6
SHAPES = ((384, 3 * 384), (384, 384), (384, 1536), (1536, 384))  # inputs, outputs: QKV, out, up, down
TOKENS = 1024
FLOP_A_TOKEN = LAYERS * sum(2 * inputs * outputs for inputs, outputs in SHAPES)


class Linears:
    """A layer's linears with weights of their own for every layer, so that no cache holds what MiniLM's does not."""

    def __init__(self, dtype: torch.dtype) -> None:
        draw = torch.Generator().manual_seed(0)
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        for _ in range(LAYERS):
            for inputs, outputs in SHAPES:
                x = torch.randn(TOKENS, inputs, generator=draw).to(dtype)
                weight = (torch.randn(outputs, inputs, generator=draw) * inputs**-0.5).to(dtype)
                # Laid out for this number of tokens: the best layout there is, better than a server can know.
                packed = torch.ops.mkldnn._reorder_linear_weight(weight, TOKENS)
                self.calls.append((x, packed, torch.zeros(outputs, dtype=dtype)))

    def run(self) -> None:
        for x, weight, bias in self.calls:
            torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def measure(linears: Linears, seconds: float) -> dict[str, Any]:
    """GFLOP/s over as many whole networks as fit in `seconds`; at least one."""
    linears.run()
    networks, begin = 0, time.perf_counter()
    while not networks or time.perf_counter() - begin < seconds:
        linears.run()
        networks += 1
    return {"gflop_per_s": networks * TOKENS * FLOP_A_TOKEN / (time.perf_counter() - begin) / 1e9}


@torch.inference_mode()
def main() -> None:
    made: dict[str, Linears] = {}

    def handle(*, workload: str = "", seconds: float = 0, **_: Any) -> dict[str, Any]:
        if not workload:
            return {}
        if workload not in made:
            made[workload] = Linears(DTYPES[workload])
        return measure(made[workload], seconds)

    answer(handle)


if __name__ == "__main__":
    main()
