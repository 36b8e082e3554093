r"""Byte-wise parser of server-sent events.

Decides where an event ends and what its data is; it never changes the bytes, which the router passes on as
they came. Rests on the HTML standard, section "Interpreting an event stream": lines end with \r\n, \n or
\r; an empty line dispatches; `data` lines are joined with \n; a line that starts with a colon is a comment;
an unfinished event at the end of the stream is dropped.
"""

from __future__ import annotations

import re

from cache_service.core.errors import RemoteProtocolError

_LINE_END = re.compile(rb"\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"


class SseParser:
    """Feed bytes in pieces of any size; get the data of every completed event.

    Holds at most `max_event_bytes` of unfinished event.
    """

    def __init__(self, max_event_bytes: int = 8 << 20) -> None:
        self._max_event_bytes = max_event_bytes
        self._pending = b""
        self._data: list[bytes] = []
        self._size = 0
        self._first = True

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the data of the events that `chunk` completes, in order (events without data are skipped).

        Raises RemoteProtocolError when an event exceeds the limit; the parser must not be used after that.
        """
        buffer = self._pending + chunk
        scanned = max(0, len(self._pending) - 1)  # what was pending has no line end before its last byte
        if self._first:
            if len(buffer) < len(_BOM) and _BOM.startswith(buffer):
                self._pending = buffer
                return []
            if buffer.startswith(_BOM):
                buffer, scanned = buffer[len(_BOM) :], 0
            self._first = False
        events: list[bytes] = []
        start = 0
        for end in _LINE_END.finditer(buffer, scanned):
            if end.group() == b"\r" and end.end() == len(buffer):
                break  # the \n of this \r\n may be in the next piece
            self._line(buffer[start : end.start()], events)
            start = end.end()
        self._pending = buffer[start:]
        if self._size + len(self._pending) > self._max_event_bytes:
            raise RemoteProtocolError(f"server-sent event longer than {self._max_event_bytes} bytes")
        return events

    def _line(self, line: bytes, events: list[bytes]) -> None:
        if not line:
            if self._data:
                events.append(b"\n".join(self._data))
            self._data = []
            self._size = 0
            return
        name, _, value = line.partition(b":")
        if name == b"data":
            value = value.removeprefix(b" ")
            self._data.append(value)
            self._size += len(value) + 1
            if self._size > self._max_event_bytes:
                raise RemoteProtocolError(f"server-sent event longer than {self._max_event_bytes} bytes")
