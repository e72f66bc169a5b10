"""The operator's log in both formats."""

import asyncio
import json
import logging
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from triton_embed.gateway.http.logs import JsonLines, TextLines, request_id


def record(message: str = "hello %s", *args: object, **extra: object) -> logging.LogRecord:
    return logging.getLogger("some.place").makeRecord(
        "some.place", logging.WARNING, "file.py", 1, message, args or ("you",), None, extra=extra
    )


def test_json_line_has_time_level_logger_and_message() -> None:
    log_record = record()
    line = json.loads(JsonLines().format(log_record))
    time = datetime.fromisoformat(line.pop("time"))
    assert time.utcoffset() == datetime.now(UTC).utcoffset()
    assert abs(time.timestamp() - log_record.created) < 0.002
    assert line == {"level": "warning", "logger": "some.place", "message": "hello you"}


def test_fields_are_added_to_a_json_line() -> None:
    line = json.loads(JsonLines().format(record(fields={"status": 200, "model": None})))
    assert (line["status"], line["model"], line["message"]) == (200, None, "hello you")


@pytest.mark.parametrize("text", ["two\nlines", 'a "quote"', "\x00\x1b[31m", "😀", "lone \ud83d surrogate"])
def test_any_message_is_one_line_of_json(text: str) -> None:
    line = JsonLines().format(record("%s", text))
    assert "\n" not in line
    assert json.loads(line)["message"] == text.replace("\ud83d", "\\ud83d")


def test_traceback_is_one_json_field() -> None:
    try:
        raise RuntimeError("lone \udc00")
    except RuntimeError:
        log_record = logging.getLogger().makeRecord("x", logging.ERROR, "f", 1, "failed", (), sys.exc_info())
    line = JsonLines().format(log_record)
    assert "\n" not in line
    traceback = json.loads(line)["exception"].splitlines()
    assert traceback[0] == "Traceback (most recent call last):"
    assert traceback[-1] == "RuntimeError: lone \\udc00"
    assert "test_logs.py" in traceback[1]


def test_only_lines_of_a_request_have_its_id() -> None:
    lines: dict[str, tuple[str | None, str]] = {}

    async def answer(name: str) -> None:
        request_id.set(name)
        await asyncio.sleep(0)
        lines[name] = json.loads(JsonLines().format(record())).get("request_id"), TextLines().format(record())

    async def run() -> None:
        await asyncio.gather(asyncio.create_task(answer("one")), asyncio.create_task(answer("two")))

    asyncio.run(run())
    for name, (in_json, in_text) in lines.items():
        assert in_json == name
        assert in_text.endswith(f" hello you [{name}]")
    assert "request_id" not in json.loads(JsonLines().format(record()))
    assert TextLines().format(record()).endswith(" hello you")


PROGRAM = """
import logging, warnings
from triton_embed.gateway.http import logs
logs.configure("info")
logs.configure("info", "FORM")
logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
logging.getLogger("triton_embed.gateway.process.supervisor").info("stopping")
logging.getLogger("anything").debug("too much")
logging.getLogger("httpx").info("GET https://example.com/?secret")
warnings.warn("careful", UserWarning)
"""


@pytest.mark.parametrize("form", ["json", "text"])
def test_all_loggers_use_the_configured_format(form: str) -> None:
    command = [sys.executable, "-c", PROGRAM.replace("FORM", form)]
    process = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert process.stdout == ""
    if form == "json":
        messages = [json.loads(line)["message"] for line in process.stderr.splitlines()]
        assert "careful" in messages.pop()
    else:
        messages = [line.partition(" ")[2] for line in process.stderr.splitlines()[:2]]
        assert "careful" in process.stderr
    assert messages == ["Invalid HTTP request received.", "stopping"]
    assert "secret" not in process.stderr
