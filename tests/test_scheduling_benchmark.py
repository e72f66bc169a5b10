"""The scheduling benchmark without a stack: texts, figures and plots, and the load generator with a fake server."""

import asyncio
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import pytest

from benchmarks import loadgen, plots
from benchmarks.scheduling.budget import cells, configs
from benchmarks.scheduling.fairness import BULK, MAX_P99_RATIO, bulk_texts
from benchmarks.scheduling.plots import PLOTS
from benchmarks.scheduling.results import LoadResult
from benchmarks.scheduling.stack import Config
from benchmarks.scheduling.tables import tables

PNG = b"\x89PNG"


def reply(latencies: list[float], failures: dict[str, int] | None = None) -> dict[str, Any]:
    """Return a reply of the load generator."""
    return {"latencies_ms": latencies, "stages_ms": {"parse": latencies}, "failures": failures or {}}


def test_bulk_texts_are_distinct_and_keep_the_lengths() -> None:
    texts = [f"{'word ' * (i % 40)}one two three four five six seven eight nine ten {i}" for i in range(512)]
    bulk = bulk_texts(texts)
    assert len(bulk) == 2 * BULK
    assert len(set(bulk)) == len(bulk)
    assert [len(text) for text in bulk] == 8 * [len(text) for text in texts]


def test_replies_are_combined_before_percentiles_are_taken() -> None:
    combined = LoadResult()
    combined.add(reply([float(i) for i in range(1, 61)], {"429": 1}))
    combined.add(reply([float(i) for i in range(61, 101)], {"429": 2}))
    row = combined.row()
    assert (row["requests"], row["p50_ms"], row["p95_ms"], row["p99_ms"]) == (100, 50, 95, 99)
    assert row["stages_p50_ms"] == {"parse": 50.5}
    assert row["failures"] == {"429": 3}


def test_no_percentiles_without_responses() -> None:
    combined = LoadResult()
    combined.add(reply([], {"503": 4}))
    assert combined.row().keys() == {"requests", "cpu_percent_elsewhere", "failures"}


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Return rows of all three stages."""
    common = {"stage": "fairness", "budget": 0, "callers": 1, "requests": 9, "cpu_percent_elsewhere": 1.0}
    under = {"what": "under bulk", "priority": "batch", "p50_ms": 5.0, "p99_ms": 9.0, "p99_to_idle_p50": 4.5}
    stages = {"stages_p50_ms": {"triton": 2.5}, "p50_ms": 3.0, "cpu_percent_elsewhere": 2.0}
    times = {"bare_p50_ms": 2.0, "served_p50_ms": 3.0, "added_ms": 1.0, "added_ms_least": 0.9, "added_ms_most": 1.1}
    measured = [
        {"stage": "budget", **config._asdict(), "workload": workload, "inputs": inputs, "callers": callers}
        | {"inputs_per_s": 100.0 + callers, "p50_ms": 7.0}
        for config in configs()
        for workload, inputs, callers in cells()
    ]
    return [
        common | {"what": "idle", "p50_ms": 2.0, "p99_ms": 3.0},
        common | under | {"target": MAX_P99_RATIO, "inputs_per_s": 120.0, "bulk_failures": {"504": 1}},
        {"stage": "single"} | times | stages,
        *measured,
    ]


def test_tables_show_every_row_and_failures(rows: list[dict[str, Any]]) -> None:
    lines = tables(rows)
    assert len(lines) == 2 + 1 + 2 + len(configs())
    assert "p99 is 4.5 × idle p50 (at most 3); bulk 120 inputs/s; FAILED {'504': 1}" in lines[1]
    assert "+1.00 ms (0.90 to 1.10, at most 1.5); stages triton 2.50" in lines[2]
    assert lines[-1].startswith(str(Config(wait_us=2_000)))
    assert "228 (7.0)" in lines[-1]


def test_each_measured_stage_has_a_plot(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    machine = {"machine": {"cpu": "a", "cores": 2}, "timestamp": "2026-01-01T00:00:00Z"}
    for stage, expected in (("fairness", ["f-fairness.png"]), ("budget", ["f-budget.png"]), ("single", [])):
        folder = tmp_path / stage
        folder.mkdir()
        stage_rows = [row for row in rows if row["stage"] == stage]
        (folder / "f.json").write_text(json.dumps(machine | {"rows": stage_rows}))
        plots.draw(folder / "f.json", PLOTS)
        images = sorted(folder.glob("*.png"))
        assert [path.name for path in images] == expected
        assert all(path.read_bytes().startswith(PNG) for path in images)


def test_load_sends_the_count_and_collects_stage_times() -> None:
    bodies: list[dict[str, Any]] = []
    in_flight = [0, 0]  # now, maximum

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):  # the client closed the connection
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                bodies.append(orjson.loads(await reader.readexactly(length)))
                status = b"503 No" if len(bodies) == 3 else b"200 OK"
                in_flight[0] += 1
                in_flight[1] = max(in_flight)
                await asyncio.sleep(0.02)
                in_flight[0] -= 1
                timing = b"server-timing: parse;dur=0.50, triton;dur=19.00"
                writer.write(b"HTTP/1.1 " + status + b"\r\n" + timing + b"\r\ncontent-length: 2\r\n\r\n{}")
        writer.close()

    async def use() -> dict[str, Any]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        load = loadgen.Load({"mixed": ["a", "b", "c", "d", "e"]})
        target = {"protocol": "http", "port": server.sockets[0].getsockname()[1]}
        result = await load.handle(**target, workload="mixed", inputs=2, callers=3, count=7, priority="batch")
        for connection in load.clients["http", target["port"]].idle:
            connection.close()
        await asyncio.sleep(0.05)  # let both ends see it
        server.close()
        return result

    result = asyncio.run(use())
    assert [body["input"] for body in bodies[:3]] == [["a", "b"], ["c", "d"], ["a", "b"]]
    assert {body["priority"] for body in bodies} == {"batch"}
    assert (len(bodies), in_flight[1]) == (7, 3)
    assert result["failures"] == {"503": 1}
    assert len(result["latencies_ms"]) == 6
    assert min(result["latencies_ms"]) >= 20
    assert result["stages_ms"] == {"parse": [0.5] * 6, "triton": [19.0] * 6}
    assert result["inputs_per_s"] == pytest.approx(12 / result["seconds"])
