"""Packed binary form of index changes: what a delta log carries from a service to its replicas.

Decides the bytes of a segment or a snapshot; it must not know where they are kept. A snapshot is a segment
that starts from nothing. Little-endian throughout:

    header    magic "PXD1"  u16 sources  u32 changes  | per source: u8 length, worker id (ASCII), u16 dp rank
    change    u16 source  u8 kind  u8 tier  u32 hashes | i64 parent (BELOW only) | i64 hash, `hashes` times
    declared  u16 source  u8 kind  u8 needs a state  u32 window in blocks

One stored block costs 8 bytes beside its run's 8 or 16.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cache_service.core.errors import ConfigError, RemoteProtocolError
from cache_service.core.events import (
    MAX_BLOCKS_PER_EVENT,
    AllCleared,
    BlocksRemoved,
    BlocksStored,
    Event,
    Group,
    GroupRemoved,
    GroupStored,
    Tier,
)
from cache_service.core.ids import BlockHash, SourceId, WorkerId, parse_name


@dataclass(frozen=True, slots=True)
class Declared:
    """What a source's model needs beside full-attention blocks (`PrefixIndex.declare`); before, nothing.

    Raises ConfigError for a window that is not in 0..2^20 blocks.
    """

    needs_state: bool
    swa_window_blocks: int

    def __post_init__(self) -> None:
        if not 0 <= self.swa_window_blocks <= MAX_BLOCKS_PER_EVENT:
            raise ConfigError(
                f"swa_window_blocks: {self.swa_window_blocks} is not in 0..{MAX_BLOCKS_PER_EVENT}"
            )


#: What a log says of a source: an event of its cache, or what its model needs.
Change = tuple[SourceId, Event | Declared]

MAGIC = b"PXD1"
_HEADER = struct.Struct("<4sHI")
_SOURCE_TAIL = struct.Struct("<H")
_CHANGE = struct.Struct("<HBBI")
_PARENT = struct.Struct("<q")
_ROOT, _BELOW, _REMOVED, _CLEARED = range(4)
_GROUP_KINDS: dict[type[GroupStored | GroupRemoved], dict[Group, int]] = {
    GroupStored: {Group.STATE: 4, Group.SWA: 6},
    GroupRemoved: {Group.STATE: 5, Group.SWA: 7},
}
_DECLARED = 8
_OF_GROUP_KIND = {
    kind: (make, group) for make, kinds in _GROUP_KINDS.items() for group, kind in kinds.items()
}


def encode(changes: Sequence[Change]) -> bytes:
    """Return the segment of `changes`, in their order."""
    slots: dict[SourceId, int] = {}
    body = bytearray()
    for source, event in changes:
        body += _encode_change(slots.setdefault(source, len(slots)), event)
    head = bytearray(_HEADER.pack(MAGIC, len(slots), len(changes)))
    for source in slots:
        name = source.worker_id.encode("ascii")
        head += bytes([len(name)]) + name + _SOURCE_TAIL.pack(source.dp_rank)
    return bytes(head + body)


def decode(segment: bytes) -> list[Change]:
    """Return the changes of a segment.

    Raises RemoteProtocolError for anything that `encode` does not produce; never reads past the end.
    """
    try:
        return _decode(segment)
    except (struct.error, ValueError, IndexError, ConfigError) as error:
        raise RemoteProtocolError(f"not a delta segment: {error}", reason="segment") from error


def _encode_change(slot: int, event: Event | Declared) -> bytes:
    match event:
        case BlocksStored(hashes, None, tier):
            return _CHANGE.pack(slot, _ROOT, tier, len(hashes)) + _pack(hashes)
        case BlocksStored(hashes, parent, tier):
            return _CHANGE.pack(slot, _BELOW, tier, len(hashes)) + _PARENT.pack(parent) + _pack(hashes)
        case BlocksRemoved(hashes, tier):
            return _CHANGE.pack(slot, _REMOVED, tier, len(hashes)) + _pack(hashes)
        case GroupStored(group, hashes, tier) | GroupRemoved(group, hashes, tier):
            kind = _GROUP_KINDS[type(event)][group]
            return _CHANGE.pack(slot, kind, tier, len(hashes)) + _pack(hashes)
        case AllCleared():
            return _CHANGE.pack(slot, _CLEARED, 0, 0)
        case Declared(needs_state, window):
            return _CHANGE.pack(slot, _DECLARED, needs_state, window)


def _pack(hashes: Iterable[BlockHash]) -> bytes:
    values = tuple(hashes)
    return struct.pack(f"<{len(values)}q", *values)


def _decode(segment: bytes) -> list[Change]:
    magic, n_sources, n_changes = _HEADER.unpack_from(segment)
    if magic != MAGIC:
        raise ValueError(f"begins with {magic!r}, not {MAGIC!r}")
    at = _HEADER.size
    sources: list[SourceId] = []
    for _ in range(n_sources):
        length = segment[at]
        name = segment[at + 1 : at + 1 + length].decode("ascii")
        at += 1 + length
        (dp_rank,) = _SOURCE_TAIL.unpack_from(segment, at)
        at += _SOURCE_TAIL.size
        sources.append(SourceId(WorkerId(parse_name(name, field="worker_id")), dp_rank))
    changes: list[Change] = []
    for _ in range(n_changes):
        slot, kind, tier, count = _CHANGE.unpack_from(segment, at)
        at += _CHANGE.size
        if kind == _DECLARED:
            if tier > 1:
                raise ValueError(f"declared: {tier} is neither 0 nor 1")
            changes.append((sources[slot], Declared(bool(tier), count)))
            continue
        parent = None
        if kind == _BELOW:
            (parent,) = _PARENT.unpack_from(segment, at)
            at += _PARENT.size
        if at + 8 * count > len(segment):
            raise ValueError(f"a change names {count} hashes beyond the end")
        hashes = tuple(map(BlockHash, struct.unpack_from(f"<{count}q", segment, at)))
        at += 8 * count
        changes.append((sources[slot], _event(kind, hashes, parent, Tier(tier))))
    if at != len(segment):
        raise ValueError(f"{len(segment) - at} bytes follow the last change")
    return changes


def _event(kind: int, hashes: tuple[BlockHash, ...], parent: BlockHash | None, tier: Tier) -> Event:
    if kind in (_ROOT, _BELOW):
        return BlocksStored(hashes, parent, tier)
    if kind == _REMOVED:
        return BlocksRemoved(hashes, tier)
    if kind == _CLEARED and not hashes:
        return AllCleared()
    if kind in _OF_GROUP_KIND:
        make, group = _OF_GROUP_KIND[kind]
        return make(group, hashes, tier)
    raise ValueError(f"change kind {kind} with {len(hashes)} hashes")
