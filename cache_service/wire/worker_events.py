"""The event stream of a worker with our plugin: core events <-> msgpack (docs/kv-events.md).

Decides the bytes of a batch and of a page of a full dump, and what of them is usable; an event that cannot be
true is refused alone, a payload that is no batch is refused whole. It must not know sockets. The plugin
encodes, the cache service decodes; hashes travel as packed little-endian int64, eight bytes a block.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from cache_service.core import events
from cache_service.core.errors import RemoteProtocolError
from cache_service.core.ids import BlockHash
from cache_service.core.index_types import Needs
from cache_service.wire.kv_events import Batch

VERSION = 1
#: Second frame of a request for a page of a dump; a replay request has none.
DUMP = b"dump"
#: A page is closed above this; one event, at most 8 MiB, may exceed it.
PAGE_BYTES = 1 << 17
MAX_PAGES = 4096


@dataclass(frozen=True, slots=True)
class Declaration:
    """What a worker says of itself first: tokens per page, and what its model needs (see `Needs`)."""

    page_size: int
    needs: Needs


Item = events.Event | Declaration


class _Declared(msgspec.Struct, array_like=True, tag=0, gc=False):
    page_size: int
    state: bool
    window_blocks: int


class _Stored(msgspec.Struct, array_like=True, tag=1, gc=False):
    hashes: bytes
    parent: int | None
    tier: int


class _Removed(msgspec.Struct, array_like=True, tag=2, gc=False):
    hashes: bytes
    tier: int


class _GroupStored(msgspec.Struct, array_like=True, tag=3, gc=False):
    group: str
    hashes: bytes
    tier: int


class _GroupRemoved(msgspec.Struct, array_like=True, tag=4, gc=False):
    group: str
    hashes: bytes
    tier: int


class _Cleared(msgspec.Struct, array_like=True, tag=5, gc=False):
    pass


_Wire = _Declared | _Stored | _Removed | _GroupStored | _GroupRemoved | _Cleared


class _Batch(msgspec.Struct, array_like=True, gc=False):
    version: int
    sent_unix_s: float
    dp_rank: int
    events: list[_Wire]


class _Page(msgspec.Struct, array_like=True, gc=False):
    version: int
    dump: int
    page: int
    pages: int
    seq: int
    anchor: bytes
    events: list[_Wire]


_BATCH = msgspec.msgpack.Decoder(_Batch)
_PAGE = msgspec.msgpack.Decoder(_Page)
_ENCODER = msgspec.msgpack.Encoder()


B = TypeVar("B", covariant=True)


@dataclass(frozen=True, slots=True)
class DumpPage(Generic[B]):
    """One page of a worker's full dump.

    Attributes:
        dump: which dump; the pages of one dump belong together.
        page, pages: which of how many; `pages` is 0 when the worker no longer has that dump.
        seq: the dump holds every batch of the stream up to and with this one, and nothing after it.
        anchor: the payload of that batch.
        batch: the events that rebuild this part of the content.
    """

    dump: int
    page: int
    pages: int
    seq: int
    anchor: bytes
    batch: B


def encode_batch(sent_unix_s: float, dp_rank: int, items: Iterable[Item]) -> bytes:
    """Return the payload of one batch."""
    return _ENCODER.encode(_Batch(VERSION, sent_unix_s, dp_rank, [_to_wire(item) for item in items]))


def encode_dump(dump: int, seq: int, anchor: bytes, items: Iterable[Item]) -> list[bytes]:
    """Return the pages of a dump, at least one; see `DumpPage`."""
    parts = list(_paged(map(_to_wire, items)))
    return [
        _ENCODER.encode(_Page(VERSION, dump, number, len(parts), seq, anchor, part))
        for number, part in enumerate(parts)
    ]


def gone(dump: int) -> bytes:
    """Return the answer to a request for a page of a dump that is no longer kept."""
    return _ENCODER.encode(_Page(VERSION, dump, 0, 0, 0, b"", []))


def dump_request(dump: int, page: int) -> list[bytes]:
    """Return the frames, behind the empty one, that ask for a page; dump 0 asks for a recent one."""
    return [page.to_bytes(8, "big"), DUMP, dump.to_bytes(8, "big")]


def decode_batch(payload: bytes, *, page_size: int, dp_rank: int) -> Batch[events.Event]:
    """Decode one batch of the source with `dp_rank`.

    Raises RemoteProtocolError when the payload is no batch, of another version or data-parallel rank, or
    declares another page size.
    """
    try:
        batch = _BATCH.decode(payload)
    except msgspec.DecodeError as error:
        raise RemoteProtocolError(f"not a batch of worker events: {error}", reason="garbage") from error
    _check_version(batch.version)
    if batch.dp_rank != dp_rank:
        raise RemoteProtocolError(
            f"dp_rank: {batch.dp_rank}, but this stream is configured as rank {dp_rank}", reason="dp_rank"
        )
    return _usable(batch.sent_unix_s, batch.events, page_size)


def decode_page(payload: bytes, *, page_size: int) -> DumpPage[Batch[events.Event]]:
    """Decode one page of a dump. Raises RemoteProtocolError as `decode_batch` does."""
    try:
        page = _PAGE.decode(payload)
    except msgspec.DecodeError as error:
        raise RemoteProtocolError(f"not a page of a dump: {error}", reason="garbage") from error
    _check_version(page.version)
    if not 0 <= page.page < max(1, page.pages) <= MAX_PAGES:
        raise RemoteProtocolError(f"page: {page.page} of {page.pages}, at most {MAX_PAGES} pages")
    return DumpPage(
        page.dump, page.page, page.pages, page.seq, page.anchor, _usable(0.0, page.events, page_size)
    )


def _check_version(version: int) -> None:
    if version != VERSION:
        raise RemoteProtocolError(f"version: {version}, this service reads {VERSION}", reason="version")


def _usable(sent_unix_s: float, wire: Sequence[_Wire], page_size: int) -> Batch[events.Event]:
    usable: list[events.Event] = []
    refused: list[RemoteProtocolError] = []
    needs = None
    for item in wire:
        if isinstance(item, _Declared):
            needs = _needs(item, page_size)
            continue
        try:
            usable.append(_from_wire(item))
        except RemoteProtocolError as error:
            refused.append(error)
    return Batch(sent_unix_s, tuple(usable), tuple(refused), needs)


def _needs(item: _Declared, page_size: int) -> Needs:
    if item.page_size != page_size:
        raise RemoteProtocolError(
            f"declared.page_size: {item.page_size} tokens, but this namespace has pages of {page_size}",
            reason="block_size",
        )
    if item.window_blocks < 0:
        raise RemoteProtocolError(f"declared.window_blocks: {item.window_blocks} is negative")
    return Needs(item.state, item.window_blocks)


def _paged(wire: Iterable[_Wire]) -> Iterator[list[_Wire]]:
    part: list[_Wire] = []
    size = 0
    for item in wire:
        if part and size > PAGE_BYTES:
            yield part
            part, size = [], 0
        part.append(item)
        size += 16 + len(getattr(item, "hashes", b""))
    yield part


def _to_wire(item: Item) -> _Wire:
    match item:
        case Declaration():
            return _Declared(item.page_size, item.needs.state, item.needs.window_blocks)
        case events.BlocksStored():
            return _Stored(_pack(item.hashes), item.parent, item.tier)
        case events.BlocksRemoved():
            return _Removed(_pack(item.hashes), item.tier)
        case events.GroupStored():
            return _GroupStored(item.group, _pack(item.hashes), item.tier)
        case events.GroupRemoved():
            return _GroupRemoved(item.group, _pack(item.hashes), item.tier)
        case events.AllCleared():
            return _Cleared()


def _from_wire(item: _Stored | _Removed | _GroupStored | _GroupRemoved | _Cleared) -> events.Event:
    if isinstance(item, _Cleared):
        return events.AllCleared()
    hashes = _unpack(item.hashes)
    try:
        tier = events.Tier(item.tier)
    except ValueError as error:
        raise RemoteProtocolError(f"tier: {item.tier} is not in 0..{max(events.Tier)}") from error
    if isinstance(item, _Stored):
        return events.BlocksStored(hashes, None if item.parent is None else BlockHash(item.parent), tier)
    if isinstance(item, _Removed):
        return events.BlocksRemoved(hashes, tier)
    if item.group not in tuple(events.Group):
        raise RemoteProtocolError(f"group: {item.group!r} is not one of {', '.join(events.Group)}")
    make = events.GroupStored if isinstance(item, _GroupStored) else events.GroupRemoved
    return make(events.Group(item.group), hashes, tier)


def _pack(hashes: Sequence[int]) -> bytes:
    packed = array("q", hashes)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _unpack(packed: bytes) -> tuple[BlockHash, ...]:
    if len(packed) % 8:
        raise RemoteProtocolError(f"hashes: {len(packed)} bytes are not a number of 8-byte hashes")
    values = array("q")
    values.frombytes(packed)
    if sys.byteorder == "big":
        values.byteswap()
    return tuple(map(BlockHash, values))
