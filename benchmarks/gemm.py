"""What the machine can do at most: the linears of a network's layers, as fast as oneDNN multiplies them.

`python -m benchmarks.gemm` is a worker like an engine's; its workloads are the dtypes of DTYPES.
"""

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.worker import answer

# oneDNN refuses bf16 on CPUs without avx512 or avx_ne_convert.
DTYPES = {"fp32": torch.float32}
if torch.ops.mkldnn._is_mkldnn_bf16_supported():
    DTYPES["bf16"] = torch.bfloat16
TOKENS = 1024


class Network(NamedTuple):
    """`linears` of a layer: (inputs, outputs) of QKV, out, up (and gate) and down."""

    layers: int
    linears: tuple[tuple[int, int], ...]

    @property
    def flop_a_token(self) -> int:
        return self.layers * sum(2 * inputs * outputs for inputs, outputs in self.linears)


NETWORKS = {
    "minilm": Network(6, ((384, 3 * 384), (384, 384), (384, 1_536), (1_536, 384))),
    "bge-large": Network(24, ((1_024, 3 * 1_024), (1_024, 1_024), (1_024, 4_096), (4_096, 1_024))),
    "qwen3-0.6b": Network(28, ((1_024, 4_096), (2_048, 1_024), (1_024, 2 * 3_072), (3_072, 1_024))),
}


class Linears:
    """Weights of their own for every layer, so that no cache holds what the network's does not."""

    def __init__(self, network: Network, dtype: torch.dtype) -> None:
        self.network = network
        draw = torch.Generator().manual_seed(0)
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        for _ in range(network.layers):
            for inputs, outputs in network.linears:
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
    flop = networks * TOKENS * linears.network.flop_a_token
    return {"gflop_per_s": flop / (time.perf_counter() - begin) / 1e9}


@torch.inference_mode()
def main() -> None:
    made: dict[tuple[str, str], Linears] = {}

    def handle(*, workload: str = "", seconds: float = 0, network: str = "minilm", **_: Any) -> dict[str, Any]:
        if not workload:
            return {}
        if (network, workload) not in made:
            made[network, workload] = Linears(NETWORKS[network], DTYPES[workload])
        return measure(made[network, workload], seconds)

    answer(handle)


if __name__ == "__main__":
    main()
