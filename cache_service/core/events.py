"""What a worker says about its KV cache, as validated values.

An event is refused here, whole, when it cannot be true of a chained-hash cache; nothing behind this line
checks again. It must not know how events travel (`wire/kv_events.py` decodes SGLang's msgpack).

The outside fact: SGLang 0.5.21 `srt/disaggregation/kv_events.py`. A BlocksStored is a run of consecutive
blocks below `parent`; the same block is stored once per tier that gets a copy and removed once per tier
that loses it. Its events say nothing about states and windows; our plugin's do (GroupStored, GroupRemoved).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum

from cache_service.core.errors import RemoteProtocolError
from cache_service.core.ids import BlockHash

#: A run longer than this is no prompt (2^20 blocks of one token: a million-token context at page 1).
MAX_BLOCKS_PER_EVENT = 1 << 20
_INT64 = range(-(1 << 63), 1 << 63)


class Tier(IntEnum):
    """Where a worker keeps a copy; a block is held while any tier has one. The values go on the wire."""

    GPU = 0
    HOST = 1
    DISK = 2
    EXTERNAL = 3


class Group(StrEnum):
    """What a hybrid model keeps beside the full-attention blocks, which BlocksStored is about.

    STATE is a snapshot of the linear layers' state at the boundary behind a block; SWA says that the block's
    sliding-window KV is present.
    """

    STATE = "state"
    SWA = "swa"


#: SGLang's StorageMedium values, and "CPU" as vLLM writes it; no medium means the device.
TIER_OF_MEDIUM: dict[str | None, Tier] = {
    None: Tier.GPU,
    "GPU": Tier.GPU,
    "CPU_PINNED": Tier.HOST,
    "CPU": Tier.HOST,
    "DISK": Tier.DISK,
    "EXTERNAL": Tier.EXTERNAL,
}


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """A worker holds `hashes` in `tier`, each the parent of the next; `parent` is None below the root."""

    hashes: tuple[BlockHash, ...]
    parent: BlockHash | None
    tier: Tier = Tier.GPU

    def __post_init__(self) -> None:
        _check_hashes("stored", self.hashes)
        if self.parent is not None:
            if self.parent not in _INT64:
                raise RemoteProtocolError(f"stored.parent: {self.parent} is not a signed 64-bit hash")
            if self.parent in self.hashes:
                raise RemoteProtocolError(f"stored.parent: {self.parent} is one of the blocks: a cycle")


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """A worker no longer holds `hashes` in `tier`."""

    hashes: tuple[BlockHash, ...]
    tier: Tier = Tier.GPU

    def __post_init__(self) -> None:
        _check_hashes("removed", self.hashes)


@dataclass(frozen=True, slots=True)
class AllCleared:
    """A worker holds nothing any more, in no tier."""


@dataclass(frozen=True, slots=True)
class GroupStored:
    """A worker holds `group` at each of `hashes` in `tier`; the blocks need not be one chain."""

    group: Group
    hashes: tuple[BlockHash, ...]
    tier: Tier = Tier.GPU

    def __post_init__(self) -> None:
        _check_group("group_stored", self.group)
        _check_hashes("group_stored", self.hashes)


@dataclass(frozen=True, slots=True)
class GroupRemoved:
    """A worker no longer holds `group` at `hashes` in `tier`."""

    group: Group
    hashes: tuple[BlockHash, ...]
    tier: Tier = Tier.GPU

    def __post_init__(self) -> None:
        _check_group("group_removed", self.group)
        _check_hashes("group_removed", self.hashes)


Event = BlocksStored | BlocksRemoved | GroupStored | GroupRemoved | AllCleared


def stored(
    hashes: Sequence[int], parent: int | None, *, medium: str | None, block_tokens: int, page_size: int
) -> BlocksStored:
    """Build a BlocksStored from an engine's values.

    Raises RemoteProtocolError, naming the field, for an unknown medium, a block of another size than
    `page_size` (its name is not comparable with ours), or hashes that cannot be a chain.
    """
    if block_tokens != page_size:
        raise RemoteProtocolError(
            f"stored.block_size: {block_tokens} tokens, but this namespace has pages of {page_size}",
            reason="block_size",
        )
    return BlocksStored(
        tuple(BlockHash(value) for value in hashes),
        None if parent is None else BlockHash(parent),
        tier_of(medium),
    )


def removed(hashes: Sequence[int], *, medium: str | None) -> BlocksRemoved:
    """Build a BlocksRemoved from an engine's values; raises RemoteProtocolError naming the field."""
    return BlocksRemoved(tuple(BlockHash(value) for value in hashes), tier_of(medium))


def tier_of(medium: str | None) -> Tier:
    """Return the tier of an engine's medium; raises RemoteProtocolError for one that we do not know."""
    tier = TIER_OF_MEDIUM.get(medium)
    if tier is None:
        known = ", ".join(str(name) for name in TIER_OF_MEDIUM if name)
        raise RemoteProtocolError(f"medium: {medium!r} is not one of {known}", reason="medium")
    return tier


def _check_group(field: str, group: str) -> None:
    if group not in tuple(Group):
        raise RemoteProtocolError(
            f"{field}.group: {group!r} is not one of {', '.join(Group)}", reason="group"
        )


def _check_hashes(field: str, hashes: tuple[BlockHash, ...]) -> None:
    if not hashes:
        raise RemoteProtocolError(f"{field}.hashes: is empty")
    if len(hashes) > MAX_BLOCKS_PER_EVENT:
        raise RemoteProtocolError(
            f"{field}.hashes: {len(hashes)} blocks, at most {MAX_BLOCKS_PER_EVENT} in an event"
        )
    if min(hashes) not in _INT64 or max(hashes) not in _INT64:
        raise RemoteProtocolError(f"{field}.hashes: a value is not a signed 64-bit hash")
    if len(set(hashes)) != len(hashes):
        raise RemoteProtocolError(f"{field}.hashes: a block appears twice")
