"""The operator's log on stderr: lines of text for a person, or of JSON for a machine.

Lines written while a request is answered carry its id. None carries what callers send: no text, vector, key, image
URL or query string.
"""

import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime

import orjson

# Of the request that the current task answers; empty outside of one.
request_id: ContextVar[str] = ContextVar("request_id", default="")

# Not ours, and only of interest to someone who debugs.
_LOUD = ("httpx", "httpx2", "httpcore", "httpcore2", "huggingface_hub", "asyncio")


def configure(level: str, form: str = "text") -> None:
    """Log everything of `level` and above, in `form`: text or json. Replaces what was configured here before."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler.formatter, JsonLines | TextLines)]:
        root.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.WARNING)


class TextLines(logging.Formatter):
    """The time, the message, and the request's id where there is one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        line = super().formatMessage(record)
        return f"{line} [{id_}]" if (id_ := request_id.get()) else line


class JsonLines(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, logger, message; request_id and exception where there are.

    A record's `fields` (given as `extra={"fields": {…}}`) join it.
    """

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _whole(record.getMessage()),
        }
        if id_ := request_id.get():
            line["request_id"] = id_
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = _whole(self.formatException(record.exc_info))
        return orjson.dumps(line, default=str).decode()


def _whole(text: str) -> str:
    """Without lone surrogates, which JSON cannot hold."""
    return text.encode(errors="backslashreplace").decode()
