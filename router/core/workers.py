"""The fleet as the router counts it: work queued on every worker, with the least loaded one at hand.

Decides nothing about routes. Every change costs O(log workers), and the least loaded worker of a site and
kind is read in O(1), so that no decision walks over all workers. Must not look at a clock; `now_s` is the
caller's.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from cache_service.core.ids import SiteId, WorkerId
from router.core.profile import KvShape, ModelProfile

_Load = tuple[float, int, int, WorkerId]


class Role(StrEnum):
    """What a worker does."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(slots=True, eq=False)
class WorkerState:
    """One worker as it is now; change it through its Fleet, or call `Fleet.touch` after.

    Attributes:
        profile: what the model costs on it, None when not known.
        kv: bytes of a prompt, as its pools are laid out: what is left without a profile; None: not known.
        chunk_tokens: its prefill chunk: KV of earlier chunks travels while the last is computed.
        queued_tokens, queued_s: uncached tokens, and predicted seconds, of prefills given and not over.
        jobs: prefills given and not over.
        head_since_s: when the first of them began, as far as it is known.
        running: requests that it decodes, or that are on their way to it.
        total_pages, used_pages: KV pages of a decode worker; 0 pages in all means not known, not full.
        page_tokens: tokens of a page.
        assigned: requests given to it since the start; breaks ties in turn.
    """

    worker_id: WorkerId
    site: SiteId
    role: Role
    profile: ModelProfile | None = None
    chunk_tokens: int = 8192
    healthy: bool = True
    queued_tokens: int = 0
    queued_s: float = 0.0
    jobs: int = 0
    head_since_s: float = 0.0
    running: int = 0
    total_pages: int = 0
    used_pages: int = 0
    page_tokens: int = 1
    assigned: int = 0
    kv: KvShape | None = None

    def wait_s(self, now_s: float) -> float:
        """Return how long a prefill given now waits for those before it: their work less what is done."""
        jobs, queued_s = self.jobs, self.queued_s
        if jobs <= 0:
            return 0.0
        # The head counts as one mean job, and as done at most.
        done_s, mean_s = now_s - self.head_since_s, queued_s / jobs
        if done_s <= 0.0:
            return queued_s
        return queued_s - (done_s if done_s < mean_s else mean_s)

    def costs_like(self, other: WorkerState | _Kind) -> bool:
        """Say whether a prompt costs the same on both, cache and queue apart."""
        return self.profile is other.profile and self.chunk_tokens == other.chunk_tokens

    def has_room(self, tokens: int) -> bool:
        """Say whether a decode worker has pages for `tokens`; always when its size is not known."""
        return not self.total_pages or self.used_pages + -(-tokens // self.page_tokens) <= self.total_pages

    def load(self) -> _Load:
        """Return the key that orders the workers of a role in a site, least loaded first."""
        if self.role is Role.PREFILL:
            return (self.queued_s, self.queued_tokens, self.assigned, self.worker_id)
        return (self.running, self.used_pages, self.assigned, self.worker_id)


class _Kind:
    """The workers of one pool that cost the same, least loaded first at hand.

    A heap whose entries are not moved but outdated: each change adds an entry, and one that is no longer its
    worker's newest is dropped when it comes to the top.
    """

    __slots__ = ("chunk_tokens", "heap", "newest", "profile")

    def __init__(self, worker: WorkerState) -> None:
        self.profile = worker.profile
        self.chunk_tokens = worker.chunk_tokens
        self.newest: dict[WorkerId, _Load] = {}
        self.heap: list[tuple[_Load, WorkerState]] = []


class Pool:
    """The workers of one role in one site, the least loaded of each kind (profile and chunk) at hand.

    Workers that cost the same differ in load alone, so no other of a kind is needed for a prompt that nobody
    holds; one of another chip may be worth a longer queue.
    """

    __slots__ = ("_firsts", "_kinds", "_of", "_order", "_queued", "_queued_s", "members")

    def __init__(self) -> None:
        self.members: dict[WorkerId, WorkerState] = {}
        self._order: list[WorkerState] = []
        self._kinds: list[_Kind] = []
        self._of: dict[WorkerId, _Kind] = {}
        #: The least loaded healthy worker of each kind that has one, least loaded first.
        self._firsts: list[WorkerState] = []
        #: Queued seconds of each member as last counted, and their sum.
        self._queued: dict[WorkerId, float] = {}
        self._queued_s = 0.0

    @property
    def mean_queued_s(self) -> float:
        """Predicted seconds of work queued, in the mean over all members."""
        return self._queued_s / len(self.members) if self.members else 0.0

    def add(self, worker: WorkerState) -> None:
        self.members[worker.worker_id] = worker
        self._order.append(worker)
        self.touch(worker)

    def remove(self, worker: WorkerState) -> None:
        del self.members[worker.worker_id]
        self._order.remove(worker)
        self._leave(worker)
        self._count(worker.worker_id, 0.0)
        self._queued.pop(worker.worker_id, None)
        self._rank()

    def _count(self, worker_id: WorkerId, queued_s: float) -> None:
        before = self._queued.get(worker_id, 0.0)
        if before != queued_s:
            self._queued[worker_id] = queued_s
            self._queued_s = max(0.0, self._queued_s + queued_s - before)

    def touch(self, worker: WorkerState) -> None:
        """Take note of a changed load, health, profile or chunk. O(log n) amortised."""
        kind = self._of.get(worker.worker_id)
        if kind is None or not worker.costs_like(kind):
            self._leave(worker)
            kind = next((k for k in self._kinds if worker.costs_like(k)), None)
            if kind is None:
                kind = _Kind(worker)
                self._kinds.append(kind)
            self._of[worker.worker_id] = kind
        self._count(worker.worker_id, worker.queued_s)
        key = worker.load()
        if not worker.healthy:
            kind.newest.pop(worker.worker_id, None)
        elif kind.newest.get(worker.worker_id) != key:
            kind.newest[worker.worker_id] = key
            if len(kind.heap) > 4 * len(kind.newest) + 16:
                kind.heap = [(k, self.members[w]) for w, k in kind.newest.items()]
                heapq.heapify(kind.heap)
            else:
                heapq.heappush(kind.heap, (key, worker))
        self._rank()

    def _leave(self, worker: WorkerState) -> None:
        kind = self._of.pop(worker.worker_id, None)
        if kind is not None:
            kind.newest.pop(worker.worker_id, None)
            if kind not in self._of.values():
                self._kinds.remove(kind)

    @property
    def uniform(self) -> bool:
        """True when all workers are of one kind."""
        return len(self._kinds) == 1

    def _rank(self) -> None:
        for kind in self._kinds:
            heap, newest = kind.heap, kind.newest
            while heap and newest.get(heap[0][1].worker_id) != heap[0][0]:
                heapq.heappop(heap)
        members = self.members
        self._firsts = [members[kind.heap[0][1].worker_id] for kind in self._kinds if kind.heap]
        if len(self._firsts) > 1:
            self._firsts.sort(key=WorkerState.load)

    def leasts(self, excluded: Collection[WorkerId] = ()) -> Sequence[WorkerState]:
        """Return the least loaded healthy worker of each kind that is not excluded, least loaded first."""
        if not excluded or not any(w.worker_id in excluded for w in self._firsts):
            return self._firsts
        found = []
        for kind in self._kinds:
            left = [key for worker_id, key in kind.newest.items() if worker_id not in excluded]
            if left:
                found.append(min(left))
        return [self.members[key[3]] for key in sorted(found)]

    def least(self, excluded: Collection[WorkerId] = ()) -> WorkerState | None:
        """Return the least loaded healthy worker that is not excluded, None when there is none."""
        found = self.leasts(excluded)
        return found[0] if found else None

    def at(self, index: int) -> WorkerState:
        """Return member number `index`, in the order they were added."""
        return self._order[index]

    def usable(self, excluded: Collection[WorkerId] = ()) -> Iterator[WorkerState]:
        """Yield every healthy worker that is not excluded, in the order they were added."""
        return (w for w in self.members.values() if w.healthy and w.worker_id not in excluded)


class Fleet:
    """All workers of all sites. One thread only."""

    def __init__(self, workers: Iterable[WorkerState] = ()) -> None:
        self.workers: dict[WorkerId, WorkerState] = {}
        self.prefill: dict[SiteId, Pool] = {}
        self.decode: dict[SiteId, Pool] = {}
        #: Prefills given since the start: whose turn it is.
        self.turn = 0
        for worker in workers:
            self.add(worker)

    def add(self, worker: WorkerState) -> None:
        """Take a worker in. Raises ValueError when its name is taken."""
        if worker.worker_id in self.workers:
            raise ValueError(f"worker {worker.worker_id!r} is there already")
        self.workers[worker.worker_id] = worker
        self._pools(worker.role).setdefault(worker.site, Pool()).add(worker)

    def remove(self, worker_id: WorkerId) -> None:
        """Forget a worker. Raises KeyError when it is not known."""
        worker = self.workers.pop(worker_id)
        pools = self._pools(worker.role)
        pools[worker.site].remove(worker)
        if not pools[worker.site].members:
            del pools[worker.site]

    def _pools(self, role: Role) -> dict[SiteId, Pool]:
        return self.prefill if role is Role.PREFILL else self.decode

    def mean_queued_s(self, site: SiteId) -> float:
        """Return the predicted seconds of prefill queued in a site, in the mean over its workers."""
        pool = self.prefill.get(site)
        return pool.mean_queued_s if pool is not None else 0.0

    def touch(self, worker: WorkerState) -> None:
        """Take note of a worker's fields that were changed from outside."""
        self._pools(worker.role)[worker.site].touch(worker)

    def set_healthy(self, worker: WorkerState, healthy: bool) -> None:
        """Let a worker be chosen, or not."""
        if worker.healthy is not healthy:
            worker.healthy = healthy
            self.touch(worker)

    def give_prefill(self, worker: WorkerState, tokens: int, seconds: float, now_s: float) -> None:
        """Queue a prefill of `tokens` uncached tokens and `seconds` predicted seconds on a worker."""
        if not worker.jobs:
            worker.head_since_s = now_s
        worker.jobs += 1
        worker.queued_tokens += tokens
        worker.queued_s += seconds
        worker.assigned += 1
        self.turn += 1
        self.touch(worker)

    def end_prefill(self, worker: WorkerState, tokens: int, seconds: float, now_s: float) -> None:
        """Take back what `give_prefill` queued, with the same figures; the next in line begins."""
        worker.jobs -= 1
        worker.queued_tokens -= tokens
        worker.queued_s = max(0.0, worker.queued_s - seconds) if worker.jobs else 0.0
        worker.head_since_s = now_s
        self.touch(worker)

    def give_decode(self, worker: WorkerState, tokens: int) -> None:
        """Reserve a decode worker's pages for `tokens` tokens, prompt and answer."""
        worker.running += 1
        worker.used_pages += -(-tokens // worker.page_tokens)
        worker.assigned += 1
        self.touch(worker)

    def end_decode(self, worker: WorkerState, tokens: int) -> None:
        """Take back what `give_decode` reserved."""
        worker.running -= 1
        worker.used_pages -= -(-tokens // worker.page_tokens)
        self.touch(worker)
