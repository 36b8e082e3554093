"""A log's keys read back: any history, any cut, any damage. Model: the entries that were written."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_service.core.errors import RemoteProtocolError
from cache_service.core.ids import Namespace, SiteId
from cache_service.core.log import LogEntry, LogPosition, Segment, Snapshot
from cache_service.replication.core import layout
from cache_service.replication.core.layout import Head, LogKeys, frames, namespace_id
from cache_service.replication.core.reading import LogReader
from cache_service.replication.core.stream import (
    Ask,
    EntryReader,
    Hello,
    decode_ask,
    decode_hello,
    encode_entry,
)

KEYS = LogKeys(Namespace("m", 64), SiteId("A"))


class Store:
    """The keys of one log, and each change of them as a watch would tell it."""

    def __init__(self) -> None:
        self.keys: dict[bytes, bytes] = {}
        self.events: list[tuple[bytes, bytes | None]] = []
        self.epoch, self.seq, self.content = 0, 0, b""

    def put(self, key: bytes, value: bytes) -> None:
        self.keys[key] = value
        self.events.append((key, value))

    def delete(self, keys: list[bytes]) -> None:
        for key in keys:
            del self.keys[key]
            self.events.append((key, None))

    def begin(self) -> None:
        self.epoch, self.seq, self.content = self.epoch + 1, 0, b""
        self.delete([key for key in self.keys if key != KEYS.head])
        self.put(KEYS.head, Head(self.epoch, 0, 0).encode())

    def append(self, payload: bytes) -> None:
        self.seq += 1
        self.content += payload
        for part, value in enumerate(frames(payload)):
            self.put(KEYS.segment(self.epoch, self.seq, part), value)

    def snapshot(self) -> None:
        prefix = KEYS.snapshot(self.epoch, self.seq)
        parts = frames(self.content)
        for number, value in enumerate(parts):
            self.put(prefix + b"%04x" % number, value)
        self.put(KEYS.head, Head(self.epoch, self.seq, len(parts)).encode())
        self.delete([key for key in self.keys if key.startswith(KEYS.log)])
        self.delete([k for k in self.keys if k.startswith(KEYS.snapshots) and not k.startswith(prefix)])


class Follower:
    """A reader whose content is the concatenation of what it was told."""

    def __init__(self) -> None:
        self.reader = LogReader(KEYS, None)
        self.content, self.rebuilds = b"", 0

    def take(self, entries: list[LogEntry]) -> None:
        for entry in entries:
            if isinstance(entry, Snapshot):
                self.content, self.rebuilds = b"", self.rebuilds + 1
            self.content += entry.payload

    def list(self, store: Store, rng: random.Random) -> None:
        items = sorted(store.keys.items())
        cut = rng.randint(0, len(items))
        self.take(self.reader.page(items[:cut], first=True, last=False))
        self.take(self.reader.page(items[cut:], first=False, last=True))

    def event(self, key: bytes, value: bytes | None) -> None:
        self.take(self.reader.deleted(key) if value is None else self.reader.put(key, value))


@given(st.integers(0, 2**32))
def test_any_history(seed: int) -> None:
    """Readers that list at any time, follow events, and list again, end at what was written."""
    rng, store, followers = random.Random(seed), Store(), [Follower() for _ in range(3)]
    at: list[int | None] = [None] * 3
    small = layout.MAX_PART_BYTES
    layout.MAX_PART_BYTES = 4
    try:
        store.begin()
        for _ in range(60):
            kind = rng.random()
            if kind < 0.7:
                store.append(bytes([rng.randrange(256)]) * rng.randint(0, 12))
            elif kind < 0.85:
                store.snapshot()
            elif kind < 0.9:
                store.begin()
            for number, follower in enumerate(followers):
                position = at[number]
                if position is None or rng.random() < 0.05:
                    if rng.random() < 0.2:
                        follower.list(store, rng)
                        at[number] = len(store.events)
                elif rng.random() < 0.5:
                    for event in store.events[position:]:
                        follower.event(*event)
                    at[number] = len(store.events)
        for follower in followers:
            follower.list(store, rng)
            assert follower.content == store.content
            assert follower.reader.position == LogPosition(store.epoch, store.seq)
    finally:
        layout.MAX_PART_BYTES = small


def test_a_reader_that_kept_up_is_not_rebuilt() -> None:
    """Snapshots and new listings do not start a reader over that has what they say."""
    store, follower, rng = Store(), Follower(), random.Random(0)
    store.begin()
    follower.list(store, rng)
    for _ in range(3):
        store.append(b"x")
        follower.list(store, rng)
        store.snapshot()
        follower.list(store, rng)
    assert (follower.content, follower.rebuilds) == (b"xxx", 1)


@given(st.binary(max_size=64), st.sampled_from(["head", "segment", "next", "snapshot", "other"]))
def test_damage_is_refused_or_ignored(value: bytes, where: str) -> None:
    """Whatever is written to a key of ours, a reader raises RemoteProtocolError or goes on."""
    reader = LogReader(KEYS, None)
    reader.page([(KEYS.head, Head(1, 0, 0).encode())], first=True, last=True)
    key = {
        "head": KEYS.head,
        "segment": KEYS.segment(1, 1),
        "next": KEYS.segment(1, 9),
        "snapshot": KEYS.snapshot(1, 1) + b"0000",
        "other": KEYS.log + b"nonsense",
    }[where]
    with suppress(RemoteProtocolError):
        reader.put(key, value)
    with suppress(RemoteProtocolError):
        LogReader(KEYS, None).page([(key, value)], first=True, last=True)


def test_a_deleted_log_says_so() -> None:
    """The head's lease ran out: a reader forgets, once."""
    store, follower = Store(), Follower()
    store.begin()
    store.append(b"x")
    follower.list(store, random.Random(0))
    follower.event(KEYS.head, None)
    assert (follower.content, follower.rebuilds) == (b"", 2)


def test_namespace_ids() -> None:
    """Other namespaces have other keys; the salt does not count, as it has seeded the hashes."""
    ids = {namespace_id(Namespace(*fields)) for fields in (("m", 64), ("m", 32), ("m", 64, "r"), ("n", 64))}
    assert len(ids) == 4
    assert namespace_id(Namespace("m", 64, salt="x")) == namespace_id(Namespace("m", 64))


@given(st.integers(0, 2**60), st.integers(0, 2**60), st.binary(max_size=40), st.booleans())
def test_stream_messages_round_trip(epoch: int, seq: int, payload: bytes, whole: bool) -> None:
    """Entries, questions and greetings come back as they went."""
    entry = (Snapshot if whole else Segment)(LogPosition(epoch, seq), payload)
    reader = EntryReader()
    assert [reader.take(message) for message in encode_entry(entry)] == [entry]
    assert decode_ask(Ask("ns", entry.position).encode()) == Ask("ns", entry.position)
    assert decode_hello(Hello("A", 8).encode()) == Hello("A", 8)


@given(st.binary(max_size=100))
def test_stream_garbage_is_refused(message: bytes) -> None:
    """Bytes that are no message raise RemoteProtocolError or nothing."""
    for read in (decode_ask, decode_hello, EntryReader().take):
        with suppress(RemoteProtocolError):
            read(message)


@pytest.mark.parametrize(
    "message", [b"[]", b'{"site": "A", "stride": 0}', b'{"site": 1, "stride": 1}', b"\xff"]
)
def test_wrong_hellos(message: bytes) -> None:
    """A greeting without a site and a stride is refused."""
    with pytest.raises(RemoteProtocolError):
        decode_hello(message)
