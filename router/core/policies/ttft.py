"""`ttft`: the way with the least predicted time to first token, over all sites and all places of the cache.

For home and for every remote site whose link has room: its least loaded worker and those with the longest
prefixes, each with the cache it has, and, where the fleet can move caches, its least loaded worker after it
fetched the longest prefix of anybody. The score of a way is its predicted TTFT, plus what it costs others:
`recompute_weight` x the prefill seconds that the longest prefix of anybody would have saved there,
`crowd_weight` x its prefill seconds x its wait (the longer a queue, the more of those who come will stand
behind this prompt; so long prompts go where they are fast, and short ones leave that place to them), and
`cost_weight_s` x its price. Home keeps the request unless
another way is better by the margins, and so does the worker of the session's last request: near-ties do not
bounce.

A site may have workers of several kinds (chips): each kind is looked at by itself. Not looked at, because it
cannot win: a kind that would be slower than the best way so far even with the longest prefix of all and no
queue, and a holder that has both a shorter prefix and no shorter queue than another of its kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cache_service.core.ids import SiteId
from router.core.decision import Decision, LinkState, Reason
from router.core.policies.options import HOLDERS, Option, Ways
from router.core.profile import ModelProfile
from router.core.workers import Pool, WorkerState

#: Seconds of Ways.link_wait_s, a site, and the link from there to the home site (None for that itself).
_Place = tuple[float, SiteId, LinkState | None]
#: A link and seconds: its wait, its backlog; of one prompt transfer, last chunk, round trip with price.
_Path = tuple[LinkState | None, float, float, float, float, float]
#: Prefill seconds by cached tokens.
_Seconds = Callable[[int], float]


@dataclass(slots=True)
class _Found:
    """The best way so far; `pull_from` is whose prefix it fetches first."""

    score: float = math.inf
    worker: WorkerState | None = None
    link: LinkState | None = None
    pull_from: WorkerState | None = None

    def take(
        self, score: float, worker: WorkerState, link: LinkState | None, pull_from: WorkerState | None
    ) -> None:
        self.score, self.worker, self.link, self.pull_from = score, worker, link, pull_from


@dataclass(frozen=True, slots=True)
class _Longest:
    """A holder of the longest prefix, and what it is to fetch it."""

    worker: WorkerState
    tokens: int
    wire_bytes: float


def decide(ways: Ways) -> Decision:
    """Return the route of least score."""
    policy = ways.policy
    longest = _longest(ways) if policy.can_pull else None
    home = _Found()
    _search(ways, [(0.0, ways.request.home, None)], longest, home)
    best = _Found(home.score, home.worker, None, home.pull_from)
    free: list[_Place] = []
    busy: list[tuple[float, SiteId, LinkState]] = []
    to, links = ways.request.home, ways.links
    for site in sorted(ways.fleet.prefill):
        link = links.get((site, to))
        if link is not None and site != to:
            wait_s = ways.link_wait_s(link)
            if wait_s < policy.max_link_wait_s:
                free.append((wait_s, site, link))
            elif wait_s < math.inf:
                busy.append((wait_s, site, link))
    _search(ways, free, longest, best)
    if best.worker is None and busy:  # nothing at home and no link with room: the least busy one
        _search(ways, [min(busy, key=lambda entry: entry[:2])], longest, best)
        return _decided(ways, best, Reason.LOCAL_UNAVAILABLE)
    if home.worker is None:
        return _decided(ways, best, Reason.LOCAL_UNAVAILABLE)
    if best.link is None:
        return _decided(ways, home, Reason.LINK_BUSY if busy else Reason.LEAST_TTFT)
    if not _better(ways, best.score, home.score):
        return _decided(ways, home, Reason.WITHIN_MARGIN)
    return _decided(ways, best, Reason.LEAST_TTFT)


def _decided(ways: Ways, found: _Found, reason: Reason) -> Decision:
    if found.worker is None:
        return ways.decided(None, reason)
    option = ways.option(found.worker, found.link)
    if found.pull_from is not None:
        option = ways.pulled(found.worker, found.link, found.pull_from) or option
    return ways.decided(_sticky(ways, option, found.score), reason)


def _better(ways: Ways, found: float, than: float) -> bool:
    """Say whether a score is lower by both margins."""
    policy = ways.policy
    return found + policy.margin_s < than and found < than * (1.0 - policy.margin_ratio)


def _score(ways: Ways, option: Option) -> float:
    policy, terms = ways.policy, option.terms
    again_s = terms.prefill_s - ways.prefill_s(option.worker, ways.longest_tokens)
    others_s = policy.recompute_weight * again_s + policy.crowd_weight * terms.wait_s * terms.prefill_s
    return terms.ttft_s + others_s + policy.cost_weight_s * option.cost


def _sticky(ways: Ways, option: Option, found: float) -> Option:
    """Return the way through the session's last worker of that site, unless it is clearly worse."""
    request = ways.request
    previous = None if request.previous is None else ways.fleet.workers.get(request.previous)
    if previous is None or previous is option.worker or previous.site != option.worker.site:
        return option
    if option.pull is not None or not previous.healthy or previous.worker_id in request.excluded:
        return option
    stay = ways.option(previous, option.link)
    return option if _better(ways, found, _score(ways, stay)) else stay


