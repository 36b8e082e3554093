"""What of a site's blocks other sites are told: only what can matter there, in few bytes.

Decides which changes are published. Published are **anchors**, every `stride`-th block of a chain: an anchor
says that its holder has the whole run of `stride` blocks up to it, so a claim is never more than what is
held, and at most `stride - 1` blocks less. A block below an unknown one has no place in a chain yet: it
waits, unless every block is an anchor (stride 1). A chain's anchors are published once it is `min_blocks`
long (enough for a prefill elsewhere to pay) or one of them was seen `min_seen` times: stored again, or asked
for by a request. An ancestor of what is published is published too. What is published is always taken back.

Groups (linear state, window) go the same way, for anchors that are published: "state" is held at the anchor
itself, any other group along the whole run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cache_service.core.delta import Change
from cache_service.core.errors import ConfigError
from cache_service.core.events import AllCleared, BlocksStored, Event, Tier
from cache_service.core.ids import BlockHash, SourceId

_FULL, _STATE = "full", "state"
_TIER_BITS = 4
_TIERS = (1 << _TIER_BITS) - 1
#: How far a budget may raise the length and the number of sightings that admit a chain.
_MOST_TIGHT = 10


@dataclass(frozen=True, slots=True)
class PublishPolicy:
    """What is worth publishing. `stride` and `min_blocks` in blocks; a budget of 0 means none."""

    stride: int = 8
    min_blocks: int = 32
    min_seen: int = 2
    bytes_per_s: float = 0.0

    def __post_init__(self) -> None:
        for name, most in (("stride", 256), ("min_blocks", 1 << 20), ("min_seen", 1 << 20)):
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(f"publish.{name}: {getattr(self, name)} is not in 1..{most}")
        if self.bytes_per_s < 0:
            raise ConfigError(f"publish.bytes_per_s: {self.bytes_per_s} is below 0; 0 means no budget")


class _Node:
    """A block that somebody holds; `depth` counts from 1, 0 while an ancestor is unknown."""

    __slots__ = ("depth", "held", "parent", "published", "seen")

    def __init__(self) -> None:
        self.parent: BlockHash | None = None
        self.depth = 0
        self.seen = 0
        self.held = 0  # _TIER_BITS a slot
        self.published = 0  # a bit a slot


class PublishFilter:
    """Turns a site's changes into the changes to publish: O(blocks of the change), some 250 B a block."""

    def __init__(self, policy: PublishPolicy) -> None:
        self.policy = policy
        self._nodes: dict[BlockHash, _Node] = {}
        self._children: dict[BlockHash, list[BlockHash]] = {}
        #: A slot stands for one group of one source.
        self._slots: dict[tuple[SourceId, str], int] = {}
        self._names: list[tuple[SourceId, str]] = []
        #: By group, an event to make others from: what kinds of event there are is core/events.py's matter.
        self._stored_like: dict[str, Any] = {}
        #: Doublings of min_blocks, and steps of min_seen, that the budget asks for.
        self.tightened = 0

    @property
    def blocks(self) -> int:
        """How many blocks the filter remembers."""
        return len(self._nodes)

    def known_depth(self, block: BlockHash) -> int:
        """Return a held block's place in its chain, from 1; 0 while that is not known."""
        node = self._nodes.get(block)
        return node.depth if node else 0

    def take(self, source: SourceId, event: Event) -> list[Change]:
        """Note a change that the index has taken; return what to publish, in order."""
        if isinstance(event, AllCleared):
            return self._clear(source)
        group: str = getattr(event, "group", _FULL)
        slot = self._slot(source, group)
        if isinstance(event, BlocksStored):
            late = self._link(event)
            changes = self._stored(slot, event.hashes, event.tier)
            for other in range(len(self._names)) if late else ():
                changes += self._publish(other, late)
            return changes
        if type(event).__name__.endswith("Removed"):
            anchors = self._removed(slot, event.hashes, event.tier)
            return [(source, replace(event, hashes=anchors, tier=Tier.GPU))] if anchors else []
        self._stored_like.setdefault(group, event)
        return self._stored(slot, event.hashes, event.tier)

    def saw(self, hashes: Sequence[BlockHash]) -> list[Change]:
        """Note that a request asked for this chain; return what it made worth publishing."""
        found: list[Change] = []
        for block in hashes[self.policy.stride - 1 :: self.policy.stride]:
            node = self._nodes.get(block)
            if node is None:
                break
            node.seen += 1
            if not self._is_anchor(node):
                continue  # what it says of the blocks above is not known, whatever the request believes
            if node.seen == self.policy.min_seen + self.tightened:
                for slot in range(len(self._names)):
                    if node.held >> slot * _TIER_BITS & _TIERS and not node.published >> slot & 1:
                        found += self._publish(slot, [block])
        return found

    def adapt(self, published_bytes_per_s: float) -> None:
        """Fit what is admitted from now on to the budget, given what the last interval cost."""
        budget = self.policy.bytes_per_s
        if budget and published_bytes_per_s > budget:
            self.tightened = min(self.tightened + 1, _MOST_TIGHT)
        elif published_bytes_per_s < budget / 2:
            self.tightened = max(self.tightened - 1, 0)

    # -- changes ---------------------------------------------------------------------------------------------

    def _stored(self, slot: int, hashes: Iterable[BlockHash], tier: Tier) -> list[Change]:
        bit = 1 << slot * _TIER_BITS + tier
        touched: list[BlockHash] = []
        for block in hashes:
            node = self._nodes.get(block)
            if node is None:
                node = self._nodes[block] = _Node()
            node.held |= bit
            node.seen += 1
            touched.append(block)
        anchors = self._anchors_below(touched, single=self._names[slot][1] == _STATE)
        return self._publish(slot, [a for a in anchors if not self._nodes[a].published >> slot & 1])

    def _removed(self, slot: int, hashes: Iterable[BlockHash], tier: Tier) -> tuple[BlockHash, ...]:
        bit = 1 << slot * _TIER_BITS + tier
        lost = []
        for block in hashes:
            node = self._nodes.get(block)
            if node is None or not node.held & bit:
                continue
            node.held &= ~bit
            if not node.held >> slot * _TIER_BITS & _TIERS:
                lost.append(block)
        anchors = self._anchors_below(lost, single=self._names[slot][1] == _STATE)
        gone = tuple(a for a in anchors if self._nodes[a].published >> slot & 1)
        for anchor in gone:
            self._nodes[anchor].published &= ~(1 << slot)
        for block in lost:
            self._forget_if_unheld(block)
        return gone

    def _clear(self, source: SourceId) -> list[Change]:
        slots = [slot for slot, name in enumerate(self._names) if name[0] == source]
        tiers = sum(_TIERS << slot * _TIER_BITS for slot in slots)
        published = sum(1 << slot for slot in slots)
        any_published = False
        for block in [block for block, node in self._nodes.items() if node.held & tiers]:
            node = self._nodes[block]
            any_published |= bool(node.published & published)
            node.held &= ~tiers
            node.published &= ~published
            self._forget_if_unheld(block)
        return [(source, AllCleared())] if any_published else []

    def _link(self, event: BlocksStored) -> list[BlockHash]:
        """Learn who is whose parent, and the depths that follow; return anchors that this made of others."""
        late: list[BlockHash] = []
        parent = event.parent
        for block in event.hashes:
            node = self._nodes.get(block)
            if node is None:
                node = self._nodes[block] = _Node()
            if node.parent is None and node.depth != 1 and parent is not None:
                node.parent = parent
                self._children.setdefault(parent, []).append(block)
            if not node.depth and (depth := self._place(block, parent)):
                late += self._set_depth(block, depth)
            parent = block
        return late

    def _place(self, block: BlockHash, parent: BlockHash | None) -> int:
        """Return a block's depth by its parent, or by a child that was placed before this block came back."""
        if parent is None:
            return 1
        above = self._nodes.get(parent)
        if above is not None and above.depth:
            return above.depth + 1
        below = (self._nodes[child].depth for child in self._children.get(block, ()))
        return max((depth - 1 for depth in below if depth), default=0)

    def _set_depth(self, block: BlockHash, depth: int) -> list[BlockHash]:
        anchors = []
        waiting = [(block, depth)]
        while waiting:
            block, depth = waiting.pop()
            node = self._nodes[block]
            if not node.depth:
                node.depth = depth
                if node.held and depth % self.policy.stride == 0:
                    anchors.append(block)
                waiting += [(child, depth + 1) for child in self._children.get(block, ())]
                if node.parent in self._nodes and depth > 1:
                    waiting.append((node.parent, depth - 1))
        return anchors

    def _forget_if_unheld(self, block: BlockHash) -> None:
        node = self._nodes[block]
        if node.held:
            return
        del self._nodes[block]
        if node.parent is not None:
            siblings = self._children[node.parent]
            siblings.remove(block)
            if not siblings:
                del self._children[node.parent]

    # -- anchors ---------------------------------------------------------------------------------------------

    def _anchors_below(self, blocks: Iterable[BlockHash], *, single: bool) -> list[BlockHash]:
        """Return the anchors whose runs contain one of `blocks`, each once, ancestors first along a chain."""
        stride = self.policy.stride
        seen: set[BlockHash] = set()
        found: list[BlockHash] = []
        for first in blocks:
            waiting = [first]
            while waiting:
                block = waiting.pop()
                node = self._nodes.get(block)
                if node is None or block in seen or not (node.depth or stride == 1):
                    continue
                seen.add(block)
                if node.depth % stride == 0:
                    found.append(block)
                elif not single:
                    waiting += self._children.get(block, ())
        return found

    def _is_anchor(self, node: _Node) -> bool:
        return self.policy.stride == 1 or bool(node.depth and node.depth % self.policy.stride == 0)

    def _run_above(self, anchor: BlockHash, slot: int) -> tuple[bool, BlockHash | None]:
        """Say whether a slot holds the whole run of an anchor, and name the anchor above (None: the root)."""
        shift = slot * _TIER_BITS
        block: BlockHash | None = anchor
        for _ in range(self.policy.stride):
            node = self._nodes.get(block) if block is not None else None
            if node is None or not node.held >> shift & _TIERS:
                return False, None
            block = node.parent
        return True, block

    def _worth(self, node: _Node) -> bool:
        policy = self.policy
        return (
            bool(node.published)
            or node.depth >= policy.min_blocks << self.tightened
            or node.seen >= policy.min_seen + self.tightened
        )

    def _publish(self, slot: int, anchors: Iterable[BlockHash]) -> list[Change]:
        """Publish what is whole and worth it, with its ancestors."""
        source, group = self._names[slot]
        if group != _FULL:
            return self._publish_group(slot, anchors)
        chains: list[Change] = []
        done: list[BlockHash] = []
        for anchor in anchors:
            if not self._worth(self._nodes[anchor]):
                continue
            chain: list[BlockHash] = []
            at: BlockHash | None = anchor
            while at is not None and (node := self._nodes.get(at)) and not node.published >> slot & 1:
                whole, above = self._run_above(at, slot)
                if not whole:
                    break
                node.published |= 1 << slot
                chain.append(at)
                at = above
            if chain:
                chains.append((source, BlocksStored(tuple(reversed(chain)), at)))
                done += chain
        for (owner, other), other_slot in list(self._slots.items()):
            if owner == source and other != _FULL and done:
                chains += self._publish_group(other_slot, reversed(done))
        return chains

    def _publish_group(self, slot: int, anchors: Iterable[BlockHash]) -> list[Change]:
        source, group = self._names[slot]
        full = self._slot(source, _FULL)
        ready = []
        for anchor in anchors:
            node = self._nodes[anchor]
            if node.published >> slot & 1 or not node.published >> full & 1:
                continue
            at_anchor = bool(node.held >> slot * _TIER_BITS & _TIERS)
            if at_anchor if group == _STATE else self._run_above(anchor, slot)[0]:
                node.published |= 1 << slot
                ready.append(anchor)
        if not ready:
            return []
        return [(source, replace(self._stored_like[group], hashes=tuple(ready), tier=Tier.GPU))]

    def _slot(self, source: SourceId, group: str) -> int:
        slot = self._slots.get((source, group))
        if slot is None:
            slot = self._slots[source, group] = len(self._names)
            self._names.append((source, group))
        return slot
