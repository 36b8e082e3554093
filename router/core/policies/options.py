"""What a request can be given to, and what each way would cost: the part that all rules share.

Decides nothing but the order of equals: longest usable prefix, then least work queued, then in turn, then by
name. Looks at a bounded number of workers per site, whatever the size of the fleet: its least loaded one and
those with the longest prefixes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cache_service.core.errors import Unavailable
from cache_service.core.ids import SiteId
from router.core.decision import (
    Decision,
    Links,
    LinkState,
    Policy,
    Pull,
    Reason,
    Request,
    RouteKind,
    Terms,
)
from router.core.match import Match
from router.core.profile import KvShape, ModelProfile
from router.core.workers import Fleet, WorkerState

#: Holders of one site (and kind) that are looked at, longest prefix first: more are equals nearly always.
HOLDERS = 4


def _nothing(_cached: int) -> float:
    return 0.0


@dataclass(frozen=True, slots=True)
class Option:
    """One way to prefill a request, with its predicted terms (see Decision)."""

    worker: WorkerState
    link: LinkState | None
    matched: int
    wire_bytes: float
    cost: float
    terms: Terms
    pull: Pull | None = None


class Ways:
    """The ways of one request; made for one decision."""

    __slots__ = (
        "_bytes",
        "_held",
        "_holders",
        "_seconds",
        "at_home",
        "decode",
        "fleet",
        "links",
        "longest_tokens",
        "match",
        "now_s",
        "policy",
        "request",
    )

    def __init__(
        self, request: Request, match: Match, fleet: Fleet, links: Links, policy: Policy, now_s: float
    ) -> None:
        """Choose the decode worker. Raises Unavailable when the home site has none."""
        self.request = request
        self.match = match
        self.fleet = fleet
        self.links = links
        self.policy = policy
        self.now_s = now_s
        self.longest_tokens = max(0, min(match.longest_tokens, request.total_tokens - 1))
        self.decode = self._decode()
        self._held = self.matched(self.decode) if policy.held_by_decode else 0
        # Many workers share a profile, and most hold nothing: the same figures again and again.
        self._bytes: dict[int, float] = {}
        self._seconds: dict[int, Callable[[int], float]] = {}
        self._holders: dict[SiteId, list[WorkerState]] = {}
        #: The home site's worker with the longest prefix, None when nobody there can take the request.
        self.at_home = self.affine(request.home)

    def _decode(self) -> WorkerState:
        request = self.request
        pool = self.fleet.decode.get(request.home)
        worker = pool.least(request.excluded) if pool is not None else None
        if pool is None or worker is None:
            raise Unavailable(
                "no decode worker can take the request: every one of this site is unhealthy or has failed it",
                reason="no_decode_worker",
            )
        need = request.total_tokens + request.output_tokens
        if worker.has_room(need):
            return worker
        roomy = [w for w in pool.usable(request.excluded) if w.has_room(need)]
        return min(roomy, key=WorkerState.load, default=worker)

    # --- which workers ---------------------------------------------------------------------------------

    def matched(self, worker: WorkerState) -> int:
        """Return the usable match at `worker`, never the whole prompt (one token is always computed)."""
        return max(0, min(self.match.usable.get(worker.worker_id, 0), self.request.total_tokens - 1))

    def holders(self, site: SiteId) -> list[WorkerState]:
        """Return the usable workers of `site` with the longest prefixes, longest first, at most HOLDERS."""
        found = self._holders.get(site)
        if found is not None:
            return found
        found = self._holders[site] = []
        pool, claims = self.fleet.prefill.get(site), self.match.by_site.get(site)
        if pool is not None and claims is not None:
            excluded = self.request.excluded
            for worker_id in claims:
                worker = pool.members.get(worker_id)
                if worker is not None and worker.healthy and worker_id not in excluded:
                    found.append(worker)
                    if len(found) == HOLDERS:
                        break
        return found

    def least(self, site: SiteId) -> WorkerState | None:
        """Return the least loaded usable prefill worker of `site`."""
        pool = self.fleet.prefill.get(site)
        return None if pool is None else pool.least(self.request.excluded)

    def affine(self, site: SiteId) -> WorkerState | None:
        """Return the worker of `site` with the longest prefix, the least loaded among equals."""
        best = self.least(site)
        if best is None or site not in self.match.by_site:
            return best
        usable = self.match.usable
        held = usable.get(best.worker_id, 0)
        chosen: WorkerState | None = None
        for worker in self.holders(site):  # the longest first
            tokens = usable[worker.worker_id]
            if tokens <= held and chosen is None:
                return best
            if tokens < held:
                break
            if chosen is None or worker.load() < chosen.load():
                chosen, held = worker, tokens
        return chosen or best

    def remote_sites(self) -> Iterator[tuple[SiteId, LinkState]]:
        """Yield every other site that prefills and has a usable link to the home site, by name."""
        home = self.request.home
        for site in sorted(self.fleet.prefill):
            link = self.links.get((site, home)) if site != home else None
            if link is not None and link.up and link.rate_bytes_per_s > 0:
                yield site, link

    # --- what it costs ---------------------------------------------------------------------------------

    def wire_bytes(self, known: ModelProfile | KvShape | None) -> float:
        """Return the bytes that cross for the prompt, less what decode holds; 0 when not known."""
        if known is None:
            return 0.0
        size = self._bytes.get(id(known))
        if size is None:
            held = min(self._held, self.request.total_tokens)
            kv = known.kv if isinstance(known, ModelProfile) else known
            size = self._bytes[id(known)] = kv.bytes_at(self.request.total_tokens, held)
        return size

    def prefill_of(self, profile: ModelProfile | None) -> Callable[[int], float]:
        """Return the predicted seconds of the prefill by cached tokens; 0 without a profile."""
        found = self._seconds.get(id(profile))
        if found is None:
            found = _nothing if profile is None else profile.prefill_of(self.request.total_tokens)
            self._seconds[id(profile)] = found
        return found

    def prefill_s(self, worker: WorkerState, matched: int) -> float:
        """Return the predicted seconds of the prefill on `worker`; 0 without a profile."""
        return self.prefill_of(worker.profile)(matched)

    def option(self, worker: WorkerState, link: LinkState | None) -> Option:
        """Return the way through `worker` with the cache where it is; `link` is None at home."""
        return self._priced(worker, link, self.matched(worker), 0.0, None)

    def pulled(self, worker: WorkerState, link: LinkState | None, holder: WorkerState) -> Option | None:
        """Return the way through `worker` after it has fetched the prefix of `holder`, None if it cannot."""
        profile = holder.profile
        tokens = self.matched(holder)
        if profile is None or tokens <= self.matched(worker):
            return None
        size = profile.kv_bytes(tokens)
        pull_s = 0.0
        if holder.site != worker.site:
            way = self.links.get((holder.site, worker.site))
            if way is None or not way.usable:
                return None
            pull_s = way.rtt_s + self.link_wait_s(way) + size / way.rate_bytes_per_s
        else:
            size = 0.0
        pull = Pull(holder.worker_id, holder.site, worker.site, tokens, size)
        return self._priced(worker, link, tokens, pull_s, pull)

    def link_wait_s(self, link: LinkState) -> float:
        """Return how long `link` keeps a prompt waiting beyond the prefill queue of its source."""
        return link.wait_s(self.fleet.mean_queued_s(link.src))

    def arrival_s(
        self, worker: WorkerState, link: LinkState, start_s: float, computed_s: float, sent: float
    ) -> float:
        """Return when KV of `sent` bytes, computed from `start_s` to `computed_s`, is over the link.

        Chunks travel while the next is computed: after the last one only its own bytes are left. Or the link
        is the slower one: busy with others first (for what they keep it waiting, but no longer than until
        all that is under way is over), then with all of this request's bytes.
        """
        transfer_s = sent / link.rate_bytes_per_s
        chunks = worker.chunk_tokens / self.request.total_tokens
        ready_s = computed_s + (transfer_s * chunks if chunks < 1.0 else transfer_s)
        free_s = min(link.backlog_s(), start_s + self.link_wait_s(link))
        linked_s = (free_s if free_s > start_s else start_s) + transfer_s
        return (ready_s if ready_s > linked_s else linked_s) + link.rtt_s

    def _priced(
        self, worker: WorkerState, link: LinkState | None, matched: int, pull_s: float, pull: Pull | None
    ) -> Option:
        prefill_s = self.prefill_s(worker, matched)
        wait_s = worker.wait_s(self.now_s)
        computed_s = max(wait_s, pull_s) + prefill_s
        size = cost = transfer_s = 0.0
        ttft_s = computed_s
        if pull is not None and pull.wire_bytes:
            size = pull.wire_bytes
            cost = self.links[pull.src, pull.dst].price(size)
        if link is not None:
            sent = self.wire_bytes(worker.profile or worker.kv)
            transfer_s = sent / link.rate_bytes_per_s
            ttft_s = self.arrival_s(worker, link, max(wait_s, pull_s), computed_s, sent)
            size += sent
            cost += link.price(sent)
        return Option(
            worker, link, matched, size, cost, Terms(wait_s, prefill_s, pull_s, transfer_s, ttft_s), pull
        )

    # --- the answer ------------------------------------------------------------------------------------

    def local_uncached(self) -> int:
        """Return the prompt less the best match in the home site."""
        return self.request.total_tokens - (self.matched(self.at_home) if self.at_home is not None else 0)

    def local_s(self) -> float:
        """Return the predicted time to first token at home, with its longest prefix or its least queue."""
        return min(
            (
                worker.wait_s(self.now_s) + self.prefill_s(worker, self.matched(worker))
                for worker in (self.least(self.request.home), self.at_home)
                if worker is not None
            ),
            default=math.inf,
        )

    def decided(
        self,
        option: Option | None,
        reason: Reason,
        *,
        threshold: int | None = None,
    ) -> Decision:
        """Return the decision for `option`. Raises Unavailable when it is None: nothing was left."""
        if option is None:
            raise Unavailable(
                "no prefill worker can take the request: every one is unhealthy, unreachable or has "
                "failed it",
                reason="no_prefill_worker",
            )
        local = option.worker.site == self.request.home
        return Decision(
            kind=RouteKind.LOCAL if local else RouteKind.REMOTE,
            reason=reason,
            prefill=option.worker,
            decode=self.decode,
            matched_tokens=option.matched,
            uncached_tokens=self.request.total_tokens - option.matched,
            local_uncached_tokens=self.local_uncached(),
            threshold_tokens=self.policy.threshold_tokens if threshold is None else threshold,
            wire_bytes=option.wire_bytes,
            cost=option.cost,
            predicted=option.terms,
            local_s=option.terms.ttft_s if local else self.local_s(),
            pull=option.pull,
        )
