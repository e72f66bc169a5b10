"""Benchmark of prefix reuse: queries with an instruction on a Qwen3-Embedding-0.6B with random weights, on a CPU.

`python -m benchmarks.prefix [--dtypes float32 bfloat16] [--rounds 7]` embeds the same rows with the same weights, in
turns: with the instruction computed in every row, and with its cached keys and values. It reports medians and the
lowest cosine between both vectors.
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

from benchmarks import report
from benchmarks.report import markdown_table
from triton_embed.python_backend.checkpoint.config import ServingConfig
from triton_embed.python_backend.execution.embedder import Embedder
from triton_embed.python_backend.inputs.row import Row

# Tokens of the instruction, tokens of each query, queries.
CASES = ((20, 14, 1), (20, 14, 8), (20, 14, 32), (100, 14, 8), (20, 60, 8))
VOCABULARY = 151_936


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefix", description=__doc__.partition("\n")[0])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=report.RESULTS / "prefix.json")
    options = parser.parse_args(arguments)
    result = {**report.header(), "rows": []}
    with tempfile.TemporaryDirectory() as directory:
        print("writing the checkpoint …", flush=True)
        subprocess.run([sys.executable, "-m", "benchmarks.shapes", "qwen3-0.6b", directory], check=True)
        for dtype in options.dtypes:
            embedder = load_embedder(Path(directory), dtype)
            for case in CASES:
                row = {"dtype": dtype, **measure(embedder, *case, options.rounds)}
                result["rows"].append(row)
                print(progress_line(row), flush=True)
    report.write(options.out, result)
    print(table(result["rows"], options.dtypes))


def table(rows: Sequence[dict[str, Any]], dtypes: Sequence[str]) -> str:
    """Return the results as a Markdown table."""
    cells = {(row["dtype"], row["instruction"], row["query"], row["queries"]): row for row in rows}
    lines = [["queries × (instruction + query) tokens"]]
    for dtype in dtypes:
        lines[0] += [f"{dtype}, computed in full → prefix reused, ms", "speedup"]
    for instruction, query, queries in CASES:
        row_cells = [cells[dtype, instruction, query, queries] for dtype in dtypes]
        lines.append([f"{queries} × ({instruction} + {query})"])
        for row in row_cells:
            lines[-1] += [f"{row['whole_ms']:,.0f} → {row['behind_ms']:,.0f}", f"{row['ratio']:.2f}×"]
    return markdown_table(lines)


def load_embedder(directory: Path, dtype: str) -> Embedder:
    """Load the checkpoint with the family's model.py."""
    sys.modules.setdefault("triton_python_backend_utils", ModuleType("only inside Triton"))
    model = runpy.run_path(str(report.ROOT / "model_repository/qwen3_embedding/1/model.py"))["TritonPythonModel"]
    serving = ServingConfig(
        name="prefix", checkpoint="", checkpoint_root=directory, model_types=("qwen3",), dtype=dtype, pooling="last"
    )
    return Embedder(model.spec, directory, serving)


def measure(embedder: Embedder, instruction: int, query: int, queries: int, rounds: int) -> dict[str, Any]:
    """Measure one case and return its result row. `instruction`, `query`: tokens; `queries`: rows per call."""
    rng = np.random.default_rng(0)
    prefix = rng.integers(VOCABULARY, size=instruction, dtype=np.int32)
    ids = [np.concatenate([prefix, rng.integers(VOCABULARY, size=query, dtype=np.int32)]) for _ in range(queries)]
    full_rows, prefix_rows = [Row(row) for row in ids], [Row(row, shared_prefix_tokens=instruction) for row in ids]
    dims = [embedder.model.dimensions] * queries
    for _ in range(2):  # the second call reuses the instruction
        prefix_vectors = embedder.embed(prefix_rows, dims)
    full_vectors = embedder.embed(full_rows, dims)
    seconds: dict[str, list[float]] = {"full": [], "prefix": []}
    for _ in range(rounds):
        for name, rows in (("full", full_rows), ("prefix", prefix_rows)):
            start = time.perf_counter()
            embedder.embed(rows, dims)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "instruction": instruction,
        "query": query,
        "queries": queries,
        "whole_ms": round(1e3 * medians["full"], 1),
        "behind_ms": round(1e3 * medians["prefix"], 1),
        "ratio": round(medians["full"] / medians["prefix"], 2),
        "ratio_range": [
            round(bound(f / p for f, p in zip(seconds["full"], seconds["prefix"], strict=True)), 2)
            for bound in (min, max)
        ],
        "least_cosine": round(float((full_vectors * prefix_vectors).sum(axis=1).min()), 6),
    }


def progress_line(row: dict[str, Any]) -> str:
    """Format a row as a line of progress output."""
    low, high = row["ratio_range"]
    return (
        f"{row['dtype']:>8}  {row['queries']:>2} x ({row['instruction']} + {row['query']}) tokens  "
        f"{row['whole_ms']:>8.1f} ms  {row['behind_ms']:>8.1f} ms  {row['ratio']:.2f}x ({low:.2f} to {high:.2f})  "
        f"cosine at least {row['least_cosine']:.6f}"
    )


if __name__ == "__main__":
    main()
