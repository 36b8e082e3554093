"""Prefix caches of simulated workers, and what the router's index says of them after a delay.

A block id stands for a whole prefix (as in Mooncake's traces): the same id is the same tokens from the first
one on. So a cache is a set of ids, and since a parent always leaves after its children, what it holds of a
prompt is a leading part of it, found by bisection.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence

from cache_service.core.ids import SiteId, WorkerId

#: Holders of one site that a match names; the policies look at four.
NAMED = 8


class SiteIndex:
    """Which workers of one site hold which blocks, as bit masks, `delay_s` behind the caches.

    For a hybrid model `states` says where the linear state was kept: only there can a prefill go on.
    """

    __slots__ = ("_pending", "delay_s", "hybrid", "masks", "names", "states")

    def __init__(self, delay_s: float, hybrid: bool) -> None:
        self.delay_s = delay_s
        self.hybrid = hybrid
        self.names: list[WorkerId] = []
        self.masks: dict[int, int] = {}
        self.states: dict[int, int] = {}
        self._pending: deque[tuple[float, bool, bool, int, Sequence[int]]] = deque()

    def add_worker(self, name: WorkerId) -> int:
        """Return the bit of a new worker."""
        self.names.append(name)
        return 1 << (len(self.names) - 1)

    def change(self, now_s: float, stored: bool, of_state: bool, bit: int, blocks: Sequence[int]) -> None:
        """Take note that a worker holds `blocks` from now on, or no longer."""
        if self.delay_s > 0:
            self._pending.append((now_s + self.delay_s, stored, of_state, bit, blocks))
        else:
            self._apply(stored, of_state, bit, blocks)

    def catch_up(self, now_s: float) -> None:
        """Apply what has become known by now."""
        pending = self._pending
        while pending and pending[0][0] <= now_s:
            _, stored, of_state, bit, blocks = pending.popleft()
            self._apply(stored, of_state, bit, blocks)

    def _apply(self, stored: bool, of_state: bool, bit: int, blocks: Sequence[int]) -> None:
        masks = self.states if of_state else self.masks
        if stored:
            for block in blocks:
                masks[block] = masks.get(block, 0) | bit
            return
        for block in blocks:
            left = masks.get(block, 0) & ~bit
            if left:
                masks[block] = left
            else:
                masks.pop(block, None)

    def depth(self, blocks: Sequence[int], bit: int) -> int:
        """Return how many leading blocks a worker could reuse as far as is known."""
        masks = self.masks
        low, high = 0, len(blocks)
        while low < high:
            middle = (low + high) // 2
            if masks.get(blocks[middle], 0) & bit:
                low = middle + 1
            else:
                high = middle
        if self.hybrid:
            while low and not self.states.get(blocks[low - 1], 0) & bit:
                low -= 1
        return low

    def deepest(self, blocks: Sequence[int]) -> list[tuple[int, int]]:
        """Return (depth, bit) of up to NAMED workers, deepest first, then in the order they were added."""
        found: list[tuple[int, int]] = []
        masks = self.states if self.hybrid else self.masks
        first = self.masks.get(blocks[0], 0) if blocks else 0
        seen, high = 0, len(blocks)
        while first & ~seen and len(found) < NAMED:
            high = self._last(masks, blocks, seen, high)
            if not high:
                break
            fresh = masks[blocks[high - 1]] & ~seen
            seen |= fresh
            while fresh and len(found) < NAMED:
                bit = fresh & -fresh
                found.append((high, bit))
                fresh ^= bit
        return found

    def _last(self, masks: dict[int, int], blocks: Sequence[int], seen: int, high: int) -> int:
        """Return the depth of the last of `blocks[:high]` that somebody not in `seen` holds, 0 for none."""
        low = 0
        if self.hybrid:  # states are not closed under prefixes
            for depth in range(high, 0, -1):
                if masks.get(blocks[depth - 1], 0) & ~seen:
                    return depth
            return 0
        while low < high:
            middle = (low + high) // 2
            if masks.get(blocks[middle], 0) & ~seen:
                low = middle + 1
            else:
                high = middle
        return low


class Claims(Mapping[WorkerId, int]):
    """Usable tokens of each worker for one prompt, looked up when asked for: nobody asks for most workers."""

    __slots__ = ("_blocks", "_known", "_sites", "_tokens")

    def __init__(
        self, sites: Mapping[WorkerId, tuple[SiteIndex, int]], blocks: Sequence[int], block_tokens: int
    ) -> None:
        self._sites = sites
        self._blocks = blocks
        self._tokens = block_tokens
        self._known: dict[WorkerId, int] = {}

    def put(self, worker_id: WorkerId, tokens: int) -> None:
        """Take an answer that is already known."""
        self._known[worker_id] = tokens

    def __getitem__(self, worker_id: WorkerId) -> int:
        tokens = self._known.get(worker_id)
        if tokens is None:
            index, bit = self._sites[worker_id]
            tokens = self._known[worker_id] = index.depth(self._blocks, bit) * self._tokens
        return tokens

    def get(self, worker_id: WorkerId, default: int = 0) -> int:  # type: ignore[override]
        """Return the usable tokens; `default` for a worker that has no cache (a decode worker)."""
        return self[worker_id] if worker_id in self._sites else default

    def __iter__(self) -> Iterator[WorkerId]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)


class SimMatch:
    """A router.core.match.Match in what the policies read of it, made without naming every holder."""

    __slots__ = ("available", "by_site", "longest_tokens", "usable")

    def __init__(
        self,
        indexes: Mapping[SiteId, SiteIndex],
        sites: Mapping[WorkerId, tuple[SiteIndex, int]],
        blocks: Sequence[int],
        block_tokens: int,
    ) -> None:
        self.available = True
        self.longest_tokens = 0
        self.usable = Claims(sites, blocks, block_tokens)
        self.by_site: dict[SiteId, list[WorkerId]] = {}
        for site, index in indexes.items():
            found = index.deepest(blocks)
            if not found:
                continue
            names = self.by_site[site] = []
            for depth, bit in found:
                name = index.names[bit.bit_length() - 1]
                names.append(name)
                self.usable.put(name, depth * block_tokens)
            self.longest_tokens = max(self.longest_tokens, found[0][0] * block_tokens)


class PrefixCache:
    """Blocks of one worker: those in use are locked, the others leave least recently used leaf first.

    A parent is released after its children, so plain LRU order is leaf order.

    Attributes:
        capacity: blocks, those of running requests included.
        refs: users of every block that is held.
        reserved: blocks of running requests that are not (or never become) shareable.
        states: for a hybrid model, blocks at whose end the linear state is kept, least recently used first.
    """

    __slots__ = ("_bit", "_index", "_lru", "capacity", "evicted", "refs", "reserved", "state_slots", "states")

    def __init__(
        self, capacity: int, index: SiteIndex | None = None, bit: int = 0, state_slots: int = 0
    ) -> None:
        self.capacity = capacity
        self.refs: dict[int, int] = {}
        self.reserved = 0
        self.evicted = 0
        self.state_slots = state_slots
        self.states: OrderedDict[int, None] = OrderedDict()
        self._lru: OrderedDict[int, None] = OrderedDict()
        self._index = index
        self._bit = bit

    def depth(self, blocks: Sequence[int]) -> int:
        """Return how many leading blocks are held, whatever of them is usable."""
        refs = self.refs
        low, high = 0, len(blocks)
        while low < high:
            middle = (low + high) // 2
            if blocks[middle] in refs:
                low = middle + 1
            else:
                high = middle
        return low

    def usable(self, blocks: Sequence[int], most: int) -> int:
        """Return how many leading blocks, at most `most`, a prefill can start after."""
        depth = min(self.depth(blocks), most)
        if self.state_slots:
            while depth and blocks[depth - 1] not in self.states:
                depth -= 1
            if depth:
                self.states.move_to_end(blocks[depth - 1])
        return depth

    def room(self, blocks: int, now_s: float) -> bool:
        """Make room for `blocks` more; False, and nothing evicted, when the locked ones leave too little."""
        free = self.capacity - self.reserved - len(self.refs)
        if blocks > free + len(self._lru):
            return False
        gone: list[int] = []
        while free < blocks:
            block, _ = self._lru.popitem(last=False)
            del self.refs[block]
            gone.append(block)
            free += 1
        if gone:
            self.evicted += len(gone)
            self._forget(gone, now_s)
        return True

    def lock(self, blocks: Sequence[int], depth: int) -> None:
        """Take the leading `depth` blocks, which are held, into use."""
        refs, lru = self.refs, self._lru
        for i in range(depth):
            block = blocks[i]
            users = refs[block]
            if not users:
                del lru[block]
            refs[block] = users + 1

    def store(self, blocks: Sequence[int], start: int, states: Sequence[int], now_s: float) -> None:
        """Take `blocks[start:]`, computed and in use now, into the cache, and the state after `states`.

        Args:
            states: depths at whose end the linear state was kept; ignored unless the model is hybrid.
        """
        refs = self.refs
        fresh: list[int] = []
        for i in range(start, len(blocks)):
            block = blocks[i]
            users = refs.get(block)
            if users is None:
                refs[block] = 1
                fresh.append(block)
            else:
                if not users:
                    del self._lru[block]
                refs[block] = users + 1
        if fresh and self._index is not None:
            self._index.change(now_s, True, False, self._bit, fresh)
        if self.state_slots and states:
            self._keep([blocks[depth - 1] for depth in states], now_s)

    def _keep(self, blocks: list[int], now_s: float) -> None:
        for block in blocks:
            self.states[block] = None
            self.states.move_to_end(block)
        gone: list[int] = []
        while len(self.states) > self.state_slots:
            gone.append(self.states.popitem(last=False)[0])
        if self._index is not None:
            self._index.change(now_s, True, True, self._bit, blocks)
            if gone:
                self._index.change(now_s, False, True, self._bit, gone)

    def release(self, blocks: Sequence[int], depth: int) -> None:
        """End one use of the leading `depth` blocks: they stay until room is needed."""
        refs, lru = self.refs, self._lru
        for i in range(depth - 1, -1, -1):
            block = blocks[i]
            users = refs[block] - 1
            refs[block] = users
            if not users:
                lru[block] = None

    def clear(self, now_s: float) -> None:
        """Forget everything: the worker has restarted. Nothing may be in use."""
        gone = list(self.refs)
        self.refs.clear()
        self._lru.clear()
        self._forget(gone, now_s)

    def _forget(self, gone: list[int], now_s: float) -> None:
        if self._index is not None:
            self._index.change(now_s, False, False, self._bit, gone)
        if self.states:
            lost = [block for block in gone if block in self.states]
            for block in lost:
                del self.states[block]
            if lost and self._index is not None:
                self._index.change(now_s, False, True, self._bit, lost)
