"""`prfaas`: the paper's rules (arXiv 2604.15039, section 4.4), for any number of prefill sites.

Scarce bandwidth: caches are judged per site; if the prompt less what the home site has cached is at most t,
home prefills it, else a remote site does, with whatever that has cached itself. Abundant bandwidth (and a
fleet that can move caches): the longest prefix of all sites counts against t, and if it lies in another site
than the one that computes, it is fetched first. What the paper leaves open is settled here: exactly at t is
home; only a cache on a worker that may be used counts; of several remote sites the one with the longest
prefix, then the shortest wait for its link, then the least work; a busy link raises t in proportion (times
two at `max_link_wait_s`), and from there on takes nothing; a side without a usable worker gives way to the
other.
"""

from __future__ import annotations

from router.core.decision import Decision, LinkState, Reason
from router.core.policies.options import Option, Ways
from router.core.workers import WorkerState


def best_remote(ways: Ways) -> tuple[WorkerState, LinkState] | None:
    """Return the remote worker that the rule would take, and its link."""
    best: tuple[WorkerState, LinkState] | None = None
    best_key: tuple[bool, int, float, tuple[float, int, int, str]] | None = None
    for site, link in ways.remote_sites():
        worker = ways.affine(site)
        if worker is None:
            continue
        wait_s = ways.link_wait_s(link)
        key = (wait_s >= ways.policy.max_link_wait_s, -ways.matched(worker), wait_s, worker.load())
        if best_key is None or key < best_key:
            best, best_key = (worker, link), key
    return best


def decide(ways: Ways) -> Decision:
    """Return the paper's route."""
    request, policy = ways.request, ways.policy
    home, remote = ways.at_home, best_remote(ways)
    local_uncached = ways.local_uncached()
    threshold = policy.threshold_tokens
    if remote is None:
        option = None if home is None else ways.option(home, None)
        reason = Reason.WITHIN_THRESHOLD if local_uncached <= threshold else Reason.REMOTE_UNAVAILABLE
        return ways.decided(option, reason)
    worker, link = remote
    busy = min(1.0, ways.link_wait_s(link) / policy.max_link_wait_s)
    threshold = int(threshold * (1.0 + busy))
    if home is None:
        reason = Reason.LOCAL_UNAVAILABLE if local_uncached <= threshold else Reason.ABOVE_THRESHOLD
        return ways.decided(ways.option(worker, link), reason, threshold=threshold)
    judged = local_uncached
    move = policy.can_pull and link.abundant
    if move:
        judged = min(judged, request.total_tokens - ways.matched(worker))
    chosen: Option | None
    if judged <= threshold:
        chosen, reason = ways.option(home, None), Reason.WITHIN_THRESHOLD
        source = worker
    elif busy >= 1.0:
        chosen, reason = ways.option(home, None), Reason.LINK_BUSY
        source = worker
    else:
        chosen, reason = ways.option(worker, link), Reason.ABOVE_THRESHOLD
        source = home
    if move:
        chosen = ways.pulled(chosen.worker, chosen.link, source) or chosen
    return ways.decided(chosen, reason, threshold=threshold)
