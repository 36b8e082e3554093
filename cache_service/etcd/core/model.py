"""Keys, values, events and what calls return.

Keys and values are bytes. Revisions are etcd's: they grow by one with every write transaction of the store.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from cache_service.core.errors import LocalProtocolError


@dataclass(frozen=True, slots=True)
class KeyValue:
    """A key as it stood at a revision; of a deletion event, `value` is empty and `version` is 0."""

    key: bytes
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int


class EventKind(Enum):
    """What happened to the key."""

    PUT = "put"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class Event:
    """One change, at revision `kv.mod_revision`. `previous` comes on request, while history has it."""

    kind: EventKind
    kv: KeyValue
    previous: KeyValue | None = None


@dataclass(frozen=True, slots=True)
class KeyRange:
    """Half-open [start, end); end b"" means the one key `start`, end b"\\0" all keys from `start` on."""

    start: bytes
    end: bytes = b""

    def __post_init__(self) -> None:
        if not self.start:
            raise LocalProtocolError('key range: start is empty; all keys are KeyRange(b"\\0", b"\\0")')

    @classmethod
    def one(cls, key: bytes) -> KeyRange:
        """Return the range of one key."""
        return cls(key)

    @classmethod
    def prefix(cls, prefix: bytes) -> KeyRange:
        """Return the range of every key that starts with `prefix`; b"" means every key."""
        if not prefix:
            return cls(b"\0", b"\0")
        head = prefix.rstrip(b"\xff")
        return cls(prefix, head[:-1] + bytes([head[-1] + 1]) if head else b"\0")

    def after(self, key: bytes) -> KeyRange | None:
        """Return the part above `key`, None when nothing is."""
        start = key + b"\0"
        if not self.end or (self.end != b"\0" and start >= self.end):
            return None
        return KeyRange(start, self.end)

    def __contains__(self, key: bytes) -> bool:
        if not self.end:
            return key == self.start
        return key >= self.start and (self.end == b"\0" or key < self.end)


@dataclass(frozen=True, slots=True)
class RangeResult:
    """What a read returned, as of `revision`; `count` counts the range whatever the limit."""

    revision: int
    kvs: tuple[KeyValue, ...]
    more: bool
    count: int


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a listing of one `revision`. On `first`, forget earlier pages: a listing may start over."""

    revision: int
    kvs: tuple[KeyValue, ...]
    first: bool
    last: bool


@dataclass(frozen=True, slots=True)
class Changes:
    """Whole revisions of events, in order; everything up to `revision` has now been seen."""

    revision: int
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Progress:
    """No event up to `revision` is still to come."""

    revision: int


@dataclass(frozen=True, slots=True)
class LeaseInfo:
    """A lease as the server sees it: remaining and granted seconds, and its keys when asked for."""

    lease: int
    remaining_s: int
    granted_s: int
    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Member:
    """A member of the etcd cluster."""

    member: int
    name: str
    peer_urls: tuple[str, ...]
    client_urls: tuple[str, ...]
    learner: bool


@dataclass(frozen=True, slots=True)
class Status:
    """One member's state; sizes in bytes, `errors` are active alarms and the like."""

    version: str
    member: int
    leader: int
    revision: int
    db_bytes: int
    db_in_use_bytes: int
    raft_term: int
    raft_index: int
    raft_applied_index: int
    learner: bool
    errors: tuple[str, ...]


class AlarmKind(Enum):
    """Alarms that etcd raises."""

    NO_SPACE = "NOSPACE"
    CORRUPT = "CORRUPT"


@dataclass(frozen=True, slots=True)
class Alarm:
    """An alarm of one member."""

    member: int
    kind: AlarmKind