def _longest(ways: Ways) -> _Longest | None:
    """Return a usable worker with the longest prefix of all sites, None when nobody holds anything."""
    best: WorkerState | None = None
    tokens = 0
    usable = ways.match.usable
    for site, claims in ways.match.by_site.items():  # the site with the longest claim is the first
        if usable[claims[0]] <= tokens:
            break
        found = ways.holders(site)
        if found and usable[found[0].worker_id] > tokens:
            best = found[0]
            tokens = usable[best.worker_id]
    if best is None or best.profile is None:
        return None
    tokens = ways.matched(best)
    return _Longest(best, tokens, best.profile.kv_bytes(tokens))


def _search(ways: Ways, places: Sequence[_Place], longest: _Longest | None, best: _Found) -> None:
    """Improve `best` by the ways inside these sites.

    All time is spent here, hence plain numbers and bounds. The score of a way (`_score`, by Ways.arrival_s):

        max(start + prefill + tail, free + transfer) + fixed + (recompute + crowd * wait) * prefill

    where `free` is when the link is, never before `start`, `tail` the transfer of the last chunk, and
    `fixed` the round trip and the price, less `recompute` times the prefill with the longest prefix of all.
    """
    total, excluded, pools = ways.request.total_tokens, ways.request.excluded, ways.fleet.prefill
    cost_weight_s, recompute = ways.policy.cost_weight_s, ways.policy.recompute_weight
    profile: ModelProfile | str | None = "none yet"
    for link_s, site, link in places:
        if (pool := pools.get(site)) is None:
            continue
        for least in pool.leasts(excluded):
            if least.profile is not profile:
                profile = least.profile
                prefill_of, sent = ways.prefill_of(profile), ways.wire_bytes(profile or least.kv)
                least_s = prefill_of(ways.longest_tokens)
            transfer_s = tail_s = fixed_s = backlog_s = 0.0
            if link is not None:
                backlog_s = link.backlog_s()
                transfer_s = sent / link.rate_bytes_per_s
                chunk = least.chunk_tokens
                tail_s = transfer_s * chunk / total if chunk < total else transfer_s
                fixed_s = link.rtt_s + cost_weight_s * link.price_per_gb * 1e-9 * sent
            added_s = tail_s + fixed_s
            if least_s + added_s >= best.score or link_s + transfer_s + fixed_s >= best.score:
                continue  # not even with the longest prefix of all and no queue
            path = (link, link_s, backlog_s, transfer_s, tail_s, fixed_s - recompute * least_s)
            _try_holders(ways, pool, least, prefill_of, path, best)
            wait_s = least.wait_s(ways.now_s)
            if wait_s + least_s + added_s < best.score:
                _try_least(ways, least, wait_s, prefill_of, path, longest, best)


