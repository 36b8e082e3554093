"""The routing rules against an independent brute force, and the promises a caller relies on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_service.core.errors import Unavailable
from cache_service.core.ids import SiteId, WorkerId
from router.core.decision import Decision, LinkState, Policy, PolicyName, Reason, Request, RouteKind
from router.core.match import Holder, Match
from router.core.policy import choose
from router.core.profile import KvShape, ModelProfile, Quadratic
from router.core.workers import Fleet, Role, WorkerState

A, B, C = SiteId("A"), SiteId("B"), SiteId("C")
PRFAAS = Policy(PolicyName.PRFAAS, threshold_tokens=512)
TTFT = Policy(PolicyName.TTFT, recompute_weight=0.0, crowd_weight=0.0)
#: 1 ms a token and 1 kB a token, and ten times as fast.
SLOW = ModelProfile("slow", KvShape(1000.0), Quadratic(0.0, 1e-3))
FAST = ModelProfile("fast", KvShape(1000.0), Quadratic(0.0, 1e-4))


def prefill(name: str, site: SiteId = A, **values: object) -> WorkerState:
    return WorkerState(WorkerId(name), site, Role.PREFILL, **values)  # type: ignore[arg-type]


def decode(name: str = "d0", site: SiteId = B, **values: object) -> WorkerState:
    return WorkerState(WorkerId(name), site, Role.DECODE, **values)  # type: ignore[arg-type]


def holder(name: str, site: SiteId, tokens: int) -> Holder:
    return Holder(worker_id=WorkerId(name), site=site, matched_tokens=tokens, usable_tokens=tokens)


def mesh(*links: LinkState) -> dict[tuple[SiteId, SiteId], LinkState]:
    return {(link.src, link.dst): link for link in links or (LinkState(A, B, 1e9),)}


def two_sites() -> Fleet:
    return Fleet([prefill("a0"), prefill("b0", B), decode()])


def route(
    total: int,
    *holders: Holder,
    fleet: Fleet | None = None,
    policy: Policy = PRFAAS,
    links: dict[tuple[SiteId, SiteId], LinkState] | None = None,
    **request: object,
) -> Decision:
    asked = Request("r", total, B, **request)  # type: ignore[arg-type]
    return choose(
        asked, Match(holders), fleet or two_sites(), mesh() if links is None else links, policy, 0.0
    )


# --- prfaas -------------------------------------------------------------------------------------------------


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
    fleet = Fleet([prefill("a0"), prefill("b0", B, healthy=False), prefill("b1", B), decode()])
    decision = route(1000, holder("b0", B, 960), fleet=fleet)
    assert (decision.kind, decision.prefill.worker_id) == (RouteKind.REMOTE, "a0")


def test_wanted_side_without_workers_gives_way() -> None:
    """No remote worker: local serves; no local worker: remote serves; the reason says so."""
    for policy in (PRFAAS, Policy(PolicyName.REMOTE)):
        only_local = Fleet([prefill("b0", B), decode()])
        assert route(9000, fleet=only_local, policy=policy).reason is Reason.REMOTE_UNAVAILABLE
    for policy in (PRFAAS, Policy(PolicyName.LOCAL), Policy(PolicyName.CACHE_AWARE)):
        only_remote = Fleet([prefill("a0"), decode()])
        assert route(9, fleet=only_remote, policy=policy).reason is Reason.LOCAL_UNAVAILABLE


def test_remote_needs_a_link_that_is_up() -> None:
    """Without a usable link towards the decode site the remote site is not a choice."""
    for links in ({}, mesh(LinkState(B, A, 1e9)), mesh(LinkState(A, B, 1e9, up=False))):
        assert route(9000, links=links).reason is Reason.REMOTE_UNAVAILABLE


def test_a_busy_link_raises_the_threshold_and_then_takes_nothing() -> None:
    """Half of the longest wait: one and a half times t; all of it: local whatever the length."""
    links = mesh(LinkState(A, B, 1e9, committed_bytes=1e9))
    assert route(768, links=links).kind is RouteKind.LOCAL
    decision = route(769, links=links)
    assert (decision.kind, decision.threshold_tokens) == (RouteKind.REMOTE, 768)
    full = mesh(LinkState(A, B, 1e9, in_flight_bytes=2e9))
    assert route(9000, links=full).reason is Reason.LINK_BUSY


def test_prompts_that_wait_for_their_prefill_do_not_make_a_link_busy() -> None:
    """Four seconds of bytes behind an hour of prefill are no wait; four already granted are."""
    fleet = Fleet([prefill("a0", queued_s=3600.0, jobs=9), prefill("b0", B), decode()])
    link = LinkState(A, B, 1e9, committed_bytes=4e9)
    assert route(9000, fleet=fleet, links=mesh(link)).kind is RouteKind.REMOTE
    link.in_flight_bytes = 4e9
    assert route(9000, fleet=fleet, links=mesh(link)).reason is Reason.LINK_BUSY


def test_of_several_sites_the_one_with_the_longest_prefix_and_room() -> None:
    """The longer prefix wins, but not over a link that takes nothing more."""
    fleet = Fleet([prefill("a0"), prefill("c0", C), prefill("b0", B), decode()])
    both = mesh(LinkState(A, B, 1e9), LinkState(C, B, 1e9))
    held = (holder("a0", A, 64), holder("c0", C, 128))
    assert route(9000, *held, fleet=fleet, links=both).prefill.worker_id == "c0"
    both[C, B].committed_bytes = 9e9
    assert route(9000, *held, fleet=fleet, links=both).prefill.worker_id == "a0"


def test_abundant_bandwidth_counts_the_longest_prefix_and_moves_it() -> None:
    """The remote prefix makes the prompt short, so home computes after fetching it; and the reverse."""
    fleet = Fleet([prefill("a0", profile=FAST), prefill("b0", B, profile=SLOW), decode()])
    links = mesh(LinkState(A, B, 1e9, abundant=True, price_per_gb=2.0), LinkState(B, A, 1e9))
    policy = Policy(PolicyName.PRFAAS, 512, can_pull=True)
    home = route(1000, holder("a0", A, 960), fleet=fleet, links=links, policy=policy)
    assert (home.kind, home.matched_tokens, home.uncached_tokens) == (RouteKind.LOCAL, 960, 40)
    assert home.pull is not None
    assert (home.pull.src, home.pull.dst, home.pull.wire_bytes) == (A, B, 960_000.0)
    assert home.cost == pytest.approx(960_000e-9 * 2.0)
    away = route(2000, holder("b0", B, 960), fleet=fleet, links=links, policy=policy)
    assert away.pull is not None
    assert (away.kind, away.pull.holder, away.wire_bytes) == (RouteKind.REMOTE, "b0", 2_960_000.0)
    links[A, B].abundant = False
    assert route(1000, holder("a0", A, 960), fleet=fleet, links=links, policy=policy).pull is None


# --- ttft ---------------------------------------------------------------------------------------------------


def chips() -> Fleet:
    return Fleet([prefill("a0", profile=FAST), prefill("b0", B, profile=SLOW), decode()])


def test_long_prompts_go_where_they_are_fast_if_the_link_allows() -> None:
    """8,000 tokens: 8 s at home; 0.8 s away and 8 MB: over 0.8 s at 10 MB/s, 80 s at 100 kB/s."""
    far = route(8000, fleet=chips(), policy=TTFT, links=mesh(LinkState(A, B, 1e7, rtt_s=0.1)))
    assert (far.kind, far.reason) == (RouteKind.REMOTE, Reason.LEAST_TTFT)
    # One chunk: nothing overlaps. 0.8 s of prefill, 0.8 s of transfer, the round trip.
    assert far.predicted.ttft_s == pytest.approx(1.7)
    thin = route(8000, fleet=chips(), policy=TTFT, links=mesh(LinkState(A, B, 1e5)))
    assert (thin.kind, thin.predicted.ttft_s) == (RouteKind.LOCAL, pytest.approx(8.0))


def test_chunks_travel_while_the_next_is_computed() -> None:
    """8,000 tokens in eight chunks, a link faster than the prefill: only the last one is left."""
    fleet = Fleet([prefill("a0", profile=FAST, chunk_tokens=1000), prefill("b0", B, profile=SLOW), decode()])
    found = route(8000, fleet=fleet, policy=TTFT, links=mesh(LinkState(A, B, 2e7)))
    assert found.predicted.ttft_s == pytest.approx(0.8 + 0.4 / 8)


def test_the_link_is_waited_for_beyond_the_queue_of_its_source() -> None:
    """8 s of bytes committed, 2 s of queue: an idle worker's prompt waits 6 s for the link, then 0.4 s."""
    idle, busy = prefill("a0", profile=FAST), prefill("a1", profile=FAST, queued_s=4.0, jobs=4)
    fleet = Fleet([idle, busy, prefill("b0", B, profile=SLOW, queued_s=99.0, jobs=1), decode()])
    links = mesh(LinkState(A, B, 2e7, committed_bytes=16e7))
    patient = replace(TTFT, max_link_wait_s=60.0)
    found = route(8000, fleet=fleet, policy=patient, links=links)
    assert (found.prefill, found.predicted.ttft_s) == (idle, pytest.approx(6.4))
    assert found.local_s == pytest.approx(99.0 + 8.0)


