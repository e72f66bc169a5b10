"""The operator's log on stderr: lines of text, or of JSON.

Lines logged during a request carry its id. No line carries a caller's data: no text, vector, key, image URL or query
string.
"""

import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime

import orjson

# Id of the request of the current task; empty outside of a request.
request_id: ContextVar[str] = ContextVar("request_id", default="")

# Loggers of other packages whose info messages help only to debug those packages.
_NOISY = ("httpx", "httpx2", "httpcore", "httpcore2", "huggingface_hub", "asyncio")


def configure(level: str, log_format: str = "text") -> None:
    """Log everything of `level` and above as text or json. Replaces an earlier configuration."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler.formatter, JsonLines | TextLines)]:
        root.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)


class TextLines(logging.Formatter):
    """Lines of the time, the message, and the request's id if there is one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        line = super().formatMessage(record)
        return f"{line} [{id_}]" if (id_ := request_id.get()) else line


class JsonLines(logging.Formatter):
    """One JSON object per line: time (RFC 3339, UTC), level, logger, message, and request_id and exception if present.

    A record's `fields` (passed as `extra={"fields": {…}}`) are added.
    """

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _without_surrogates(record.getMessage()),
        }
        if id_ := request_id.get():
            line["request_id"] = id_
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = _without_surrogates(self.formatException(record.exc_info))
        return orjson.dumps(line, default=str).decode()


def _without_surrogates(text: str) -> str:
    """Return text without lone surrogates, which JSON cannot encode."""
    return text.encode(errors="backslashreplace").decode()
