"""The overload benchmark, and with it a real server under many times the load that it can serve."""

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def test_overload_is_refused_and_what_is_accepted_is_answered(tmp_path: Path) -> None:
    out = tmp_path / "overload.json"
    command = [sys.executable, "-m", "benchmarks.overload", "--quick", "--out", str(out)]
    environment = os.environ | {"TRITON_EMBED_REQUEST_TIMEOUT": "10"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (row,) = json.loads(out.read_text())["rows"]
    statuses = [kind["statuses"] for kind in row["kinds"].values()]
    counts = {status: sum(each.get(status, 0) for each in statuses) for each in statuses for status in each}
    assert set(counts) <= {"200", "429", "504"}
    assert counts["200"] > 0
    assert counts["429"] > 0
    # None, unless something else slows the machine down. If all were accepted, it would be three times as many.
    assert row["timed_out"] < counts["200"]
    assert out.with_name("overload-goodput.png").stat().st_size > 10_000