def test_bytes_are_known_from_the_pools_without_a_profile() -> None:
    """What a worker tells of its pools budgets the link; a profile goes before it."""
    pools = KvShape(500.0, state_bytes=7.0)
    fleet = Fleet([prefill("a0", kv=pools), prefill("b0", B), decode()])
    assert route(1000, fleet=fleet).wire_bytes == 500_007.0
    fleet.workers[WorkerId("a0")].profile = FAST
    assert route(1000, fleet=fleet).wire_bytes == 1_000_000.0


def test_a_near_tie_stays_at_home() -> None:
    """Away must be better by both margins: 3 % is not, 10 % is."""
    for seconds, kind in ((0.97, RouteKind.LOCAL), (0.9, RouteKind.REMOTE)):
        away = ModelProfile("x", KvShape(1.0), Quadratic(0.0, seconds * 1e-3))
        fleet = Fleet([prefill("a0", profile=away), prefill("b0", B, profile=SLOW), decode()])
        assert route(1000, fleet=fleet, policy=TTFT, links=mesh(LinkState(A, B, 1e12))).kind is kind


def test_a_session_stays_unless_another_worker_is_clearly_better() -> None:
    """3 ms more work queued does not move a conversation of 1 s; 1 s does."""
    for queued_s, name in ((0.003, "b1"), (1.0, "b0")):
        busy = prefill("b1", B, profile=SLOW, queued_s=queued_s, jobs=1)
        fleet = Fleet([prefill("b0", B, profile=SLOW), busy, decode()])
        assert route(1000, fleet=fleet, policy=TTFT, previous=WorkerId("b1")).prefill.worker_id == name


