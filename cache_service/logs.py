"""One log line shape for every process: a constant snake_case event and key/values, JSON on stdout.

Shells call `configure` once at start and `event` afterwards; cores never log. A line is pretty when stdout is
a terminal. Lines of other libraries (grpc, asyncio) come out in the same shape, their message as the event.
Never pass prompts, tokens or secrets as fields.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import TextIO

from cache_service.core.errors import ConfigError

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ts (UTC, milliseconds), level, service, event, the fields, and error if any."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """Return the line without its newline; a value JSON does not know is written as its `str`."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "ts": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "service": self._service,
            "event": record.getMessage(),
            "logger": record.name,
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class PrettyFormatter(logging.Formatter):
    """For a person at a terminal: time, level, event, key=value."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """Return the line without its newline; values with spaces are quoted as JSON."""
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = getattr(record, "fields", {})
        pairs = " ".join(f"{key}={_plain(value)}" for key, value in fields.items())
        text = f"{clock} {record.levelname.lower():8} {self._service}: {record.getMessage()} {pairs}".rstrip()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


def _plain(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return (
        json.dumps(text)
        if isinstance(value, str) and (not text or not text.isprintable() or " " in text)
        else text
    )


def configure(service: str, *, level: str = "INFO", stream: TextIO | None = None) -> None:
    """Send every log record of this process to `stream` (stdout); call once, in the entry point.

    Raises ConfigError when `level` is not one of LEVELS.
    """
    if level.upper() not in LEVELS:
        raise ConfigError(f"log level: {level!r} is not one of {', '.join(LEVELS)}")
    target = sys.stdout if stream is None else stream
    handler = logging.StreamHandler(target)
    handler.setFormatter(PrettyFormatter(service) if target.isatty() else JsonFormatter(service))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def event(
    logger: logging.Logger,
    name: str,
    /,
    level: int = logging.INFO,
    *,
    exc_info: bool = False,
    **fields: object,
) -> None:
    """Log the constant event `name` with `fields`; `exc_info` adds the exception being handled."""
    logger.log(level, name, extra={"fields": fields}, exc_info=exc_info, stacklevel=2)
