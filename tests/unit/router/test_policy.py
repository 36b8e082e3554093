"""The routing rules against an independent brute force, and the promises a caller relies on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_service.core.errors import Unavailable
from cache_service.core.ids import SiteId, WorkerId
from router.core.model import (
    Decision,
    DecodeWorker,
    Holder,
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
from router.core.policy import choose

A, B = SiteId("A"), SiteId("B")
LINK = LinkView(src=A, dst=B, bytes_per_s=1e9)
PRFAAS = Policy(PolicyName.PRFAAS, threshold_tokens=512)


def prefill(name: str, site: SiteId = A, **values: object) -> PrefillWorker:
    return PrefillWorker(worker_id=WorkerId(name), site=site, **values)  # type: ignore[arg-type]


def decode(name: str = "d0", site: SiteId = B, **values: object) -> DecodeWorker:
    return DecodeWorker(worker_id=WorkerId(name), site=site, **values)  # type: ignore[arg-type]


def holder(name: str, site: SiteId, tokens: int) -> Holder:
    return Holder(worker_id=WorkerId(name), site=site, matched_tokens=tokens, usable_tokens=tokens)


TWO_SITES = Workers(B, (prefill("a0"), prefill("b0", B)), (decode(),))


def route(total: int, *holders: Holder, workers: Workers = TWO_SITES, policy: Policy = PRFAAS) -> Decision:
    return choose(Request("r", total), Match(holders), workers, (LINK,), policy, 0.0)


@pytest.mark.parametrize(
    ("total", "kind", "reason"),
    [
        (1, RouteKind.LOCAL, Reason.WITHIN_THRESHOLD),
        (512, RouteKind.LOCAL, Reason.WITHIN_THRESHOLD),
        (513, RouteKind.REMOTE, Reason.ABOVE_THRESHOLD),
    ],
)
def test_threshold_is_inclusive_for_the_local_site(total: int, kind: RouteKind, reason: Reason) -> None:
    """Exactly at the threshold stays local, one more token goes remote."""
    decision = route(total)
    assert (decision.kind, decision.reason, decision.uncached_tokens) == (kind, reason, total)


def test_only_the_local_cache_is_compared_with_the_threshold() -> None:
    """A prefix cached in the remote site does not make a prompt short; one cached locally does."""
    cached_there = route(1000, holder("a0", A, 960))
    assert cached_there.kind is RouteKind.REMOTE
    assert (cached_there.matched_tokens, cached_there.uncached_tokens) == (960, 40)
    assert cached_there.local_uncached_tokens == 1000
    cached_here = route(1000, holder("b0", B, 512))
    assert (cached_here.kind, cached_here.matched_tokens) == (RouteKind.LOCAL, 512)


def test_full_match_leaves_one_token() -> None:
    """An index that claims the whole prompt is cut to n-1: the engine always computes one token."""
    assert route(256, holder("b0", B, 256)).uncached_tokens == 1


def test_cache_of_an_unhealthy_local_worker_does_not_count() -> None:
    """A match that nobody may use must not keep a long prompt local."""
    workers = Workers(B, (prefill("a0"), prefill("b0", B, healthy=False), prefill("b1", B)), (decode(),))
    decision = route(1000, holder("b0", B, 960), workers=workers)
    assert (decision.kind, decision.prefill.worker_id) == (RouteKind.REMOTE, "a0")


def test_wanted_side_without_workers_gives_way() -> None:
    """No remote worker: local serves; no local worker: remote serves; the reason says so."""
    only_local = Workers(B, (prefill("b0", B),), (decode(),))
    assert route(9000, workers=only_local).reason is Reason.REMOTE_UNAVAILABLE
    only_remote = Workers(B, (prefill("a0"),), (decode(),))
    assert route(9, workers=only_remote).reason is Reason.LOCAL_UNAVAILABLE


def test_remote_needs_a_link_that_is_up() -> None:
    """Without a usable link towards the decode site the remote site is not a choice."""
    for links in ((), (LinkView(B, A, 1e9),), (LinkView(A, B, 1e9, up=False),), (LinkView(A, B, 0.0),)):
        decision = choose(Request("r", 9000), Match(), TWO_SITES, links, PRFAAS, 0.0)
        assert decision.reason is Reason.REMOTE_UNAVAILABLE


def test_equal_workers_are_used_in_turn() -> None:
    """With nothing else to tell them apart, the worker with fewer requests given so far is next."""
    workers = Workers(B, (prefill("a0", assigned=3), prefill("a1", assigned=2)), (decode(),))
    assert route(9000, workers=workers).prefill.worker_id == "a1"


def test_work_in_flight_comes_after_the_match() -> None:
    """The longest match wins over an idle worker; among equal matches the idle one wins."""
    workers = Workers(B, (prefill("a0", in_flight_tokens=500), prefill("a1")), (decode(),))
    assert route(9000, workers=workers).prefill.worker_id == "a1"
    assert route(9000, holder("a0", A, 64), workers=workers).prefill.worker_id == "a0"


def test_no_workers_is_unavailable_with_its_reason() -> None:
    """Nothing left is an error that names the missing side."""
    with pytest.raises(Unavailable) as error:
        route(10, workers=Workers(B, (prefill("b0", B),), ()))
    assert error.value.reason == "no_decode_worker"
    with pytest.raises(Unavailable) as error:
        route(10, workers=Workers(B, (), (decode(),)))
    assert error.value.reason == "no_prefill_worker"


NAMES = [WorkerId(f"w{i}") for i in range(5)]
SITES = st.sampled_from([A, B, SiteId("C")])
PREFILLS = st.lists(
    st.builds(
        PrefillWorker,
        worker_id=st.sampled_from(NAMES),
        site=SITES,
        healthy=st.booleans(),
        in_flight_tokens=st.integers(0, 3),
        assigned=st.integers(0, 2),
    ),
    max_size=5,
    unique_by=lambda w: w.worker_id,
).map(tuple)
DECODES = st.lists(
    st.builds(
        DecodeWorker,
        worker_id=st.sampled_from([WorkerId(f"d{i}") for i in range(3)]),
        site=SITES,
        healthy=st.booleans(),
        in_flight_tokens=st.integers(0, 3),
    ),
    max_size=3,
    unique_by=lambda w: w.worker_id,
).map(tuple)
HOLDERS = st.lists(st.builds(holder, st.sampled_from(NAMES), SITES, st.integers(0, 12)), max_size=6).map(
    tuple
)
LINKS = st.lists(st.builds(LinkView, SITES, SITES, st.sampled_from([0.0, 1e9]), st.booleans()), max_size=4)
REQUESTS = st.builds(
    Request,
    request_id=st.just("r"),
    total_tokens=st.integers(1, 12),
    excluded=st.frozensets(st.sampled_from([*NAMES, WorkerId("d0")]), max_size=2),
)
POLICIES = st.builds(Policy, st.sampled_from(PolicyName), st.integers(0, 12))


@given(REQUESTS, HOLDERS, PREFILLS, DECODES, LINKS, POLICIES)
def test_choice_equals_brute_force(
    request_: Request,
    holders: tuple[Holder, ...],
    prefills: tuple[PrefillWorker, ...],
    decodes: tuple[DecodeWorker, ...],
    links: list[LinkView],
    policy: Policy,
) -> None:
    """Enumerate every pair, keep the allowed ones, rank them by the written rule: the same answer."""
    workers, match = Workers(B, prefills, decodes), Match(holders)

    def cached(w: PrefillWorker) -> int:
        claims = [h.usable_tokens for h in holders if h.worker_id == w.worker_id]
        return min(max(claims, default=0), request_.total_tokens - 1)

    def claim(w: PrefillWorker) -> int:
        return max([h.usable_tokens for h in holders if h.worker_id == w.worker_id], default=0)

    allowed = [
        (p, d)
        for p in prefills
        for d in decodes
        if p.healthy
        and d.healthy
        and d.site == B
        and not {p.worker_id, d.worker_id} & request_.excluded
        and (p.site == B or any((x.src, x.dst, x.up) == (p.site, B, True) and x.bytes_per_s for x in links))
    ]
    if not allowed:
        with pytest.raises(Unavailable):
            choose(request_, match, workers, links, policy, 0.0)
        return
    shortest = min(
        [request_.total_tokens - cached(p) for p, _ in allowed if p.site == B], default=request_.total_tokens
    )
    local_wanted = policy.name is PolicyName.LOCAL or (
        policy.name is PolicyName.PRFAAS and shortest <= policy.threshold_tokens
    )
    expected = min(
        allowed,
        key=lambda pair: (
            (pair[0].site == B) is not local_wanted,
            -claim(pair[0]),
            pair[0].in_flight_tokens,
            pair[0].assigned,
            pair[0].worker_id,
            pair[1].in_flight_tokens,
            pair[1].assigned,
            pair[1].worker_id,
        ),
    )
    decision = choose(request_, match, workers, links, policy, 0.0)
    assert (decision.prefill, decision.decode) == expected
    assert decision.kind is (RouteKind.LOCAL if expected[0].site == B else RouteKind.REMOTE)
    assert decision.matched_tokens == cached(expected[0])
    assert decision.uncached_tokens + decision.matched_tokens == request_.total_tokens
    assert decision.uncached_tokens >= 1
    assert decision.local_uncached_tokens == shortest
    assert decision == choose(request_, match, workers, list(reversed(links)), policy, 99.0)
    shuffled = Workers(B, prefills[::-1], decodes[::-1])
    assert decision == choose(request_, Match(holders[::-1]), shuffled, links, policy, 0.0)
