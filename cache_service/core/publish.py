"""What of a site's blocks other sites are told: only what can matter there, in few bytes.

Decides which changes are published. Published are **anchors**, every `stride`-th block of a chain: an anchor
says that its holder has the whole run of `stride` blocks up to it, so a claim is never more than what is
held, and at most `stride - 1` blocks less. A block below an unknown one has no place in a chain yet: it
waits, unless every block is an anchor (stride 1). A chain's anchors are published once it is `min_blocks`
long (enough for a prefill elsewhere to pay) or one of them was seen `min_seen` times: stored again, or asked
for by a request. An ancestor of what is published is published too. What is published is always taken back.

A hybrid model (`declare`) can use a prefix only at boundaries where its state and its window are. Those are
judged here, where all is known, and published as **ends**: GroupStored(STATE) at a block, be it an anchor or
not, says that the holder has every block from the anchor above down to this one, and at this boundary all its
model needs. So a source is declared to other sites as one that needs a state and no window, and windows cost
no bytes. A model with a state has an end at each usable boundary, its remote answer is exact; of one with
windows only, anchors and both rims of a usable stretch are ends: less than a stride is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cache_service.core.delta import Change, Declared
from cache_service.core.errors import ConfigError
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
from cache_service.core.ids import BlockHash, SourceId
from cache_service.core.index_types import Needs
from cache_service.core.publish_tree import Node, Tree

#: Bits of a node: per source, for each kind of holding one a tier; and two for what is published.
_TIER_BITS = 4
_TIERS = (1 << _TIER_BITS) - 1
_FULL, _STATE, _SWA = range(3)
_KIND_OF = {Group.STATE: _STATE, Group.SWA: _SWA}
_SOURCE_BITS = 3 * _TIER_BITS
_SOURCE = (1 << _SOURCE_BITS) - 1
_ANCHOR, _END = 1, 2
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


class PublishFilter:
    """Turns a site's changes into the changes to publish: O(blocks of the change), some 250 B a block.

    A clear is O(blocks of the source), for which the filter keeps some 50 B for each block of each source.

    For a source with a window of w blocks, a change of n of them costs O(n + w).
    """

    def __init__(self, policy: PublishPolicy) -> None:
        self.policy = policy
        self._tree = Tree(policy.stride)
        self._slots: dict[SourceId, int] = {}
        self._sources: list[SourceId] = []
        self._needs: list[Needs] = []
        #: By slot: the blocks that it holds anything of.
        self._mine: list[set[BlockHash]] = []
        #: Doublings of min_blocks, and steps of min_seen, that the budget asks for.
        self.tightened = 0

    @property
    def blocks(self) -> int:
        """How many blocks the filter remembers."""
        return len(self._tree.nodes)

    def known_depth(self, block: BlockHash) -> int:
        """Return a held block's place in its chain, from 1; 0 while that is not known."""
        node = self._tree.nodes.get(block)
        return node.depth if node else 0

    def declare(self, source: SourceId, needs: Needs) -> list[Change]:
        """Say what a source's model needs beside its blocks; return what to publish. O(its blocks)."""
        slot = self._slot(source)
        if self._needs[slot] == needs:
            return []
        mine = list(self._mine[slot])
        changes = self._settle_ends(slot, mine, withdraw=True)
        self._needs[slot] = needs
        changes.append((source, Declared(needs != Needs(), 0)))
        return changes + self._settle_ends(slot, mine)

    def take(self, source: SourceId, event: Event) -> list[Change]:
        """Note a change that the index has taken; return what to publish, in order."""
        slot = self._slot(source)
        match event:
            case AllCleared():
                return self._clear(slot)
            case BlocksStored():
                return self._store(slot, event)
            case BlocksRemoved():
                return self._remove(slot, _FULL, event.hashes, event.tier)
            case GroupStored():
                kind = _KIND_OF[event.group]
                self._mine[slot].update(event.hashes)
                for block in event.hashes:
                    self._tree.known(block).held |= 1 << _shift(slot, kind) + event.tier
                return self._settle_ends(slot, self._touched(slot, kind, event.hashes))
            case GroupRemoved():
                return self._remove(slot, _KIND_OF[event.group], event.hashes, event.tier)

    def saw(self, hashes: Sequence[BlockHash]) -> list[Change]:
        """Note that a request asked for this chain; return what it made worth publishing."""
        found: list[Change] = []
        for block in hashes[self.policy.stride - 1 :: self.policy.stride]:
            node = self._tree.nodes.get(block)
            if node is None:
                break
            node.seen += 1
            if not self._tree.is_anchor(node):
                continue  # what it says of the blocks above is not known, whatever the request believes
            if node.seen == self.policy.min_seen + self.tightened:
                for slot in range(len(self._sources)):
                    if _held(node, slot, _FULL) and not _published(node, slot, _ANCHOR):
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

    def _store(self, slot: int, event: BlocksStored) -> list[Change]:
        self._mine[slot].update(event.hashes)
        late = self._tree.link(event)
        bit = 1 << _shift(slot, _FULL) + event.tier
        for block in event.hashes:
            node = self._tree.nodes[block]
            node.held |= bit
            node.seen += 1
        touched = self._tree.segment_from(event.hashes)
        changes = self._publish(slot, (b for b in touched if self._tree.is_anchor(self._tree.nodes[b])))
        changes += self._settle_ends(slot, self._touched(slot, _FULL, touched))
        if late:
            anchors = self._tree.anchors_from(late)
            for other in range(len(self._sources)):
                changes += self._publish(other, anchors)
                changes += self._settle_ends(other, self._touched(other, _SWA, late))
        return changes

    def _remove(self, slot: int, kind: int, hashes: Iterable[BlockHash], tier: Tier) -> list[Change]:
        shift = _shift(slot, kind)
        bit = 1 << shift + tier
        lost = []
        for block in hashes:
            node = self._tree.nodes.get(block)
            if node is None or not node.held & bit:
                continue
            node.held &= ~bit
            if not node.held >> shift & _TIERS:
                lost.append(block)
                if not node.held >> slot * _SOURCE_BITS & _SOURCE:
                    self._mine[slot].remove(block)
        changes: list[Change] = []
        gone: list[BlockHash] = []
        touched = self._tree.segment_from(lost) if kind == _FULL else lost
        if kind == _FULL:
            gone = [b for b in touched if _published(self._tree.nodes[b], slot, _ANCHOR)]
            for anchor in gone:
                self._tree.nodes[anchor].published &= ~(_ANCHOR << 2 * slot)
        changes += self._settle_ends(slot, self._touched(slot, kind, touched))
        if gone:
            changes.append((self._sources[slot], BlocksRemoved(tuple(gone))))
        for block in lost:
            self._tree.forget_if_unheld(block)
        return changes

    def _clear(self, slot: int) -> list[Change]:
        mine, self._mine[slot] = self._mine[slot], set()
        held = _SOURCE << slot * _SOURCE_BITS
        published = (_ANCHOR | _END) << 2 * slot
        any_published = False
        for block in mine:
            node = self._tree.nodes[block]
            any_published |= bool(node.published & published)
            node.held &= ~held
            node.published &= ~published
            self._tree.forget_if_unheld(block)
        return [(self._sources[slot], AllCleared())] if any_published else []

    # -- anchors ---------------------------------------------------------------------------------------------

    def _worth(self, node: Node) -> bool:
        policy = self.policy
        return (
            bool(node.published)
            or node.depth >= policy.min_blocks << self.tightened
            or node.seen >= policy.min_seen + self.tightened
        )

    def _publish(self, slot: int, anchors: Iterable[BlockHash]) -> list[Change]:
        """Publish what is whole and worth it, with its ancestors, and the ends that follow."""
        changes: list[Change] = []
        done: list[BlockHash] = []
        nodes, shift = self._tree.nodes, _shift(slot, _FULL)
        for anchor in anchors:
            node = nodes[anchor]
            if _published(node, slot, _ANCHOR) or not self._worth(node):
                continue
            chain: list[BlockHash] = []
            at: BlockHash | None = anchor
            while at is not None and (found := nodes.get(at)) and not _published(found, slot, _ANCHOR):
                whole, above = self._tree.climb(at, self.policy.stride, lambda n: n.held >> shift & _TIERS)
                if not whole:
                    break
                found.published |= _ANCHOR << 2 * slot
                chain.append(at)
                at = above
            if chain:
                changes.append((self._sources[slot], BlocksStored(tuple(reversed(chain)), at)))
                done += chain
        if done and self._needs[slot] != Needs():
            below = self._tree.segment_from(child for block in done for child in self._tree.children(block))
            changes += self._settle_ends(slot, self._touched(slot, _FULL, [*reversed(done), *below]))
        return changes

    # -- ends ------------------------------------------------------------------------------------------------

    def _touched(self, slot: int, kind: int, blocks: Sequence[BlockHash]) -> list[BlockHash]:
        """Return the blocks whose being an end may follow from a change at `blocks`."""
        needs = self._needs[slot]
        if needs == Needs():
            return []
        if kind == _SWA and needs.window_blocks:
            blocks = self._tree.within(blocks, needs.window_blocks)
        if needs.state:
            # Most blocks have no state: no end now, and none before.
            state, end, nodes = _TIERS << _shift(slot, _STATE), _END << 2 * slot, self._tree.nodes
            some = (b for b in blocks if nodes[b].held & state or nodes[b].published & end)
            return list(dict.fromkeys(some))
        around = dict.fromkeys(blocks)
        for block in blocks:
            node = self._tree.nodes[block]
            if node.parent in self._tree.nodes:
                around[node.parent] = None
            around.update(dict.fromkeys(self._tree.children(block)))
        return list(around)

    def _settle_ends(
        self, slot: int, candidates: Sequence[BlockHash], *, withdraw: bool = False
    ) -> list[Change]:
        """Make ends of the candidates that are some, and only of those; `withdraw`: of none."""
        nodes = self._tree.nodes
        added: list[BlockHash] = []
        gone: list[BlockHash] = []
        if withdraw:
            gone = [block for block in candidates if _published(nodes[block], slot, _END)]
        elif candidates and self._needs[slot] != Needs():
            windows: dict[BlockHash, int] = {}
            for block in sorted(candidates, key=lambda b: nodes[b].depth):
                is_end = self._is_end(slot, block, windows)
                if is_end != _published(nodes[block], slot, _END):
                    (added if is_end else gone).append(block)
        for block in (*added, *gone):
            nodes[block].published ^= _END << 2 * slot
        source = self._sources[slot]
        changes: list[Change] = [(source, GroupRemoved(Group.STATE, part)) for part in _parts(gone)]
        return changes + [(source, GroupStored(Group.STATE, part)) for part in _parts(added)]

    def _is_end(self, slot: int, block: BlockHash, windows: dict[BlockHash, int]) -> bool:
        node = self._tree.nodes[block]
        needs = self._needs[slot]
        if not self._tree.placed(node) or (needs.state and not _held(node, slot, _STATE)):
            return False
        anchor = self._tree.is_anchor(node)
        if not self._is_usable(slot, block, windows):
            return False
        if not needs.state and not anchor and not self._is_rim(slot, block, windows):
            return False
        if anchor:
            return _published(node, slot, _ANCHOR)
        shift = _shift(slot, _FULL)
        levels = node.depth % self.policy.stride
        whole, above = self._tree.climb(block, levels, lambda n: n.held >> shift & _TIERS)
        if not whole:
            return False
        if above is None:
            return _published(node, slot, _END) or self._worth(node)
        found = self._tree.nodes.get(above)
        return found is not None and _published(found, slot, _ANCHOR)

    def _is_usable(self, slot: int, block: BlockHash, windows: dict[BlockHash, int]) -> bool:
        """Say whether the window before the boundary behind `block` is whole."""
        most = self._needs[slot].window_blocks
        return not most or self._window(slot, block, most, windows) >= most

    def _is_rim(self, slot: int, block: BlockHash, windows: dict[BlockHash, int]) -> bool:
        """Say whether a stretch of usable boundaries begins or ends here."""
        parent = self._tree.nodes[block].parent
        if parent not in self._tree.nodes or not self._is_usable(slot, parent, windows):
            return True
        return not any(self._is_usable(slot, child, windows) for child in self._tree.children(block))

    def _window(self, slot: int, block: BlockHash, most: int, windows: dict[BlockHash, int]) -> int:
        """Return how many blocks from `block` up have their window, `most` at most or where the root comes.

        `windows` remembers answers; ancestors asked first make the others cheap.
        """
        known = windows.get(block)
        if known is not None:
            return known
        run = 0
        at: BlockHash | None = block
        while run < most:
            node = self._tree.nodes.get(at) if at is not None else None
            if node is None or not _held(node, slot, _SWA):
                break
            run += 1
            if node.depth == 1:
                run = most
                break
            at = node.parent
            above = windows.get(at) if at is not None else None
            if above is not None:
                run = min(most, run + above)
                break
        windows[block] = run
        return run

    def _slot(self, source: SourceId) -> int:
        slot = self._slots.get(source)
        if slot is None:
            slot = self._slots[source] = len(self._sources)
            self._sources.append(source)
            self._needs.append(Needs())
            self._mine.append(set())
        return slot


def _parts(blocks: list[BlockHash]) -> Iterator[tuple[BlockHash, ...]]:
    for at in range(0, len(blocks), MAX_BLOCKS_PER_EVENT):
        yield tuple(blocks[at : at + MAX_BLOCKS_PER_EVENT])


def _shift(slot: int, kind: int) -> int:
    return slot * _SOURCE_BITS + kind * _TIER_BITS


def _held(node: Node, slot: int, kind: int) -> int:
    return node.held >> slot * _SOURCE_BITS + kind * _TIER_BITS & _TIERS


def _published(node: Node, slot: int, what: int) -> bool:
    return bool(node.published >> 2 * slot & what)