def test_a_faster_chip_of_the_same_site_is_worth_its_queue() -> None:
    """Two chips in one site: the idle slow one takes 8 s, the fast one 0.8 s after a wait."""
    for queued_s, name in ((2.0, "fast"), (8.0, "slow")):
        busy = prefill("fast", B, profile=FAST, queued_s=queued_s, jobs=1)
        fleet = Fleet([prefill("slow", B, profile=SLOW), busy, decode()])
        assert route(8000, fleet=fleet, policy=TTFT).prefill.worker_id == name


def test_cache_is_weighed_against_the_queue() -> None:
    """800 of 1,000 tokens cached save 0.8 s: worth a wait of half a second, not of a whole one."""
    for queued_s, name in ((0.5, "b1"), (1.0, "b0")):
        busy = prefill("b1", B, profile=SLOW, queued_s=queued_s, jobs=1)
        fleet = Fleet([prefill("b0", B, profile=SLOW), busy, decode()])
        held = holder("b1", B, 800)
        assert route(1000, held, fleet=fleet, policy=TTFT).prefill.worker_id == name


def test_what_is_cached_is_not_lightly_computed_again() -> None:
    """Charged twice more, 0.8 s of saved prefill are worth a wait of up to 2.4 s."""
    policy = replace(TTFT, recompute_weight=2.0)
    for queued_s, name in ((2.3, "b1"), (2.5, "b0")):
        busy = prefill("b1", B, profile=SLOW, queued_s=queued_s, jobs=1)
        fleet = Fleet([prefill("b0", B, profile=SLOW), busy, decode()])
        assert route(1000, holder("b1", B, 800), fleet=fleet, policy=policy).prefill.worker_id == name
        assert route(1000, fleet=fleet, policy=policy).prefill.worker_id == "b0"


