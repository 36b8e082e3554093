"""What SGLang's KV events leave out, noted as it happens: linear-state snapshots and sliding windows.

Wraps four methods of one `UnifiedRadixCache` instance; that works with its Rust and its Python tree core.
On the scheduler's thread this only keeps references (microseconds); reading slot numbers out of tensors and
hashing salted prompts is left to the publisher's thread.

The outside facts, from SGLang 0.5.21:
* `insert` with a mamba_value leaves the snapshot at the node that ends the key, unless it says mamba_exist;
* window KV appears by the actions SWARebuild and RecoverSWAWithLockedFull, and goes by any action that frees
  the node's full-attention slots or, alone, FreeComponentDeviceSlot(SWA), which also names full slots;
* states go by FreeComponentDeviceSlot(MAMBA); all of them by `_reset_full`, which records AllBlocksCleared;
* a node's `hash_value` is seeded by extra_key and cache_salt, its events by the salt alone. So two tenants'
  blocks with different extra_keys (LoRA adapters too) have one name in events, which would be a lie to the
  index: blocks and states of a request with an extra_key are not published at all.

Host copies (HiCache) of states and windows are not followed: they are claimed less than they could be.
"""

from __future__ import annotations

import logging
import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.disaggregation.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    ZmqEventPublisher,
)
from sglang.srt.mem_cache.unified_cache.cache_action import (
    FreeComponentDeviceSlot,
    FreeDeviceKV,
    FreeDeviceKVFullOnly,
    RecoverSWAWithLockedFull,
    SWARebuild,
)
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from cache_service.core import blocks, events
from cache_service.core.errors import PrfaasError, RemoteProtocolError
from cache_service.core.events import Event, Group
from cache_service.core.ids import BlockHash
from cache_service.core.index_types import Needs
from prfaas_sglang.config import StateEventsConfig
from prfaas_sglang.core.worker_view import Change, Filled, Freed
from prfaas_sglang.engine.state_publisher import StatePublisher

log = logging.getLogger(__name__)

_SWITCH_S = 2e-4
_KNOWN = {ComponentType.FULL, ComponentType.SWA, ComponentType.MAMBA}


@dataclass(frozen=True, slots=True)
class _Salted:
    """A salted key: the token ids (a copy) whose event hashes stand for the tree's own."""

    token_ids: array[int]
    salt: str


@dataclass(frozen=True, slots=True)
class _Gain:
    group: Group
    hashes: Sequence[str]
    slots: torch.Tensor
    salted: _Salted | None


@dataclass(frozen=True, slots=True)
class _Loss:
    group: Group
    slots: Sequence[torch.Tensor]


def needs_of(tree: UnifiedRadixCache) -> Needs:
    """Return what a match in this tree needs beside full-attention blocks.

    A component that we do not follow makes nothing usable, rather than too much.
    """
    unknown = set(tree.tree_components) - _KNOWN
    if unknown:
        log.warning("prfaas state events: %s is not followed; nothing will be claimed as usable", unknown)
        return Needs(True, 1 << 20)
    window = tree._sliding_window_size if tree.is_swa_enabled else 0
    return Needs(tree.is_mamba_enabled, -(-window // tree.page_size))


def follow(tree: Any, config: StateEventsConfig, dp_rank: int) -> StatePublisher | None:
    """Publish the content of a scheduler's cache from now on; None when it is not a radix cache."""
    if not isinstance(tree, UnifiedRadixCache):
        log.warning("prfaas state events: %s has no prefix cache to follow", type(tree).__name__)
        return None
    needs = needs_of(tree)
    endpoints = [
        ZmqEventPublisher.offset_endpoint_port(endpoint, dp_rank)
        for endpoint in (config.endpoint, config.replay_endpoint)
    ]
    publisher = StatePublisher(
        *endpoints, tree.page_size, needs, dp_rank=dp_rank, ring_batches=config.ring_batches
    )
    _Recorder(tree, needs, publisher.submit)
    # The publisher's thread must not keep the interpreter from the scheduler's for long.
    sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_S))
    return publisher


