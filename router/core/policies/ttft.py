"""`ttft`: the way with the least predicted time to first token, over all sites and all places of the cache.

For home and for every remote site whose link has room: its least loaded worker and those with the longest
prefixes, each with the cache it has, and, where the fleet can move caches, its least loaded worker after it
fetched the longest prefix of anybody. The score of a way is its predicted TTFT, plus `work_weight` x its
prefill seconds (others wait for them), plus `cost_weight_s` x its price. Home keeps the request unless
another way is better by the margins, and so does the worker of the session's last request: near-ties do not
bounce.

Not looked at, because it cannot win: a site whose link alone takes longer than the best way so far, and a
holder that has both a shorter prefix and no shorter queue than another of its site.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cache_service.core.ids import SiteId
from router.core.decision import Decision, LinkState, Reason
from router.core.policies.options import Option, Ways
from router.core.workers import WorkerState


@dataclass(slots=True)
class _Found:
    """The best way so far; `pull_from` is whose prefix it fetches first."""

    score: float = math.inf
    worker: WorkerState | None = None
    link: LinkState | None = None
    pull_from: WorkerState | None = None


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
    _look(ways, ways.request.home, None, longest, home)
    best = _Found(home.score, home.worker)
    busy: list[tuple[float, SiteId, LinkState]] = []
    for site, link in ways.remote_sites():
        backlog_s = link.backlog_s()
        if backlog_s >= policy.max_link_wait_s:
            busy.append((backlog_s, site, link))
        elif backlog_s + link.rtt_s < best.score:
            _look(ways, site, link, longest, best)
    if best.worker is None and busy:  # nothing at home and no link with room: the least busy one
        _, site, link = min(busy, key=lambda entry: entry[:2])
        _look(ways, site, link, longest, best)
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
    return terms.ttft_s + policy.work_weight * terms.prefill_s + policy.cost_weight_s * option.cost


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
    for site in ways.match.by_site:
        found = ways.holders(site)  # the first of a site is its longest
        if found and (best is None or ways.matched(found[0]) > ways.matched(best)):
            best = found[0]
    if best is None or best.profile is None:
        return None
    tokens = ways.matched(best)
    return _Longest(best, tokens, best.profile.kv_bytes(tokens))


def _look(ways: Ways, site: SiteId, link: LinkState | None, longest: _Longest | None, best: _Found) -> None:
    """Improve `best` by the ways inside one site. Plain numbers: time is spent here."""
    least = ways.least(site)
    if least is None:
        return
    now_s, usable, cap = ways.now_s, ways.match.usable, ways.request.total_tokens - 1
    matched = min(usable.get(least.worker_id, 0), cap)
    wait_s = least.wait_s(now_s)
    _try(ways, least, link, matched, wait_s, best)
    if longest is not None and longest.tokens > matched:
        _try_pull(ways, least, link, longest, wait_s, best)
    shortest_s = math.inf
    for worker in ways.holders(site):
        wait_s = worker.wait_s(now_s)
        if wait_s < shortest_s:  # else one with a longer prefix is free no later
            shortest_s = wait_s
            if wait_s < best.score and worker is not least:
                _try(ways, worker, link, min(usable[worker.worker_id], cap), wait_s, best)


def _try(
    ways: Ways, worker: WorkerState, link: LinkState | None, matched: int, start_s: float, best: _Found
) -> bool:
    """Take one way into `best` if it is better: a prefill from `start_s` on, with `matched` tokens there.

    The score is `_score` of the way's option.
    """
    policy = ways.policy
    work = 1.0 + policy.work_weight
    # With the longest prefix of all it would be no slower, and that figure is the same for most workers.
    least_s = start_s + ways.prefill_s(worker, ways.longest_tokens) * work
    if least_s >= best.score or (link is not None and least_s + link.rtt_s >= best.score):
        return False
    prefill_s = ways.prefill_s(worker, matched)
    found = start_s + prefill_s * work
    if found >= best.score:
        return False
    if link is not None:
        sent = ways.wire_bytes(worker.profile)
        found += ways.arrival_s(worker, link, start_s, start_s + prefill_s, sent) - start_s - prefill_s
        if policy.cost_weight_s:
            found += policy.cost_weight_s * link.price(sent)
        if found >= best.score:
            return False
    best.score, best.worker, best.link, best.pull_from = found, worker, link, None
    return True


def _try_pull(
    ways: Ways, worker: WorkerState, link: LinkState | None, longest: _Longest, wait_s: float, best: _Found
) -> None:
    """Take the way into `best` in which `worker` first fetches the longest prefix of anybody."""
    holder = longest.worker
    pull_s = cost = 0.0
    if holder.site != worker.site:
        way = ways.links.get((holder.site, worker.site))
        if way is None or not way.usable:
            return
        pull_s = way.rtt_s + way.backlog_s() + longest.wire_bytes / way.rate_bytes_per_s
        cost = ways.policy.cost_weight_s * way.price(longest.wire_bytes)
    if pull_s + cost >= best.score:
        return
    trial = _Found(best.score - cost)
    if _try(ways, worker, link, longest.tokens, max(wait_s, pull_s), trial):
        best.score, best.worker, best.link, best.pull_from = trial.score + cost, worker, link, holder
