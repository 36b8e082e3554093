"""The rules to compare with: `local`, `remote`, `round_robin`, `cache_aware`.

`remote` is the paper's naive heterogeneous system: every prefill goes to another site. `round_robin` gives
every usable prefill worker of every reachable site its turn. `cache_aware` is that of SGLang's own router
inside the home site: the longest prefix, unless the queues are out of balance, then the shortest.
"""

from __future__ import annotations

from router.core.decision import Decision, LinkState, Reason
from router.core.policies.options import Ways
from router.core.policies.prfaas import best_remote
from router.core.workers import Pool


def local(ways: Ways) -> Decision:
    """Prefill in the home site; elsewhere only if that cannot."""
    worker = ways.at_home
    if worker is not None:
        return ways.decided(ways.option(worker, None), Reason.POLICY_LOCAL)
    remote = best_remote(ways)
    return ways.decided(None if remote is None else ways.option(*remote), Reason.LOCAL_UNAVAILABLE)


def remote(ways: Ways) -> Decision:
    """Prefill in another site; at home only if none can."""
    found = best_remote(ways)
    if found is not None:
        return ways.decided(ways.option(*found), Reason.POLICY_REMOTE)
    worker = ways.at_home
    option = None if worker is None else ways.option(worker, None)
    return ways.decided(option, Reason.REMOTE_UNAVAILABLE)


def round_robin(ways: Ways) -> Decision:
    """Give the next worker its turn, unusable ones left out. O(1), or O(workers) when some are unusable."""
    request, fleet = ways.request, ways.fleet
    ways_in: list[tuple[Pool, LinkState | None]] = []
    if request.home in fleet.prefill:
        ways_in.append((fleet.prefill[request.home], None))
    ways_in.extend((fleet.prefill[site], link) for site, link in ways.remote_sites())
    count = sum(len(pool.members) for pool, _ in ways_in)
    for step in range(count):
        at = (fleet.turn + step) % count
        place = 0
        while at >= len(ways_in[place][0].members):
            at -= len(ways_in[place][0].members)
            place += 1
        pool, link = ways_in[place]
        worker = pool.at(at)
        if worker.healthy and worker.worker_id not in request.excluded:
            return ways.decided(ways.option(worker, link), Reason.IN_TURN)
    return ways.decided(None, Reason.IN_TURN)


def cache_aware(ways: Ways) -> Decision:
    """Prefer the longest prefix at home while its queue is not out of balance."""
    home, policy = ways.request.home, ways.policy
    least, longest = ways.least(home), ways.at_home
    if least is None or longest is None:
        return local(ways)
    ahead = longest.jobs - least.jobs
    unbalanced = ahead > policy.balance_abs and longest.jobs > policy.balance_rel * least.jobs
    if unbalanced or not ways.matched(longest):
        return ways.decided(ways.option(least, None), Reason.LEAST_LOAD)
    return ways.decided(ways.option(longest, None), Reason.LONGEST_MATCH)
