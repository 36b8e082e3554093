"""The values that a routing decision is made from, and the decision itself.

Decides nothing; every type is frozen, so a decision can be replayed from a log or a simulator. Token counts
are plain integers; times are seconds on the caller's monotonic clock. Words are those of the project
glossary: `matched` is what the index claims, `hit` is what the engine reused (never known here).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cache_service.core.ids import SiteId, WorkerId


class RouteKind(StrEnum):
    """Where the prefill runs, seen from the router's own site."""

    LOCAL = "local"
    REMOTE = "remote"


class Reason(StrEnum):
    """Why a route was taken: a closed set, used as a metric label and in a response header."""

    WITHIN_THRESHOLD = "within_threshold"
    ABOVE_THRESHOLD = "above_threshold"
    POLICY_LOCAL = "policy_local"
    POLICY_REMOTE = "policy_remote"
    REMOTE_UNAVAILABLE = "remote_unavailable"
    LOCAL_UNAVAILABLE = "local_unavailable"


class PolicyName(StrEnum):
    """Names of the routing rules."""

    PRFAAS = "prfaas"
    LOCAL = "local"
    REMOTE = "remote"


@dataclass(frozen=True, slots=True)
class Policy:
    """A routing rule and its parameters.

    Attributes:
        name: which rule.
        threshold_tokens: uncached tokens up to which a prompt is prefilled in the decode site, >= 0.
    """

    name: PolicyName
    threshold_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """What the policy may know about a request.

    Attributes:
        request_id: for the log only; no decision depends on it.
        total_tokens: prompt length, >= 1.
        excluded: workers that already failed this request.
    """

    request_id: str
    total_tokens: int
    excluded: frozenset[WorkerId] = frozenset()


@dataclass(frozen=True, slots=True)
class PrefillWorker:
    """One prefill worker as the router sees it now.

    Attributes:
        in_flight_tokens: uncached tokens of the requests it is working on.
        assigned: requests given to it since start; breaks ties in turn.
    """

    worker_id: WorkerId
    site: SiteId
    healthy: bool = True
    in_flight_tokens: int = 0
    assigned: int = 0


@dataclass(frozen=True, slots=True)
class DecodeWorker:
    """One decode worker as the router sees it now; `in_flight_tokens` counts prompt tokens it holds."""

    worker_id: WorkerId
    site: SiteId
    healthy: bool = True
    in_flight_tokens: int = 0
    assigned: int = 0


@dataclass(frozen=True, slots=True)
class Workers:
    """All workers of one moment; `local_site` is the site whose decode workers serve the client."""

    local_site: SiteId
    prefill: tuple[PrefillWorker, ...] = ()
    decode: tuple[DecodeWorker, ...] = ()


@dataclass(frozen=True, slots=True)
class LinkView:
    """A directed link between sites; KV flows from the prefill site `src` to the decode site `dst`."""

    src: SiteId
    dst: SiteId
    bytes_per_s: float
    up: bool = True


@dataclass(frozen=True, slots=True)
class Holder:
    """What the index claims that one worker holds of this prompt.

    Attributes:
        matched_tokens: leading tokens whose blocks it holds.
        usable_tokens: how many of them the engine could reuse; at most the prompt less one token.
    """

    worker_id: WorkerId
    site: SiteId
    matched_tokens: int
    usable_tokens: int


@dataclass(frozen=True, slots=True)
class Match:
    """The index's answer; no holders when it was not asked or did not answer."""

    holders: tuple[Holder, ...] = ()
    available: bool = True
    reason: str = ""

    def usable_tokens(self, worker_id: WorkerId) -> int:
        """Return the reusable tokens claimed for `worker_id` (its best rank), 0 if none. O(holders)."""
        return max((h.usable_tokens for h in self.holders if h.worker_id == worker_id), default=0)


@dataclass(frozen=True, slots=True)
class Decision:
    """Which two workers serve the request, and why.

    Attributes:
        matched_tokens: usable tokens claimed for the chosen prefill worker.
        uncached_tokens: prompt less `matched_tokens`: what the chosen worker has to compute.
        local_uncached_tokens: prompt less the best match in the local site: what the threshold was compared
            with; equal to `uncached_tokens` on a local route.
    """

    kind: RouteKind
    reason: Reason
    prefill: PrefillWorker
    decode: DecodeWorker
    matched_tokens: int
    uncached_tokens: int
    local_uncached_tokens: int
    threshold_tokens: int
