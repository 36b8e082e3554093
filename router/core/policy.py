"""Choose the prefill and the decode worker of a request: a pure function of what is known now.

The rule `prfaas` is the bandwidth-scarce rule of the Prefill-as-a-Service paper (section 4.4): caches are
judged per site; if the prompt less what the local site has cached is at most the threshold, the local
prefill (PD-P) workers take it, else a remote prefill site does, with whatever it has cached itself. `local`
and `remote` (the paper's naive baseline) are the two constant rules. What the paper leaves open is settled
here: exactly at the threshold is local; only a cache on a worker that may be used counts; a wanted side
without a usable worker gives way to the other one, and says so in the reason.

Must not look at a clock, at a random number or at anything but its arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

from cache_service.core.errors import Unavailable
from cache_service.core.ids import SiteId
from router.core.model import (
    Decision,
    DecodeWorker,
    LinkView,
    Match,
    Policy,
    PolicyName,
    PrefillWorker,
    Reason,
    Request,
    RouteKind,
    Workers,
)


def choose(
    request: Request,
    match: Match,
    workers: Workers,
    links: Sequence[LinkView],
    policy: Policy,
    now_s: float,
) -> Decision:
    """Return the route of `request`. O(workers x holders).

    `now_s` is unused by the rules of this module; it belongs to the signature because rules that look at the
    age of a view need it.

    Raises Unavailable (`no_decode_worker`, `no_prefill_worker`) when no route is left.
    """
    del now_s
    decode = _choose_decode(request, workers)
    local, remote = _eligible(request, workers, links)
    best_local = _prefer(local, match)
    best_remote = _prefer(remote, match)
    local_matched = _matched(request, match, best_local)
    local_uncached = request.total_tokens - local_matched

    wanted, reason = _wanted(policy, local_uncached)
    if wanted is RouteKind.REMOTE and best_remote is None:
        wanted, reason = RouteKind.LOCAL, Reason.REMOTE_UNAVAILABLE
    elif wanted is RouteKind.LOCAL and best_local is None:
        wanted, reason = RouteKind.REMOTE, Reason.LOCAL_UNAVAILABLE
    prefill = best_local if wanted is RouteKind.LOCAL else best_remote
    if prefill is None:
        raise Unavailable(
            "no prefill worker can take the request: every one is unhealthy, unreachable or has failed it",
            reason="no_prefill_worker",
        )
    matched = _matched(request, match, prefill)
    return Decision(
        kind=wanted,
        reason=reason,
        prefill=prefill,
        decode=decode,
        matched_tokens=matched,
        uncached_tokens=request.total_tokens - matched,
        local_uncached_tokens=local_uncached,
        threshold_tokens=policy.threshold_tokens,
    )


def _wanted(policy: Policy, local_uncached: int) -> tuple[RouteKind, Reason]:
    if policy.name is PolicyName.LOCAL:
        return RouteKind.LOCAL, Reason.POLICY_LOCAL
    if policy.name is PolicyName.REMOTE:
        return RouteKind.REMOTE, Reason.POLICY_REMOTE
    if local_uncached <= policy.threshold_tokens:
        return RouteKind.LOCAL, Reason.WITHIN_THRESHOLD
    return RouteKind.REMOTE, Reason.ABOVE_THRESHOLD


def _eligible(
    request: Request, workers: Workers, links: Sequence[LinkView]
) -> tuple[list[PrefillWorker], list[PrefillWorker]]:
    """Split the usable prefill workers into (local, remote); a remote site needs a link that is up."""
    reachable: set[SiteId] = {
        link.src for link in links if link.dst == workers.local_site and link.up and link.bytes_per_s > 0
    }
    local: list[PrefillWorker] = []
    remote: list[PrefillWorker] = []
    for worker in workers.prefill:
        if not worker.healthy or worker.worker_id in request.excluded:
            continue
        if worker.site == workers.local_site:
            local.append(worker)
        elif worker.site in reachable:
            remote.append(worker)
    return local, remote


def _prefer(candidates: Sequence[PrefillWorker], match: Match) -> PrefillWorker | None:
    """Longest match, then least work in flight, then in turn, then by name; None when there is none."""
    return min(
        candidates,
        key=lambda w: (-match.usable_tokens(w.worker_id), w.in_flight_tokens, w.assigned, w.worker_id),
        default=None,
    )


def _matched(request: Request, match: Match, worker: PrefillWorker | None) -> int:
    """Return the usable match at `worker`, never the whole prompt (one token is always computed)."""
    if worker is None:
        return 0
    return max(0, min(match.usable_tokens(worker.worker_id), request.total_tokens - 1))


def _choose_decode(request: Request, workers: Workers) -> DecodeWorker:
    usable = [
        w
        for w in workers.decode
        if w.healthy and w.site == workers.local_site and w.worker_id not in request.excluded
    ]
    if not usable:
        raise Unavailable(
            "no decode worker can take the request: every one of this site is unhealthy or has failed it",
            reason="no_decode_worker",
        )
    return min(usable, key=lambda w: (w.in_flight_tokens, w.assigned, w.worker_id))
