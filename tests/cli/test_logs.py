"""Log lines: JSON that a collector reads, text that a person reads."""

from __future__ import annotations

import logging
import sys

import msgspec
import pytest

from naiad.cli.logs import JsonFormatter, LogSettings, TextFormatter, configure_logs


def record(**extra: object) -> logging.LogRecord:
    made = logging.makeLogRecord(
        {"name": "naiad.server", "levelno": 20, "levelname": "INFO", "msg": "%s %d"}
        | {"args": ("GET /", 200), "created": 1.5}
    )
    vars(made).update(extra)
    return made


def test_json_has_what_was_passed_as_extra() -> None:
    line = JsonFormatter().format(record(request_id="r1", duration_ms=1.25))
    assert msgspec.json.decode(line) == {
        "time": "1970-01-01T00:00:01.500Z",
        "level": "info",
        "logger": "naiad.server",
        "message": "GET / 200",
        "request_id": "r1",
        "duration_ms": 1.25,
    }


def test_json_keeps_a_traceback_on_the_line() -> None:
    try:
        raise ValueError("boom")
    except ValueError:
        line = JsonFormatter().format(record(exc_info=sys.exc_info()))
    assert "\n" not in line
    assert "ValueError: boom" in msgspec.json.decode(line)["traceback"]


def test_text_is_one_line_with_pairs() -> None:
    line = TextFormatter().format(record(request_id="r1"))
    assert line.endswith("info    GET / 200 request_id=r1")


def test_a_finished_request_is_one_object_or_one_line() -> None:
    line = '{"time":1.5,"method":"GET","path":"/metrics","status":200,"ms":0.5,"request_id":"r1"}'
    access = record(name="naiad.access", msg="%s", args=(line,))
    assert JsonFormatter().format(access) == line
    assert TextFormatter().format(access).endswith("info    GET /metrics 200 ms=0.5 request_id=r1")


def test_logs_go_to_stderr_from_the_level_on(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        configure_logs(LogSettings(log_level="warning"))
        logging.getLogger("naiad").info("quiet")
        logging.getLogger("naiad").warning("loud")
    finally:
        root.handlers[:], root.level = before
    printed = capsys.readouterr()
    assert printed.out == ""
    assert msgspec.json.decode(printed.err)["message"] == "loud"