def test_in_a_crowd_the_long_prompt_gets_the_fast_place() -> None:
    """4 s of queue at the fast chip, none at the slow one: 1,000 tokens stay off, 8,000 are worth it."""
    fleet = Fleet([prefill("slow", B, profile=SLOW), prefill("fast", B, profile=FAST, queued_s=4.0, jobs=1)])
    fleet.add(decode())
    for crowd, fast in ((0.0, 8000), (0.5, 8000), (2.0, 48_000)):
        policy = replace(TTFT, crowd_weight=crowd)
        assert route(1000, fleet=fleet, policy=policy).prefill.worker_id == "slow"
        assert route(fast, fleet=fleet, policy=policy).prefill.worker_id == "fast"
    # 8,000 tokens: 8 s at the slow one; 4 + 0.8 at the fast one, and 2 x 4 x 0.8 for those behind
    assert route(8000, fleet=fleet, policy=replace(TTFT, crowd_weight=2.0)).prefill.worker_id == "slow"


def test_egress_can_be_made_to_count() -> None:
    """A dollar per GB and a thousand seconds per dollar: 8 MB cost 8 s, more than home loses."""
    links = mesh(LinkState(A, B, 1e7, price_per_gb=1.0))
    assert route(8000, fleet=chips(), policy=TTFT, links=links).cost == pytest.approx(0.008)
    dear = replace(TTFT, cost_weight_s=1000.0)
    assert route(8000, fleet=chips(), policy=dear, links=links).kind is RouteKind.LOCAL


def test_a_dense_model_loses_on_a_thin_link_by_arithmetic() -> None:
    """MiniMax-M2.5 at 32 Ki tokens: 8.3 GB, 6.7 s at 10 Gbit/s; the chips gain 1.7 s."""
    kv = KvShape(253_952.0)
    fleet = Fleet(
        [
            prefill("a0", profile=ModelProfile("H200", kv, Quadratic(0.36, 2.29e-5))),
            prefill("b0", B, profile=ModelProfile("H20", kv, Quadratic(0.9, 5.8e-5))),
            decode(),
        ]
    )
    assert route(32768, fleet=fleet, policy=TTFT, links=mesh(LinkState(A, B, 1.25e9))).kind is RouteKind.LOCAL
    assert route(32768, fleet=fleet, policy=TTFT, links=mesh(LinkState(A, B, 125e9))).kind is RouteKind.REMOTE


# --- baselines ----------------------------------------------------------------------------------------------


def test_round_robin_visits_everybody_that_may_be_used() -> None:
    """As many turns as workers, each once; the excluded one is passed over."""
    fleet = Fleet([prefill("a0"), prefill("a1"), prefill("b0", B), decode()])
    seen = []
    for _ in range(3):
        found = route(9, fleet=fleet, policy=Policy(PolicyName.ROUND_ROBIN))
        fleet.give_prefill(found.prefill, 1, 0.0, 0.0)
        seen.append(found.prefill.worker_id)
    assert sorted(seen) == ["a0", "a1", "b0"]
    policy = Policy(PolicyName.ROUND_ROBIN)
    excluded = frozenset([WorkerId("b0"), WorkerId("a0")])
    assert route(9, fleet=fleet, policy=policy, excluded=excluded).prefill.worker_id == "a1"


