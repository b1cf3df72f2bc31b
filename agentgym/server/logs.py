"""The service's log: lines for people, or one JSON object a line. Law: each line says whose request it is about, and
none holds a key or the text of a message."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Literal

from agentgym.server.visit import Visit

LogFormat = Literal["text", "json"]
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s%(whose)s"
_FIELDS = ("method", "route", "status", "principal", "seconds", "prompt_tokens", "sampled_tokens", "failed")
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_visit: ContextVar[Visit | None] = ContextVar("visit", default=None)


@contextlib.contextmanager
def visiting(visit: Visit) -> Iterator[None]:
    """Lines logged inside belong to this request."""
    token = _visit.set(visit)
    try:
        yield
    finally:
        _visit.reset(token)


def configure(log_format: LogFormat, level: int = logging.INFO) -> None:
    """Sends the log to stderr in this format, in place of what was configured before."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)


class TextLines(logging.Formatter):
    """A line for people; what belongs to a request ends with its id. A message of several lines, such as an error that
    quotes what somebody sent, goes on indented, so that none of them looks like a line of ours."""

    def __init__(self) -> None:
        super().__init__(TEXT)

    def format(self, record: logging.LogRecord) -> str:
        visit = _visit.get()
        record.whose = "" if visit is None else f" [{' '.join(_ids(visit).values())}]"
        first, *more = super().format(record).translate(_CONTROLS).split("\n")
        return "\n".join([first, *("    " + line for line in more)])


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the ids of request and session, and an access line's
    fields.

    Example: `{"time": "2026-11-22T15:30:00.123Z", "level": "INFO", "logger": "agentgym.server.access",
    "message": "POST /v1/chat/completions 200 12.3 ms, 8 tokens", "request_id": "req-4f...", "status": 200, ...}`.
    """

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        visit = _visit.get()
        if visit is not None:
            line |= _ids(visit)
        line |= {name: value for name in _FIELDS if (value := getattr(record, name, None)) not in (None, "")}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _ids(visit: Visit) -> dict[str, str]:
    ids = {"request_id": visit.request_id}
    return ids if visit.session_id is None else ids | {"session_id": visit.session_id}
