"""A result file: the numbers, and what a reader needs to judge or repeat them."""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
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
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}


def installed(python: Path) -> dict[str, str]:
    """Every distribution in another interpreter's environment."""
    code = "import json, importlib.metadata as m; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    asked = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(asked.stdout)
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def commit() -> str:
    """`git describe`: the commit, "-dirty" when the tree differs from it; "unknown" outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    git = subprocess.run(command, capture_output=True, text=True, check=False)
    return git.stdout.strip() or "unknown"


def header() -> dict[str, Any]:
    """Taken before anything is measured."""
    return {
        "machine": machine(),
        "versions": versions(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "commit": commit(),
        "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}")
    if path.parent == RESULTS:
        from benchmarks import document  # it imports the modules that write results

        document.write()