def _try_holders(
    ways: Ways, pool: Pool, least: WorkerState, prefill_of: _Seconds, path: _Path, best: _Found
) -> None:
    """Improve `best` by those of a kind (that of `least`) that hold something, with what they hold."""
    usable, excluded, now_s = ways.match.usable, ways.request.excluded, ways.now_s
    cap = ways.request.total_tokens - 1
    recompute, crowd = ways.policy.recompute_weight, ways.policy.crowd_weight
    link, _, _, _, tail_s, fixed_s = path
    members, uniform, work, added_s = pool.members, pool.uniform, 1.0 + recompute, tail_s + fixed_s
    shortest_s, left = math.inf, HOLDERS
    for worker_id in ways.match.by_site.get(least.site, ()):
        matched = usable[worker_id]
        prefill_s = prefill_of(matched if matched < cap else cap)
        room_s = best.score - added_s - prefill_s * work
        if room_s <= 0.0:
            return  # nor have those room that hold less
        worker = members.get(worker_id)
        if worker is None or not worker.healthy or (excluded and worker_id in excluded):
            continue
        if not (uniform or worker.costs_like(least)):
            continue
        wait_s = worker.wait_s(now_s)
        if wait_s < shortest_s:  # else one of its kind that holds more is free no later
            shortest_s = wait_s
            if wait_s < room_s:
                score = _over(wait_s, prefill_s, path) + (recompute + crowd * wait_s) * prefill_s
                if score < best.score:
                    best.take(score, worker, link, None)
        left -= 1
        if not left:
            return


def _try_least(
    ways: Ways,
    least: WorkerState,
    wait_s: float,
    prefill_of: _Seconds,
    path: _Path,
    longest: _Longest | None,
    best: _Found,
) -> None:
    """Improve `best` by the least loaded of a kind, with what it holds or the longest prefix of all."""
    weight = ways.policy.recompute_weight + ways.policy.crowd_weight * wait_s
    matched = ways.matched(least)
    prefill_s = prefill_of(matched)
    score = _over(wait_s, prefill_s, path) + weight * prefill_s
    if score < best.score:
        best.take(score, least, path[0], None)
    if longest is not None and longest.tokens > matched:
        prefill_s = prefill_of(longest.tokens)
        pull_s, cost = _pull(ways, longest, least.site)
        score = _over(pull_s if pull_s > wait_s else wait_s, prefill_s, path) + weight * prefill_s + cost
        if score < best.score:
            best.take(score, least, path[0], longest.worker)


def _over(start_s: float, prefill_s: float, path: _Path) -> float:
    """Return Ways.arrival_s, and the price in seconds; at home all of the path is 0."""
    _, link_s, backlog_s, transfer_s, tail_s, fixed_s = path
    ready_s = start_s + prefill_s + tail_s
    free_s = start_s + link_s
    if free_s > backlog_s:
        free_s = backlog_s if backlog_s > start_s else start_s
    linked_s = free_s + transfer_s
    return (ready_s if ready_s > linked_s else linked_s) + fixed_s


def _pull(ways: Ways, longest: _Longest, site: SiteId) -> tuple[float, float]:
    """Return the seconds, and the seconds charged for the price, of fetching the longest prefix to `site`."""
    source = longest.worker.site
    if source == site:
        return 0.0, 0.0
    way = ways.links.get((source, site))
    if way is None or not way.usable:
        return math.inf, 0.0
    pull_s = way.rtt_s + ways.link_wait_s(way) + longest.wire_bytes / way.rate_bytes_per_s
    return pull_s, ways.policy.cost_weight_s * way.price(longest.wire_bytes)