def test_cache_aware_follows_the_prefix_until_the_queues_are_out_of_balance() -> None:
    """SGLang's router: longest prefix, but shortest queue when one is longer by both measures."""
    policy = Policy(PolicyName.CACHE_AWARE, balance_abs=2, balance_rel=1.5)
    for jobs, name, reason in ((2, "b1", Reason.LONGEST_MATCH), (3, "b0", Reason.LEAST_LOAD)):
        busy = prefill("b1", B, queued_s=1.0, jobs=jobs)
        fleet = Fleet([prefill("b0", B), busy, prefill("a0"), decode()])
        found = route(1000, holder("b1", B, 500), fleet=fleet, policy=policy)
        assert (found.prefill.worker_id, found.reason) == (name, reason)


# --- all rules ----------------------------------------------------------------------------------------------


def test_the_decode_worker_has_room_if_any_has() -> None:
    """The least busy one is full: the next takes the prompt; none has room: the least busy one."""
    full = decode("d0", total_pages=10, used_pages=5, page_tokens=100)
    roomy = decode("d1", running=3, total_pages=10, used_pages=0, page_tokens=100)
    fleet = Fleet([prefill("b0", B), full, roomy])
    assert route(600, fleet=fleet).decode.worker_id == "d1"
    assert route(400, fleet=fleet, output_tokens=300).decode.worker_id == "d1"
    assert route(400, fleet=fleet).decode.worker_id == "d0"
    assert route(4000, fleet=fleet).decode.worker_id == "d0"


@pytest.mark.parametrize("name", PolicyName)
def test_no_workers_is_unavailable_with_its_reason(name: PolicyName) -> None:
    """Nothing left is an error that names the missing side."""
    for fleet, reason in (
        (Fleet([prefill("b0", B)]), "no_decode_worker"),
        (Fleet([decode()]), "no_prefill_worker"),
        (Fleet([prefill("b0", B, healthy=False), prefill("c0", C), decode()]), "no_prefill_worker"),
    ):
        with pytest.raises(Unavailable) as error:
            route(10, fleet=fleet, policy=Policy(name))
        assert error.value.reason == reason


NAMES = [WorkerId(f"w{i}") for i in range(6)]
SITES = st.sampled_from([A, B, C])
PREFILLS = st.lists(
    st.tuples(
        st.sampled_from(NAMES),
        SITES,
        st.booleans(),
        st.integers(0, 3),
        st.sampled_from([100, 400]),
        st.booleans(),
    ),
    max_size=6,
    unique_by=lambda w: w[0],
)
LINKS = st.lists(
    st.builds(
        LinkState,
        SITES,
        SITES,
        st.sampled_from([1e5, 1e6, 1e9]),
        committed_bytes=st.sampled_from([0.0, 1e5, 1e7]),
        rtt_s=st.sampled_from([0.0, 0.1]),
        price_per_gb=st.sampled_from([0.0, 1.0]),
        up=st.booleans(),
    ),
    max_size=5,
).map(lambda links: {(x.src, x.dst): x for x in links if x.src != x.dst})
POLICIES = st.builds(
    Policy,
    st.sampled_from(PolicyName),
    st.integers(0, 1200),
    max_link_wait_s=st.sampled_from([0.5, 2.0]),
    recompute_weight=st.sampled_from([0.0, 0.5]),
    crowd_weight=st.sampled_from([0.0, 2.0]),
    cost_weight_s=st.sampled_from([0.0, 100.0]),
    can_pull=st.booleans(),
)


