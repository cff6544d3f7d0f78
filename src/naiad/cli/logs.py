"""What the process writes to stderr while it serves: one line per record, JSON or text."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any, Literal

import msgspec

ACCESS = "naiad.access"
"""Logger of finished requests; its messages are JSON objects already."""

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {
    "asctime",
    "color_message",  # uvicorn's second copy of the message
    "message",
    "taskName",
}


class LogSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is logged, on stderr."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level that is logged; each request is one line of level info."""

    log_format: Literal["json", "text"] = "json"
    """json: one object per line, with the request's id, status and times as keys."""


def extras(record: logging.LogRecord) -> dict[str, Any]:
    """What the caller passed as `extra`."""
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time, level, logger, message, then the extras."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        if record.name == ACCESS:
            return record.getMessage()
        fields: dict[str, Any] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **extras(record),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields, enc_hook=str).decode()


class TextFormatter(logging.Formatter):
    """For eyes: time, level, message, then the extras as key=value."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and a traceback below it where there is one."""
        message, fields = record.getMessage(), extras(record)
        if record.name == ACCESS:
            fields = msgspec.json.decode(message, type=dict[str, Any])
            del fields["time"]
            message = " ".join(str(fields.pop(key)) for key in ("method", "path", "status"))
        pairs = "".join(f" {key}={value}" for key, value in fields.items())
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{clock} {record.levelname.lower():7} {message}{pairs}"
        return line + (f"\n{self.formatException(record.exc_info)}" if record.exc_info else "")


def configure_logs(settings: LogSettings) -> None:
    """Send the root logger to stderr, and nothing else anywhere."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=settings.log_level.upper(), force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # it narrates its start and end


def _utc(seconds: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03}Z"