class _Recorder:
    """Stands in for four methods of one tree. Scheduler thread only."""

    def __init__(self, tree: UnifiedRadixCache, needs: Needs, submit: Callable[[Any], None]) -> None:
        self._tree = tree
        self._page_size = tree.page_size
        self._states, self._windows = tree.is_mamba_enabled, tree.is_swa_enabled
        self._submit = submit
        #: The key of the insert in progress.
        self._key: Any = None
        self._changes: list[_Gain | _Loss] = []
        #: Events taken from the tree before SGLang asked for them.
        self._early: list[Any] = []
        self._insert, self._take = tree.insert, tree.take_events
        self._apply, self._reset = tree._apply_cache_action, tree._reset_full
        tree.insert, tree.take_events = self.insert, self.take_events  # type: ignore[method-assign]
        if self._states or self._windows:
            tree._apply_cache_action = self.apply_action  # type: ignore[method-assign]
            tree._reset_full = self.reset  # type: ignore[method-assign]

    def insert(self, params: Any) -> Any:
        key = params.key
        if key.extra_key is not None:
            return self._insert_unpublished(params)
        self._key = key
        try:
            result = self._insert(params)
        finally:
            self._key = None
        if self._states and params.mamba_value is not None and not result.mamba_exist and len(key):
            node = result.last_device_node
            name = None if node is None else self._tree.tree_core.get_last_hash_value(node)
            if name is not None:
                self._changes.append(_Gain(Group.STATE, (name,), params.mamba_value, _salted(key)))
        return result

    def _insert_unpublished(self, params: Any) -> Any:
        """Insert without a word: its blocks' names in events would be those of the tokens without the key."""
        self._early += self._take()
        gains = len(self._changes)
        result = self._insert(params)
        self._early += [event for event in self._take() if not isinstance(event, BlockStored)]
        losses = [change for change in self._changes[gains:] if isinstance(change, _Loss)]
        self._changes[gains:] = losses
        return result

    def take_events(self) -> list[Any]:
        taken = self._early + self._take() if self._early else self._take()
        if taken or self._changes:
            step = _Step(tuple(taken), self._changes, self._page_size)
            self._early, self._changes = [], []
            self._submit(step)
        return taken

    def apply_action(self, action: Any) -> None:
        kind = type(action)
        if kind is FreeComponentDeviceSlot:
            if action.component_type == ComponentType.MAMBA:
                self._changes.append(_Loss(Group.STATE, tuple(action.indices)))
            elif self._windows:
                self._changes.append(_Loss(Group.SWA, tuple(action.indices)))
        elif self._windows and kind in (FreeDeviceKV, FreeDeviceKVFullOnly):
            self._changes.append(_Loss(Group.SWA, tuple(action.indices)))
        elif kind is SWARebuild:
            self._window(action.node_id, action.source_value)
        elif kind is RecoverSWAWithLockedFull:
            self._window(action.node_id, action.kept_full)
        self._apply(action)

    def _window(self, node: Any, full_slots: torch.Tensor) -> None:
        core = self._tree.tree_core
        key = self._key
        if key is None and core.prefetch_anchor_info(node) != (None, None):
            return  # a namespace whose names we cannot tell outside its insert
        names = core.get_hash_values(node)
        if len(names) * self._page_size == len(full_slots):
            self._changes.append(_Gain(Group.SWA, names, full_slots, None if key is None else _salted(key)))

    def reset(self) -> None:
        self._changes = []
        self._reset()


@dataclass(frozen=True, slots=True)
class _Step:
    """What the publisher's thread works out; see `state_publisher.Step`."""

    taken: Sequence[Any]
    changes: Sequence[_Gain | _Loss]
    page_size: int

    def __call__(self) -> tuple[Iterable[Event], Iterable[Change]]:
        return list(self._blocks()), [self._change(change) for change in self.changes]

    def _blocks(self) -> Iterable[Event]:
        for event in self.taken:
            try:
                yield self._block_event(event)
            except RemoteProtocolError as error:
                log.warning("prfaas state events: %s", error)

    def _block_event(self, event: Any) -> Event:
        if isinstance(event, BlockStored):
            return events.stored(
                event.block_hashes,
                event.parent_block_hash,
                medium=event.medium,
                block_tokens=event.block_size,
                page_size=self.page_size,
            )
        if isinstance(event, BlockRemoved):
            return events.removed(event.block_hashes, medium=event.medium)
        if not isinstance(event, AllBlocksCleared):
            raise PrfaasError(f"unknown KV event {type(event).__name__}")
        return events.AllCleared()

    def _change(self, change: _Gain | _Loss) -> Change:
        stride = 1 if change.group is Group.STATE else self.page_size
        if isinstance(change, _Loss):
            return Freed(change.group, [slot for part in change.slots for slot in _slots(part, stride)])
        hashes = _event_hashes(change.hashes, change.salted, self.page_size)
        return Filled(change.group, hashes, _slots(change.slots, stride) if hashes else [])


def _slots(indices: torch.Tensor, stride: int) -> list[int]:
    """Return slot numbers: state slots as they are, tokens' slots as numbers of their pages."""
    numbers: list[int] = indices.reshape(-1)[::stride].tolist()
    return numbers if stride == 1 else [number // stride for number in numbers]


def _salted(key: Any) -> _Salted | None:
    return None if key.cache_salt is None else _Salted(key.raw_token_ids()[: len(key)], key.cache_salt)


def _event_hashes(names: Sequence[str], salted: _Salted | None, page_size: int) -> list[BlockHash]:
    """Return the names that KV events have for tree nodes' hashes (hex digests), [] when they have none."""
    digests = [bytes.fromhex(name) for name in names]
    if salted is not None:
        # Narrowed once, outside the interpreter; hashing takes this type as it is.
        tokens = array("I")
        tokens.frombytes(
            torch.frombuffer(salted.token_ids, dtype=torch.int64).to(torch.int32).numpy().tobytes()
        )
        tree = blocks.block_digests(tokens, page_size, seed=blocks.storage_namespace_seed(None, salted.salt))
        said = blocks.block_digests(tokens, page_size, seed=blocks.event_namespace_seed(salted.salt))
        of = dict(zip(tree, said, strict=True))
        if not of.keys() >= set(digests):
            return []
        digests = [of[digest] for digest in digests]
    return [blocks.event_hash(digest) for digest in digests]
