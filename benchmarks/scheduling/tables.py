"""The printed lines of all stages."""

from collections.abc import Sequence

from benchmarks.scheduling.budget import cells
from benchmarks.scheduling.fairness import format_fairness
from benchmarks.scheduling.single import MAX_ADDED_MS
from benchmarks.scheduling.stack import Config, Row


def tables(rows: Sequence[Row]) -> list[str]:
    """Return the printed lines of all stages."""
    lines = [format_fairness(row) for row in rows if row["stage"] == "fairness"]
    for row in (row for row in rows if row["stage"] == "single"):
        stages = ", ".join(f"{name} {stage_ms:.2f}" for name, stage_ms in row["stages_p50_ms"].items())
        spread = f"{row['added_ms_least']:.2f} to {row['added_ms_most']:.2f}, at most {MAX_ADDED_MS:g}"
        lines.append(
            f"single: bare {row['bare_p50_ms']:.2f} ms, served {row['served_p50_ms']:.2f} ms: "
            f"{row['added_ms']:+.2f} ms ({spread}); stages {stages}; "
            f"other CPU {row['cpu_percent_elsewhere']:.0f} %"
        )
    budget_rows = [row for row in rows if row["stage"] == "budget"]
    if budget_rows:
        lines.append("budget: inputs/s (p50 ms)")
        headers = [f"{inputs}×{workload} c{callers}" for workload, inputs, callers in cells()]
        lines.append(f"{'':22}" + "".join(f"{header:>18}" for header in headers))
    for config in dict.fromkeys((row["budget"], row["wait_us"]) for row in budget_rows):
        figures = {
            (row["workload"], row["inputs"], row["callers"]): f"{row['inputs_per_s']:.0f} ({row['p50_ms']:.1f})"
            for row in budget_rows
            if (row["budget"], row["wait_us"]) == config
        }
        lines.append(f"{Config(*config)!s:22}" + "".join(f"{figures.get(cell, ''):>18}" for cell in cells()))
    return lines
