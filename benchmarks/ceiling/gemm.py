"""The machine's ceiling: the throughput of oneDNN's matrix products for the linears of a network's layers.

`python -m benchmarks.ceiling.gemm` is a worker with the protocol of an engine; its workloads are the dtypes of DTYPES.
"""

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.worker import serve_requests

# oneDNN refuses bf16 on CPUs without avx512 or avx_ne_convert.
DTYPES = {"fp32": torch.float32}
if torch.ops.mkldnn._is_mkldnn_bf16_supported():
    DTYPES["bf16"] = torch.bfloat16
TOKENS = 1024


class Network(NamedTuple):
    """The linears of a network. `linears`: (inputs, outputs) of QKV, out, up (and gate) and down of one layer."""

    layers: int
    linears: tuple[tuple[int, int], ...]

    @property
    def flop_per_token(self) -> int:
        """Floating-point operations of all linears per token."""
        return self.layers * sum(2 * inputs * outputs for inputs, outputs in self.linears)


NETWORKS = {
    "minilm": Network(6, ((384, 3 * 384), (384, 384), (384, 1_536), (1_536, 384))),
    "bge-large": Network(24, ((1_024, 3 * 1_024), (1_024, 1_024), (1_024, 4_096), (4_096, 1_024))),
    "qwen3-0.6b": Network(28, ((1_024, 4_096), (2_048, 1_024), (1_024, 2 * 3_072), (3_072, 1_024))),
}


class Linears:
    """Separate weights for every layer, so that caches hold no more of them than in the real network."""

    def __init__(self, network: Network, dtype: torch.dtype) -> None:
        self.network = network
        generator = torch.Generator().manual_seed(0)
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        for _ in range(network.layers):
            for inputs, outputs in network.linears:
                x = torch.randn(TOKENS, inputs, generator=generator).to(dtype)
                weight = (torch.randn(outputs, inputs, generator=generator) * inputs**-0.5).to(dtype)
                # The layout is optimal for this number of tokens, which a server does not know in advance.
                packed = torch.ops.mkldnn._reorder_linear_weight(weight, TOKENS)
                self.calls.append((x, packed, torch.zeros(outputs, dtype=dtype)))

    def run(self) -> None:
        """Run the linears of all layers once."""
        for x, weight, bias in self.calls:
            torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def measure(linears: Linears, seconds: float) -> dict[str, Any]:
    """Return GFLOP/s over as many complete runs of the linears as fit in `seconds`; at least one."""
    linears.run()
    runs, begin = 0, time.perf_counter()
    while not runs or time.perf_counter() - begin < seconds:
        linears.run()
        runs += 1
    flop = runs * TOKENS * linears.network.flop_per_token
    return {"gflop_per_s": flop / (time.perf_counter() - begin) / 1e9}


@torch.inference_mode()
def main() -> None:
    cache: dict[tuple[str, str], Linears] = {}

    def handle(*, workload: str = "", seconds: float = 0, network: str = "minilm", **_: Any) -> dict[str, Any]:
        if not workload:
            return {}
        if (network, workload) not in cache:
            cache[network, workload] = Linears(NETWORKS[network], DTYPES[workload])
        return measure(cache[network, workload], seconds)

    serve_requests(handle)


if __name__ == "__main__":
    main()
