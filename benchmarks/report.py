"""Result files: the figures, what a reader needs to judge or repeat them, and how figures are written in tables."""

import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PACKAGES = (
    *("triton-embed", "nvidia-pytriton", "tritonclient", "torch", "sentence-transformers", "transformers"),
    *("tokenizers", "numpy", "fastapi", "uvicorn"),
)
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def machine() -> dict[str, Any]:
    """Return the CPU with the instruction sets that matter here, its cores, the memory, and the load at the start."""
    info = Path("/proc/cpuinfo").read_text()
    pairs = (line.partition(":") for line in info.splitlines())
    fields = {key.strip(): value.strip() for key, _, value in pairs}
    return {
        "cpu": fields.get("model name", platform.machine()),
        "features": [f for f in FEATURES if f in fields.get("flags", "").split()],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "load_average_at_start": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}


def installed(python: Path) -> dict[str, str]:
    """Return the versions of all distributions in another interpreter's environment."""
    code = "import json, importlib.metadata as m; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    output = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    distributions: dict[str, str] = json.loads(output)
    return dict(sorted(distributions.items(), key=lambda item: item[0].lower()))


def commit() -> str:
    """Return the commit, with "-dirty" if the tree differs from it; "unknown" without git or outside a repository."""
    if shutil.which("git") is None:
        return "unknown"
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    git = subprocess.run(command, capture_output=True, text=True, check=False)
    return git.stdout.strip() or "unknown"


def header(packages: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return what every result file begins with. Call it before anything is measured.

    Args:
        packages: Versions to record; by default `versions()`.
    """
    return {
        "machine": machine(),
        "versions": versions() if packages is None else packages,
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "commit": commit(),
        "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def save(path: Path, result: Mapping[str, Any]) -> None:
    """Replace a result file atomically, so that an interrupted benchmark leaves a complete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(path)


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Save the final result. A result in RESULTS also updates docs/benchmarks.md."""
    save(path, result)
    print(f"written: {path}")
    if path.parent == RESULTS:
        from benchmarks import document  # it imports the modules that write results

        document.write()


def percentile(values: Sequence[float], q: float) -> float:
    """Return the nearest-rank percentile: always a measured value, never an interpolated one."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


def summary(latencies: Sequence[float], inputs: int, seconds: float) -> dict[str, Any]:
    """Return sentences per second and the p50 and p99 latency in milliseconds.

    Args:
        latencies: Seconds per successful call.
        inputs: Texts per call.
        seconds: Time from the first call to the last response.
    """
    return {
        "sentences_per_s": len(latencies) * inputs / seconds,
        "p50_ms": 1000 * percentile(latencies, 0.50) if latencies else math.nan,
        "p99_ms": 1000 * percentile(latencies, 0.99) if latencies else math.nan,
    }


def format_number(value: float) -> str:
    """Format with three significant digits, or without decimals from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first line holds the column names."""
    head, *rest = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rest])
