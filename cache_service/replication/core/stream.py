"""Messages of the peer stream, by which one cache service follows another's delta log.

Decides bytes only. The follower asks once (JSON: namespace id, and the position after which to go on); the
other side answers with its name and stride (JSON), then for ever with messages of at most MAX_MESSAGE_BYTES:
17 bytes (kind, epoch, seq) and a piece of an entry's payload. The last piece of an entry has kind SEGMENT or
SNAPSHOT, the ones before it MORE; a BEAT says that the follower has all there is.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from cache_service.core.errors import RemoteProtocolError
from cache_service.core.log import LogEntry, LogPosition, Segment, Snapshot

PIECE_BYTES = 256 * 1024
MAX_MESSAGE_BYTES = PIECE_BYTES + 64
MAX_ENTRY_BYTES = 256 << 20
BEAT = b"\x00" + bytes(16)
_HEAD = struct.Struct("<BQQ")
_BEAT, _MORE, _SEGMENT, _SNAPSHOT = range(4)


@dataclass(frozen=True, slots=True)
class Ask:
    """What a follower wants."""

    namespace: str
    after: LogPosition | None

    def encode(self) -> bytes:
        """Return the request."""
        after = [self.after.epoch, self.after.seq] if self.after else None
        return json.dumps({"namespace": self.namespace, "after": after}).encode()


@dataclass(frozen=True, slots=True)
class Hello:
    """Who answers: its site, and how many blocks an entry stands for."""

    site: str
    stride: int

    def encode(self) -> bytes:
        """Return the first answer."""
        return json.dumps({"site": self.site, "stride": self.stride}).encode()


def decode_ask(message: bytes) -> Ask:
    """Read a request; raises RemoteProtocolError."""
    fields = _object(message)
    namespace, after = fields.get("namespace"), fields.get("after")
    if not isinstance(namespace, str):
        raise RemoteProtocolError("follow.namespace: is not a string")
    if after is None:
        return Ask(namespace, None)
    if not isinstance(after, list) or len(after) != 2 or not all(type(n) is int and n >= 0 for n in after):
        raise RemoteProtocolError("follow.after: is not [epoch, seq]")
    return Ask(namespace, LogPosition(*after))


def decode_hello(message: bytes) -> Hello:
    """Read the first answer; raises RemoteProtocolError."""
    fields = _object(message)
    site, stride = fields.get("site"), fields.get("stride")
    if not isinstance(site, str) or type(stride) is not int or not 1 <= stride <= 256:
        raise RemoteProtocolError(f"hello: {message[:100]!r} has no site and stride")
    return Hello(site, stride)


def encode_entry(entry: LogEntry) -> Iterator[bytes]:
    """Yield the messages of an entry."""
    kind = _SNAPSHOT if isinstance(entry, Snapshot) else _SEGMENT
    last = max(len(entry.payload) - 1, 0) // PIECE_BYTES
    for number in range(last + 1):
        head = _HEAD.pack(kind if number == last else _MORE, entry.position.epoch, entry.position.seq)
        yield head + entry.payload[number * PIECE_BYTES : (number + 1) * PIECE_BYTES]


class EntryReader:
    """Puts entries together again."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0

    def take(self, message: bytes) -> LogEntry | None:
        """Take a message and return the entry that it completes. Raises RemoteProtocolError."""
        if not _HEAD.size <= len(message) <= MAX_MESSAGE_BYTES or message[0] > _SNAPSHOT:
            raise RemoteProtocolError(f"peer stream: {len(message)} bytes that are no message")
        kind, epoch, seq = _HEAD.unpack_from(message)
        if kind == _BEAT:
            return None
        self._pieces.append(message[_HEAD.size :])
        self._size += len(message)
        if self._size > MAX_ENTRY_BYTES:
            raise RemoteProtocolError(f"peer stream: an entry of more than {MAX_ENTRY_BYTES} bytes")
        if kind == _MORE:
            return None
        payload = b"".join(self._pieces)
        self._pieces, self._size = [], 0
        position = LogPosition(epoch, seq)
        return Snapshot(position, payload) if kind == _SNAPSHOT else Segment(position, payload)


def _object(message: bytes) -> dict[str, object]:
    try:
        fields = json.loads(message) if len(message) <= 4096 else None
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise RemoteProtocolError("peer stream: not a JSON object of at most 4096 bytes")
    return fields
