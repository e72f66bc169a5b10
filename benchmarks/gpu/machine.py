"""Machine description for GPU benchmarks: device, package versions, and the two ceilings (matmul rate, bandwidth)."""

import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch

from benchmarks.gpu.run import Row, Run

PACKAGES = ("torch", "triton", "transformers", "sentence-transformers", "numpy", "safetensors", "tokenizers")


def versions() -> dict[str, str]:
    """Return the versions of the installed packages; on a GPU machine this project itself may not be installed."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    if torch.cuda.is_available():
        versions["cudnn"] = str(torch.backends.cudnn.version())
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def gpu(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"name": "none: dry run on the CPU"}
    properties: Any = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "l2_mb": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
        "driver": _driver(),
    }


def _driver() -> str:
    """Return driver version, clocks, power limit and temperature as nvidia-smi reports them."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    fields = "driver_version,clocks.max.sm,clocks.max.memory,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


@torch.inference_mode()
def machine(run: Run) -> Iterator[Row]:
    """Measure a dense bf16 product of random matrices, and a copy (bytes read plus bytes written)."""
    size = run.size(8_192, 128)
    a, b = (torch.randn(size, size, device=run.device).to(torch.bfloat16) for _ in range(2))
    times = run.timer.device_ms(lambda i: torch.mm(a, b), 1)
    tflops = 2 * size**3 / times["median_ms"] / 1e9
    run.results["ceilings"]["matmul_tflops"] = tflops
    yield {"what": "matmul bf16", "size": size, "tflops": tflops} | times
    count = run.size(1 << 30, 1 << 20)  # bytes
    source = torch.randint(255, (count,), dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    times = run.timer.device_ms(lambda i: target.copy_(source), 1)
    rate = 2 * count / times["median_ms"] / 1e6
    run.results["ceilings"]["copy_gb_s"] = rate
    yield {"what": "copy", "bytes": count, "gb_s": rate} | times