@given(
    st.integers(1, 1200),
    st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 1200)), max_size=8),
    PREFILLS,
    LINKS,
    st.frozensets(st.sampled_from(NAMES), max_size=2),
    POLICIES,
)
def test_every_rule_keeps_the_contract(
    total: int,
    held: list[tuple[WorkerId, int]],
    prefills: list[tuple[WorkerId, SiteId, bool, int, int, bool]],
    links: dict[tuple[SiteId, SiteId], LinkState],
    excluded: frozenset[WorkerId],
    policy: Policy,
) -> None:
    """Only what may be used is chosen, sums add up, twice the same is the same; `ttft` is a minimum."""
    site_of = {name: site for name, site, *_ in prefills}
    match = Match(tuple(holder(n, site_of.get(n, A), tokens) for n, tokens in held))
    workers = [
        WorkerState(
            n, s, Role.PREFILL, FAST if f else SLOW, healthy=h, queued_s=0.1 * q, jobs=q, chunk_tokens=c
        )
        for n, s, h, q, c, f in prefills
    ]
    request = Request("r", total, B, excluded=excluded)

    def usable(w: WorkerState) -> bool:
        link = links.get((w.site, B))
        return (
            w.healthy and w.worker_id not in excluded and (w.site == B or (link is not None and link.usable))
        )

    def decide(order: list[WorkerState]) -> Decision:
        return choose(request, match, Fleet([*order, decoder]), links, policy, 0.0)

    decoder = decode()
    if not any(usable(w) for w in workers):
        with pytest.raises(Unavailable):
            decide(workers)
        return
    found = decide(workers)
    assert usable(found.prefill)
    assert found.kind is (RouteKind.LOCAL if found.prefill.site == B else RouteKind.REMOTE)
    assert found.matched_tokens + found.uncached_tokens == total
    assert found.uncached_tokens >= 1
    assert math.isfinite(found.predicted.ttft_s)
    if found.pull is None:
        claim = max([tokens for n, tokens in held if n == found.prefill.worker_id], default=0)
        assert found.matched_tokens == min(claim, total - 1)
        assert (found.wire_bytes > 0) is (found.kind is RouteKind.REMOTE)
    else:
        assert policy.can_pull
        assert found.matched_tokens == found.pull.tokens
    assert decide(workers) == found
    if policy.name is not PolicyName.ROUND_ROBIN:
        assert decide(workers[::-1]).prefill.worker_id == found.prefill.worker_id
    if policy.name is PolicyName.TTFT:
        _check_least(found, total, match, [w for w in workers if usable(w)], workers, links, policy)


def _check_least(
    found: Decision,
    total: int,
    match: Match,
    usable: list[WorkerState],
    everyone: list[WorkerState],
    links: dict[tuple[SiteId, SiteId], LinkState],
    policy: Policy,
) -> None:
    """Brute force over the ways without a pull: none that may be taken is better by the margins."""

    longest = min(match.longest_tokens, total - 1)

    def score(worker: WorkerState, ttft_s: float, prefill_s: float, cost: float) -> float:
        assert worker.profile is not None
        again_s = prefill_s - worker.profile.prefill_s(total - longest, longest)
        others_s = policy.recompute_weight * again_s + policy.crowd_weight * worker.queued_s * prefill_s
        return ttft_s + others_s + policy.cost_weight_s * cost

    def queued_s(site: SiteId) -> float:
        members = [w.queued_s for w in everyone if w.site == site]
        return sum(members) / len(members)

    terms = found.predicted
    chosen = score(found.prefill, terms.ttft_s, terms.prefill_s, found.cost)
    for worker in usable:
        matched = min(match.usable_tokens(worker.worker_id), total - 1)
        assert worker.profile is not None
        prefill_s = worker.profile.prefill_s(total - matched, matched)
        done_s, cost = worker.queued_s + prefill_s, 0.0
        if worker.site != B:
            link = links[worker.site, B]
            backlog_s = link.committed_bytes / link.rate_bytes_per_s
            wait_s = max(0.0, backlog_s - queued_s(worker.site))
            if wait_s >= policy.max_link_wait_s:
                continue
            size = worker.profile.kv_bytes(total)
            sent_s = size / link.rate_bytes_per_s
            last_s = done_s + sent_s * min(1.0, worker.chunk_tokens / total)
            free_s = max(worker.queued_s, min(backlog_s, worker.queued_s + wait_s))
            done_s = max(last_s, free_s + sent_s) + link.rtt_s
            cost = link.price(size)
        other = score(worker, done_s, prefill_s, cost)
        margin = max(policy.margin_s, policy.margin_ratio * chosen)
        assert other + margin >= chosen - 1e-9
