"""vLLM's KV event batches: msgpack -> core events, with our names for its blocks.

Decides what of a batch is usable and which block an engine's hash stands for. vLLM's hashes are its own (and
random per process by default), so ours are computed from the token ids; a removal has only the engine's hash,
so the known ones are kept, up to a bound. What falls out of the bound is said to be removed: a block that
could not be taken back is not claimed.

The outside facts, from vLLM `vllm/distributed/kv_events.py`: a batch is the array `[ts, events, dp_rank]`, an
event a tagged array (newer releases: a tagged map) whose hashes are integers or bytes. Events of a LoRA
adapter or with extra_keys (cache salt, multimodal inputs) belong to tokens of another meaning; events of a
group that is not full attention are not about blocks as the index means them. Both are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from cache_service.core import blocks, events
from cache_service.core.errors import ConfigError, RemoteProtocolError
from cache_service.core.events import Event, Tier
from cache_service.wire.kv_events import Batch

_Hash = int | bytes
#: Some 200 bytes each.
MAX_BLOCKS = 1 << 20
_FULL_ATTENTION = (None, "full_attention", "mla_attention")
_MAX_GROUPS = 64


class _Stored(msgspec.Struct, tag="BlockStored", gc=False):
    block_hashes: list[_Hash]
    parent_block_hash: _Hash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[Any] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class _Removed(msgspec.Struct, tag="BlockRemoved", gc=False):
    block_hashes: list[_Hash]
    medium: str | None = None
    group_idx: int | None = None


class _Cleared(msgspec.Struct, tag="AllBlocksCleared", gc=False):
    pass


class _StoredArray(_Stored, array_like=True, tag="BlockStored", gc=False):
    pass


class _RemovedArray(_Removed, array_like=True, tag="BlockRemoved", gc=False):
    pass


class _ClearedArray(_Cleared, array_like=True, tag="AllBlocksCleared", gc=False):
    pass


class _Batch(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[msgspec.Raw]
    data_parallel_rank: int | None = None


WireEvent = _Stored | _Removed | _Cleared

_BATCH = msgspec.msgpack.Decoder(_Batch)
_MAP = msgspec.msgpack.Decoder(_Stored | _Removed | _Cleared)
_ARRAY = msgspec.msgpack.Decoder(_StoredArray | _RemovedArray | _ClearedArray)


def decode_batch(payload: bytes, *, dp_rank: int) -> Batch[WireEvent]:
    """Decode one batch of the source with `dp_rank`; its events are for `VllmBlocks.translate`.

    Raises RemoteProtocolError when the payload is no batch, or one of another data-parallel rank.
    """
    try:
        batch = _BATCH.decode(payload)
    except msgspec.DecodeError as error:
        raise RemoteProtocolError(f"not a KV event batch: {error}", reason="garbage") from error
    rank = batch.data_parallel_rank
    if rank is not None and rank != dp_rank:
        raise RemoteProtocolError(
            f"data_parallel_rank: {rank}, but this stream is configured as rank {dp_rank}", reason="dp_rank"
        )
    decoded: list[WireEvent] = []
    refused: list[RemoteProtocolError] = []
    for raw in batch.events:
        first = bytes(raw)[:1]
        is_map = first != b"" and (0x80 <= first[0] <= 0x8F or first[0] in (0xDE, 0xDF))
        try:
            decoded.append((_MAP if is_map else _ARRAY).decode(raw))
        except msgspec.DecodeError as error:
            refused.append(RemoteProtocolError(f"not a known KV event: {error}", reason="unknown_event"))
    return Batch(batch.ts, tuple(decoded), tuple(refused))


class VllmBlocks:
    """The blocks of one vLLM worker: the engine's hash -> our digest, and the tiers that have a copy.

    `max_blocks` bounds the table.
    """

    def __init__(self, page_size: int, *, max_blocks: int = MAX_BLOCKS) -> None:
        self._page_size = page_size
        self._max_blocks = max_blocks
        self._known: dict[_Hash, tuple[bytes, int]] = {}
        self._groups: set[int] = set()

    def __len__(self) -> int:
        return len(self._known)

    def forget(self) -> None:
        """Start over: the worker's blocks were dropped from the index."""
        self._known.clear()
        self._groups.clear()

    def translate(self, wire: Iterable[WireEvent]) -> tuple[list[Event], list[RemoteProtocolError]]:
        """Return core events, in order, and for each event that was not usable what was wrong with it."""
        usable: list[Event] = []
        refused: list[RemoteProtocolError] = []
        for item in wire:
            try:
                if isinstance(item, _Stored):
                    usable += self._stored(item)
                elif isinstance(item, _Removed):
                    usable += self._removed(item)
                else:
                    self.forget()
                    usable.append(events.AllCleared())
            except RemoteProtocolError as error:
                refused.append(error)
        return usable, refused

    def _stored(self, item: _Stored) -> list[Event]:
        self._check(item)
        parent = None
        if item.parent_block_hash is not None:
            known = self._known.get(item.parent_block_hash)
            if known is None:
                raise RemoteProtocolError("stored.parent_block_hash: not a known block", reason="parent")
            parent = known[0]
        try:
            digests = list(blocks.block_digests(item.token_ids, self._page_size, seed=parent))
        except ConfigError as error:
            raise RemoteProtocolError(f"stored.{error}") from error
        if len(digests) != len(item.block_hashes):
            raise RemoteProtocolError(
                f"stored.token_ids: {len(item.token_ids)} for {len(item.block_hashes)} blocks of "
                f"{item.block_size}"
            )
        event = events.stored(
            [blocks.event_hash(digest) for digest in digests],
            None if parent is None else blocks.event_hash(parent),
            medium=item.medium,
            block_tokens=item.block_size,
            page_size=self._page_size,
        )
        for name, digest in zip(item.block_hashes, digests, strict=True):
            _, tiers = self._known.pop(name, (b"", 0))
            self._known[name] = (digest, tiers | 1 << event.tier)
        if item.group_idx is not None:
            self._groups.add(item.group_idx)
        return [event, *self._overflow()]

    def _check(self, item: _Stored) -> None:
        if item.lora_id is not None or item.lora_name is not None:
            raise RemoteProtocolError("stored.lora: blocks of an adapter are not indexed", reason="namespace")
        if any(item.extra_keys or ()):
            raise RemoteProtocolError(
                "stored.extra_keys: salted or multimodal blocks are not indexed", reason="namespace"
            )
        if item.kv_cache_spec_kind not in _FULL_ATTENTION:
            raise RemoteProtocolError(
                f"stored.kv_cache_spec_kind: {item.kv_cache_spec_kind!r} is not full attention",
                reason="group",
            )
        if len(self._groups) >= _MAX_GROUPS:
            raise RemoteProtocolError(f"stored.group_idx: more than {_MAX_GROUPS} groups", reason="group")

    def _removed(self, item: _Removed) -> list[Event]:
        if item.group_idx is not None and item.group_idx not in self._groups:
            return []
        tier = events.tier_of(item.medium)
        gone = []
        for name in item.block_hashes:
            digest, tiers = self._known.get(name, (b"", 0))
            if not tiers & 1 << tier:
                continue
            gone.append(digest)
            if tiers == 1 << tier:
                del self._known[name]
            else:
                self._known[name] = (digest, tiers & ~(1 << tier))
        return _removals(gone, tier)

    def _overflow(self) -> list[Event]:
        gone: dict[Tier, list[bytes]] = {}
        while len(self._known) > self._max_blocks:
            digest, tiers = self._known.pop(next(iter(self._known)))
            for tier in Tier:
                if tiers & 1 << tier:
                    gone.setdefault(tier, []).append(digest)
        return [event for tier, digests in gone.items() for event in _removals(digests, tier)]


def _removals(digests: Sequence[bytes], tier: Tier) -> list[Event]:
    unique = tuple(dict.fromkeys(map(blocks.event_hash, digests)))
    return [events.BlocksRemoved(unique, tier)] if unique else []
