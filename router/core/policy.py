"""Choose the prefill and the decode worker of a request: a pure function of what is known now.

The rules are in router/core/policies, described with worked examples in docs/routing.md. None of them looks
at a clock, at a random number or at anything but its arguments, and none changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from router.core.decision import Decision, Links, Policy, PolicyName, Request
from router.core.match import Match
from router.core.policies import baselines, prfaas, ttft
from router.core.policies.options import Ways
from router.core.workers import Fleet

RULES: Mapping[PolicyName, Callable[[Ways], Decision]] = {
    PolicyName.PRFAAS: prfaas.decide,
    PolicyName.TTFT: ttft.decide,
    PolicyName.LOCAL: baselines.local,
    PolicyName.REMOTE: baselines.remote,
    PolicyName.ROUND_ROBIN: baselines.round_robin,
    PolicyName.CACHE_AWARE: baselines.cache_aware,
}


def choose(
    request: Request, match: Match, workers: Fleet, links: Links, policy: Policy, now_s: float
) -> Decision:
    """Return the route of `request`. O(sites), whatever the number of workers.

    Raises Unavailable (`no_decode_worker`, `no_prefill_worker`) when no route is left.
    """
    return RULES[policy.name](Ways(request, match, workers, links, policy, now_s))
