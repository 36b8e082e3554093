"""The shape of a log line."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from cache_service import logs
from cache_service.core.errors import ConfigError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """Give the root logger back as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_line() -> None:
    """Event, level, service and fields are keys of one JSON object; odd values do not break the line."""
    stream = io.StringIO()
    logs.configure("index", stream=stream)
    logs.event(logging.getLogger("x"), "gap_seen", level=logging.WARNING, site="A", missing=3, odd=object)
    (line,) = stream.getvalue().splitlines()
    record = json.loads(line)
    assert record["event"] == "gap_seen"
    assert record["level"] == "warning"
    assert record["service"] == "index"
    assert (record["site"], record["missing"]) == ("A", 3)
    assert record["ts"].endswith("Z")


def test_newlines_cannot_forge_a_line() -> None:
    """A value with a newline stays inside its line, in both shapes."""
    for stream in (io.StringIO(), Terminal()):
        logs.configure("index", stream=stream)
        logs.event(logging.getLogger("x"), "e", name_given="a\nb")
        assert len(stream.getvalue().splitlines()) == 1


def test_exception_is_carried() -> None:
    """`exc_info` puts the traceback in the field `error`."""
    stream = io.StringIO()
    logs.configure("index", stream=stream)
    try:
        raise ValueError("boom")
    except ValueError:
        logs.event(logging.getLogger("x"), "failed", level=logging.ERROR, exc_info=True)
    assert "ValueError: boom" in json.loads(stream.getvalue())["error"]


def test_terminal_is_pretty() -> None:
    """On a terminal a line is text with key=value."""
    stream = Terminal()
    logs.configure("index", stream=stream)
    logs.event(logging.getLogger("x"), "ready", address="127.0.0.1:1", note="two words")
    assert "index: ready address=127.0.0.1:1 note=" in stream.getvalue()
    assert '"two words"' in stream.getvalue()


def test_level() -> None:
    """The level is case-free, filters, and a wrong one is named."""
    stream = io.StringIO()
    logs.configure("index", level="warning", stream=stream)
    logs.event(logging.getLogger("x"), "quiet")
    assert stream.getvalue() == ""
    with pytest.raises(ConfigError, match="LOUD"):
        logs.configure("index", level="LOUD")
