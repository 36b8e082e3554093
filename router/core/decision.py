"""The values of the routing contract: a request, the links, the policy, and the decision with its terms.

    choose(request, match, workers, links, policy, now_s) -> Decision          router/core/policy.py

`match` is a router.core.match.Match, `workers` a router.core.workers.Fleet, `links` maps (src, dst) to a
LinkState. Decides nothing. Token counts are plain integers; times are seconds, points in time on the caller's
monotonic clock; sizes are bytes; money is in the currency of `price_per_gb`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from cache_service.core.ids import SiteId, WorkerId

if TYPE_CHECKING:
    from router.core.workers import WorkerState


class RouteKind(StrEnum):
    """Where the prefill runs, seen from the site that decodes."""

    LOCAL = "local"
    REMOTE = "remote"


class Reason(StrEnum):
    """Why a route was taken: a closed set, used as a metric label and in a response header."""

    WITHIN_THRESHOLD = "within_threshold"
    ABOVE_THRESHOLD = "above_threshold"
    LINK_BUSY = "link_busy"
    LEAST_TTFT = "least_ttft"
    WITHIN_MARGIN = "within_margin"
    IN_TURN = "in_turn"
    LONGEST_MATCH = "longest_match"
    LEAST_LOAD = "least_load"
    POLICY_LOCAL = "policy_local"
    POLICY_REMOTE = "policy_remote"
    REMOTE_UNAVAILABLE = "remote_unavailable"
    LOCAL_UNAVAILABLE = "local_unavailable"
    NOT_ADMITTED = "not_admitted"


class PolicyName(StrEnum):
    """Names of the routing rules (docs/routing.md)."""

    PRFAAS = "prfaas"
    TTFT = "ttft"
    LOCAL = "local"
    REMOTE = "remote"
    ROUND_ROBIN = "round_robin"
    CACHE_AWARE = "cache_aware"


class RequestClass(StrEnum):
    """How urgent a request is, most urgent first."""

    INTERACTIVE = "interactive"
    STANDARD = "standard"
    BATCH = "batch"


@dataclass(frozen=True, slots=True)
class Policy:
    """A routing rule and its parameters; what a rule does not name it does not read.

    Attributes:
        name: which rule.
        threshold_tokens: `prfaas`: uncached tokens up to which a prompt is prefilled where it is decoded.
        max_link_wait_s: wait for a link (LinkState.wait_s) from which it takes no more requests that have
            another way.
        margin_ratio, margin_s: `ttft`: another site must be faster than home by both of these, and another
            worker than the session's last one.
        recompute_weight: `ttft`: seconds charged per second of prefill that the longest prefix cached
            anywhere would have saved.
        crowd_weight: `ttft`: seconds charged per second of prefill and second that it waits in a queue: as
            long as there is one, others will wait for it.
        cost_weight_s: `ttft`: seconds charged per unit of money.
        can_pull: a worker can fetch a cached prefix from another site (cross-cluster cache transfer).
        held_by_decode: the prefix that a decode worker holds does not travel again.
        balance_abs, balance_rel: `cache_aware`: queued requests above which, in both senses, load decides.
    """

    name: PolicyName
    threshold_tokens: int = 0
    max_link_wait_s: float = 2.0
    margin_ratio: float = 0.05
    margin_s: float = 0.01
    recompute_weight: float = 4.0
    crowd_weight: float = 0.3
    cost_weight_s: float = 0.0
    can_pull: bool = False
    held_by_decode: bool = False
    balance_abs: int = 8
    balance_rel: float = 1.5


@dataclass(frozen=True, slots=True)
class Request:
    """What the policy may know about a request.

    Attributes:
        request_id: for the log only; no decision depends on it.
        total_tokens: prompt length, >= 1.
        home: the site that decodes.
        output_tokens: expected answer, 0 when not known.
        deadline_s: when the first token is due, inf for no deadline.
        session: conversation, "" for none; `previous` is the prefill worker of its last request.
        excluded: workers that already failed this request.
    """

    request_id: str
    total_tokens: int
    home: SiteId
    output_tokens: int = 0
    request_class: RequestClass = RequestClass.STANDARD
    tenant: str = ""
    deadline_s: float = math.inf
    session: str = ""
    previous: WorkerId | None = None
    excluded: frozenset[WorkerId] = frozenset()


@dataclass(slots=True)
class LinkState:
    """A directed link as it is now; KV flows from `src` to `dst`. Its owner changes it in place.

    Attributes:
        capacity_bytes_per_s: as configured.
        rate_bytes_per_s: what new transfers may count on together: the estimate under the ceiling.
        goodput_bytes_per_s: delivered lately, all transfers.
        committed_bytes: of requests that were routed over it and are not delivered yet.
        in_flight_bytes: granted and not acknowledged, as the senders say (other routers' too).
        rtt_s, loss_ratio: smoothed round trip; retransmitted share of the bytes sent lately.
        ceiling_bytes_per_s: never use more than this, inf for no ceiling.
        price_per_gb: of 10^9 bytes leaving `src`.
        up: False while nothing gets through.
        abundant: bandwidth to spare: whole cached prefixes may be moved (hysteresis in link_estimator).
    """

    src: SiteId
    dst: SiteId
    capacity_bytes_per_s: float
    rate_bytes_per_s: float = 0.0
    goodput_bytes_per_s: float = 0.0
    committed_bytes: float = 0.0
    in_flight_bytes: float = 0.0
    rtt_s: float = 0.0
    loss_ratio: float = 0.0
    ceiling_bytes_per_s: float = math.inf
    price_per_gb: float = 0.0
    up: bool = True
    abundant: bool = False

    def __post_init__(self) -> None:
        if not self.rate_bytes_per_s:
            self.rate_bytes_per_s = min(self.capacity_bytes_per_s, self.ceiling_bytes_per_s)

    @property
    def usable(self) -> bool:
        """True when a request may be sent over it."""
        return self.up and self.rate_bytes_per_s > 0

    def backlog_s(self) -> float:
        """Return how long what is under way will keep the link busy, inf when it is not usable."""
        rate = self.rate_bytes_per_s
        if not self.up or rate <= 0:
            return math.inf
        committed, in_flight = self.committed_bytes, self.in_flight_bytes
        return (committed if committed > in_flight else in_flight) / rate

    def wait_s(self, queued_s: float) -> float:
        """Return how long it keeps a prompt waiting whose prefill starts now, inf when it is not usable.

        `queued_s`: how long prompts at `src` wait for their prefill, in the mean. What is committed gets to
        the link over that time; only what the link cannot carry in it is in the way of others.
        """
        rate = self.rate_bytes_per_s
        if not self.up or rate <= 0:
            return math.inf
        ahead_s, in_flight_s = self.committed_bytes / rate - queued_s, self.in_flight_bytes / rate
        return ahead_s if ahead_s > in_flight_s else in_flight_s

    def price(self, size_bytes: float) -> float:
        """Return what it costs to send `size_bytes`."""
        return size_bytes * 1e-9 * self.price_per_gb


Links = Mapping[tuple[SiteId, SiteId], LinkState]


@dataclass(frozen=True, slots=True)
class Pull:
    """A cached prefix to be fetched before the prefill: its leading `tokens`, from one worker to another."""

    holder: WorkerId
    src: SiteId
    dst: SiteId
    tokens: int
    wire_bytes: float


@dataclass(frozen=True, slots=True)
class Terms:
    """The predicted parts of the time to first token, seconds; 0 where no profile is known.

    `ttft_s` is not their sum: prefill, pull and transfer overlap.
    """

    wait_s: float = 0.0
    prefill_s: float = 0.0
    pull_s: float = 0.0
    transfer_s: float = 0.0
    ttft_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """Which two workers serve the request, and why.

    Attributes:
        prefill, decode: the workers' live state; copy the names to keep them.
        matched_tokens: usable tokens at the chosen prefill worker, a pull included.
        uncached_tokens: prompt less `matched_tokens`: what the chosen worker has to compute.
        local_uncached_tokens: prompt less the best match in the home site: what `prfaas` compares in the
            scarce regime; equal to `uncached_tokens` on a local route of that rule.
        threshold_tokens: the threshold it was compared with, raised by a busy link.
        wire_bytes: what crosses between sites, a pull included; `cost` is its price.
        local_s: predicted time to first token in the home site, inf when nobody there can take it.
    """

    kind: RouteKind
    reason: Reason
    prefill: WorkerState
    decode: WorkerState
    matched_tokens: int
    uncached_tokens: int
    local_uncached_tokens: int
    threshold_tokens: int
    wire_bytes: float = 0.0
    cost: float = 0.0
    predicted: Terms = Terms()
    local_s: float = math.inf
    pull: Pull | None = None
