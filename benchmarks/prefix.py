"""What it is worth to compute an instruction once: queries of a Qwen3-Embedding-0.6B of random weights on a CPU.

`python -m benchmarks.prefix [--dtypes float32 bfloat16] [--rounds 7]`: the same rows through the same weights, with the
instruction in every row and behind its keys and values, in turns; medians, and how far apart the vectors are.
"""

import argparse
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks import record
from triton_embed.python_backend.checkpoint.config import ServingConfig
from triton_embed.python_backend.execution.embedder import Embedder
from triton_embed.python_backend.inputs.row import Row

# Tokens of the instruction, tokens of each query, queries.
CASES = ((20, 14, 1), (20, 14, 8), (20, 14, 32), (100, 14, 8), (20, 60, 8))
VOCABULARY = 151_936


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=record.RESULTS / "prefix.json")
    options = parser.parse_args(arguments)
    result = {**record.header(), "rows": []}
    with tempfile.TemporaryDirectory() as directory:
        print("writing the checkpoint", flush=True)
        subprocess.run([sys.executable, "-m", "benchmarks.shapes", "qwen3-0.6b", directory], check=True)
        for dtype in options.dtypes:
            ours = embedder(Path(directory), dtype)
            for case in CASES:
                row = {"dtype": dtype, **measure(ours, *case, options.rounds)}
                result["rows"].append(row)
                print(line(row), flush=True)
    record.write(options.out, result)
    print(table(result["rows"], options.dtypes))


def table(rows: Sequence[dict[str, Any]], dtypes: Sequence[str]) -> str:
    """As the README quotes it."""
    cells = {(row["dtype"], row["instruction"], row["query"], row["queries"]): row for row in rows}
    heads = [f"{dtype}, whole → behind, ms |" for dtype in dtypes]
    lines = [f"| queries × (instruction + query) tokens | {' | '.join(heads)} |", "|---" * (1 + 2 * len(dtypes)) + "|"]
    for instruction, query, queries in CASES:
        found = [cells[dtype, instruction, query, queries] for dtype in dtypes]
        times = [f"{row['whole_ms']:,.0f} → {row['behind_ms']:,.0f} | {row['ratio']:.2f}×" for row in found]
        lines.append(f"| {queries} × ({instruction} + {query}) | {' | '.join(times)} |")
    return "\n".join(lines)


def embedder(directory: Path, dtype: str) -> Embedder:
    sys.modules.setdefault("triton_python_backend_utils", ModuleType("only inside Triton"))
    model = runpy.run_path(str(record.ROOT / "model_repository/qwen3_embedding/1/model.py"))["TritonPythonModel"]
    serving = ServingConfig(
        name="prefix", checkpoint="", checkpoint_root=directory, model_types=("qwen3",), dtype=dtype, pooling="last"
    )
    return Embedder(model.spec, directory, serving)


def measure(ours: Embedder, instruction: int, query: int, queries: int, rounds: int) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    head = draw.integers(VOCABULARY, size=instruction, dtype=np.int32)
    ids = [np.concatenate([head, draw.integers(VOCABULARY, size=query, dtype=np.int32)]) for _ in range(queries)]
    plain, behind = [Row(one) for one in ids], [Row(one, shared=instruction) for one in ids]
    dims = [ours.model.dimensions] * queries
    for _ in range(2):  # the second time the instruction is known
        apart = ours.embed(behind, dims)
    whole = ours.embed(plain, dims)
    seconds: dict[str, list[float]] = {"whole": [], "behind": []}
    for _ in range(rounds):
        for name, rows in (("whole", plain), ("behind", behind)):
            start = time.perf_counter()
            ours.embed(rows, dims)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    return {
        "instruction": instruction,
        "query": query,
        "queries": queries,
        "whole_ms": round(1e3 * medians["whole"], 1),
        "behind_ms": round(1e3 * medians["behind"], 1),
        "ratio": round(medians["whole"] / medians["behind"], 2),
        "ratio_range": [
            round(limit(w / b for w, b in zip(seconds["whole"], seconds["behind"], strict=True)), 2)
            for limit in (min, max)
        ],
        "least_cosine": round(float((whole * apart).sum(axis=1).min()), 6),
    }


def line(row: dict[str, Any]) -> str:
    low, high = row["ratio_range"]
    return (
        f"{row['dtype']:>8}  {row['queries']:>2} x ({row['instruction']} + {row['query']}) tokens  "
        f"{row['whole_ms']:>8.1f} ms  {row['behind_ms']:>8.1f} ms  {row['ratio']:.2f}x ({low:.2f} to {high:.2f})  "
        f"cosine at least {row['least_cosine']:.6f}"
    )


if __name__ == "__main__":
    main()
