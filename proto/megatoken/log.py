"""Structured logs: one JSON object a line, the same fields in every process.

    {"ts": "2026-01-02T03:04:05.678Z", "level": "info", "logger": "megatoken.worker.server", "event": "replica.ready",
     "process": "worker", "id": "chat-0", "request_id": "r-17", ...}

An entry point calls `setup_logging` once; modules use `logging.getLogger(__name__)` and, for what a machine should
find, `log_event(logger, "replica.ready", replica="chat-0")`. Prompts, tokens and secrets never belong in a log: a field
with such a name is left out, whoever passes it.
"""

from __future__ import annotations

import contextvars
import datetime
import json
import logging
import sys
import traceback
from collections.abc import Mapping
from typing import Any, Final, TextIO

# Set by a server for the length of one request; every line logged meanwhile carries it.
request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")

SECRET_FIELDS: Final = frozenset(
    {
        *("prompt", "prompts", "text", "content", "messages", "token_ids", "prompt_token_ids", "completion"),
        *("api_key", "api_keys", "key", "authorization", "password", "secret", "token", "auth_token", "private_key"),
    }
)
LEFT_OUT: Final = "[left out]"
MAX_TEXT: Final = 2000  # characters of a message or a field
LEVELS: Final = ("debug", "info", "warning", "error")


class JsonFormatter(logging.Formatter):
    """One record as one JSON line; never raises, whatever the fields hold."""

    def __init__(self, ids: Mapping[str, str]) -> None:
        super().__init__()
        self._ids = dict(ids)

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "ts": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": getattr(record, "event", None) or "log",
            **self._ids,
        }
        request = request_id.get()
        if request:
            line["request_id"] = request
        message = record.getMessage()
        if message and message != line["event"]:
            line["message"] = message[:MAX_TEXT]
        for name, value in getattr(record, "fields", {}).items():
            line[name if name not in line else name + "_"] = _shown(name, value)
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = "".join(traceback.format_exception(record.exc_info[1]))[-MAX_TEXT:]
        return json.dumps(line, separators=(",", ":"), default=str, ensure_ascii=False)


def _shown(name: str, value: Any) -> Any:
    if name.lower() in SECRET_FIELDS:
        return LEFT_OUT
    if isinstance(value, str):
        return value[:MAX_TEXT]
    if isinstance(value, Mapping):
        return {str(key): _shown(str(key), inner) for key, inner in value.items()}
    return value


def setup_logging(process: str, name: str = "", level: str = "info", stream: TextIO | None = None) -> None:
    """Sends every logger of this process to `stream` (stderr) as JSON lines. Call once, at the entry point.

    `process` is the kind (worker, router, edge, agent, controller), `name` its id in the cluster.
    """
    if level.lower() not in LEVELS:
        raise ValueError(f"log level {level!r} is not one of {', '.join(LEVELS)}")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter({"process": process, **({"id": name} if name else {})}))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)


def log_event(
    logger: logging.Logger, event: str, message: str = "", *, level: int = logging.INFO, **fields: Any
) -> None:
    """Logs what a machine should find: `event` is a dotted name out of a bounded set, `fields` its ids and facts."""
    if logger.isEnabledFor(level):
        logger.log(level, message or event, extra={"event": event, "fields": fields})
