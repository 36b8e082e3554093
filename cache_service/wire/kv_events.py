"""SGLang's KV event batches: msgpack -> core events.

Decides what of a batch is usable: an event that cannot be true is refused alone, a payload that is no batch
is refused whole. Token ids are skipped unread, the hashes say all we need.

The outside fact, from SGLang 0.5.21 `srt/disaggregation/kv_events.py`: a batch is the array `[ts, events,
attn_dp_rank]`, an event a map whose `type` is the class name, with optional fields left out when None.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from cache_service.core import events
from cache_service.core.errors import RemoteProtocolError
from cache_service.core.index_types import Needs


class _BlockStored(msgspec.Struct, tag="BlockStored", gc=False):
    block_hashes: list[int]
    block_size: int
    parent_block_hash: int | None = None
    medium: str | None = None


class _BlockRemoved(msgspec.Struct, tag="BlockRemoved", gc=False):
    block_hashes: list[int]
    medium: str | None = None


class _AllBlocksCleared(msgspec.Struct, tag="AllBlocksCleared", gc=False):
    pass


_WireEvent = _BlockStored | _BlockRemoved | _AllBlocksCleared


class _Batch(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[_WireEvent]
    attn_dp_rank: int | None = None


class _RawBatch(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[msgspec.Raw]
    attn_dp_rank: int | None = None


#: Text that is not UTF-8 raises Python's own error.
_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError)

_BATCH = msgspec.msgpack.Decoder(_Batch)
_RAW_BATCH = msgspec.msgpack.Decoder(_RawBatch)
_EVENT = msgspec.msgpack.Decoder(_WireEvent)


E = TypeVar("E")


@dataclass(frozen=True, slots=True)
class Batch(Generic[E]):
    """One published batch.

    Attributes:
        sent_unix_s: wall clock of the publisher.
        events: the usable events, in order.
        refused: for each event that was not usable, what was wrong with it.
        needs: what the worker's model needs, where the batch says it (only our plugin's stream does).
    """

    sent_unix_s: float
    events: tuple[E, ...]
    refused: tuple[RemoteProtocolError, ...]
    needs: Needs | None = None


def decode_batch(payload: bytes, *, page_size: int, dp_rank: int) -> Batch[events.Event]:
    """Decode one batch of the source with `dp_rank`.

    Raises RemoteProtocolError when the payload is no batch, or one of another data-parallel rank.
    """
    refused: list[RemoteProtocolError] = []
    decoded: list[_WireEvent]
    try:
        batch = _BATCH.decode(payload)
        sent_unix_s, rank, decoded = batch.ts, batch.attn_dp_rank, batch.events
    except _UNDECODABLE:
        sent_unix_s, rank, decoded = _decode_one_by_one(payload, refused)
    if rank is not None and rank != dp_rank:
        raise RemoteProtocolError(
            f"attn_dp_rank: {rank}, but this stream is configured as rank {dp_rank}", reason="dp_rank"
        )
    usable: list[events.Event] = []
    for item in decoded:
        try:
            usable.append(_core_event(item, page_size))
        except RemoteProtocolError as error:
            refused.append(error)
    return Batch(sent_unix_s, tuple(usable), tuple(refused))


def _decode_one_by_one(
    payload: bytes, refused: list[RemoteProtocolError]
) -> tuple[float, int | None, list[_WireEvent]]:
    """Save what can be saved of a batch with an event that we do not know."""
    try:
        batch = _RAW_BATCH.decode(payload)
    except _UNDECODABLE as error:
        raise RemoteProtocolError(f"not a KV event batch: {error}", reason="garbage") from error
    decoded: list[_WireEvent] = []
    for raw in batch.events:
        try:
            decoded.append(_EVENT.decode(raw))
        except _UNDECODABLE as error:
            refused.append(RemoteProtocolError(f"not a known KV event: {error}", reason="unknown_event"))
    return batch.ts, batch.attn_dp_rank, decoded


def _core_event(item: _WireEvent, page_size: int) -> events.Event:
    if isinstance(item, _BlockStored):
        return events.stored(
            item.block_hashes,
            item.parent_block_hash,
            medium=item.medium,
            block_tokens=item.block_size,
            page_size=page_size,
        )
    if isinstance(item, _BlockRemoved):
        return events.removed(item.block_hashes, medium=item.medium)
    return events.AllCleared()
