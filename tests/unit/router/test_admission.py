"""The admission queue: never over budget, nothing leaks, nobody starves, always the same."""

from __future__ import annotations

import math
from collections.abc import Hashable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.core.admission import MAX_RETRY_S, AdmissionQueue, Limits, Outcome, Result, Ticket
from router.core.decision import RequestClass


def ticket(name: str, **values: object) -> Ticket:
    base = {
        "request_class": RequestClass.STANDARD,
        "tenant": "t",
        "cost": 1000.0,
        "decode": "d",
        "pages": 1,
        "arrived_s": 0.0,
        "link": "l",
        "link_bytes": 1.0,
    }
    return Ticket(name, **(base | values))  # type: ignore[arg-type]


def queue(pages: int = 1000, link_bytes: float = 10.0, **limits: object) -> AdmissionQueue:
    made = AdmissionQueue(Limits(**limits))  # type: ignore[arg-type]
    made.set_decode("d", pages)
    made.set_link("l", link_bytes, 1.0)
    return made


def names(results: list[Result], outcome: Outcome = Outcome.ADMIT) -> list[str]:
    return [r.ticket.ticket_id for r in results if r.outcome is outcome]


def test_what_fits_is_admitted_and_what_does_not_waits_for_its_turn() -> None:
    """Ten bytes of budget: six, then six more only when the first are over the link."""
    q = queue()
    assert names(q.offer(ticket("a", link_bytes=6.0), 0.0)) == ["a"]
    assert names(q.offer(ticket("b", link_bytes=6.0), 0.0), Outcome.WAIT) == ["b"]
    assert names(q.delivered("a", 1.0)) == ["b"]
    assert q.decodes["d"].used == 2
    assert q.release("a", 2.0) == []
    assert q.release("b", 2.0) == []
    assert (q.decodes["d"].used, q.links["l"].used) == (0, 0)


def test_a_large_one_is_not_overtaken_but_does_not_stop_others() -> None:
    """Small tickets behind a large one on its link wait; one on another link goes."""
    q = queue()
    q.set_link("m", 10.0, 1.0)
    q.offer(ticket("a", link_bytes=6.0), 0.0)
    q.offer(ticket("large", link_bytes=9.0), 0.0)
    assert names(q.offer(ticket("small", link_bytes=1.0), 0.0), Outcome.WAIT) == ["small"]
    assert names(q.offer(ticket("other", link="m"), 0.0)) == ["other"]
    assert names(q.release("a", 1.0)) == ["large", "small"]


def test_larger_than_the_link_goes_alone_and_larger_than_the_worker_never() -> None:
    """A prompt above the link's budget has the link to itself; one above the worker's pages is refused."""
    q = queue()
    assert names(q.offer(ticket("a", link_bytes=99.0), 0.0)) == ["a"]
    (result,) = q.offer(ticket("b", pages=1001), 0.0)
    assert (result.outcome, result.reason, result.retry_after_s) == (Outcome.REJECT, "too_large", MAX_RETRY_S)


def test_time_running_out_sends_it_home() -> None:
    """At its due time less its service time the link is given up for the local route."""
    q = queue()
    q.offer(ticket("a", link_bytes=10.0), 0.0)
    q.offer(ticket("b", service_s=4.0, local_s=5.0), 0.0)
    q.offer(ticket("far", service_s=4.0), 0.0)
    assert q.poll(5.9) == []
    assert names(q.poll(6.0), Outcome.LOCAL) == ["b"]
    (late,) = q.poll(60.0)
    assert (late.ticket.ticket_id, late.outcome, late.reason) == ("far", Outcome.REJECT, "waited_too_long")


def test_a_link_with_room_takes_what_will_be_late_anyway() -> None:
    """Predicted past its objective on arrival: home is for those that lack the link."""
    assert names(queue().offer(ticket("a", service_s=40.0, local_s=50.0), 0.0)) == ["a"]


def test_nobody_goes_home_to_wait_longer() -> None:
    """Late either way (due at 10): the link is waited for until home would have been as fast."""
    q = queue()
    q.offer(ticket("a", link_bytes=10.0), 0.0)
    q.offer(ticket("b", service_s=12.0, local_s=20.0), 0.0)
    assert q.poll(7.9) == []
    assert names(q.poll(8.0), Outcome.LOCAL) == ["b"]


def test_retry_after_is_the_time_that_the_link_needs() -> None:
    """10 bytes under way, 30 waiting, 5 more: 35 bytes above the budget at 1 byte/s."""
    q = queue(waiting=3)
    for n in range(4):
        q.offer(ticket(str(n), link_bytes=10.0), 0.0)
    (refused,) = q.offer(ticket("x", link_bytes=5.0), 0.0)
    assert (refused.outcome, refused.reason, refused.retry_after_s) == (Outcome.REJECT, "queue_full", 35.0)


def test_a_tenant_may_not_fill_the_queue() -> None:
    """The bound of one tenant leaves room for the others."""
    q = queue(waiting_per_tenant=1)
    q.offer(ticket("a", link_bytes=10.0), 0.0)
    assert q.offer(ticket("b"), 0.0)[-1].outcome is Outcome.WAIT
    assert q.offer(ticket("c"), 0.0)[-1].outcome is Outcome.REJECT
    assert q.offer(ticket("d", tenant="u"), 0.0)[-1].outcome is Outcome.WAIT


def served(q: AdmissionQueue, first: str, rounds: int) -> list[str]:
    """Release one after the other with room for one; return the order of admission."""
    order, now = [], first
    for _ in range(rounds):
        (now,) = names(q.release(now, 0.0)) or [""]
        order.append(now)
    return order


def test_tenants_share_by_cost() -> None:
    """One tenant's tickets cost eight times the other's: it is served an eighth as often."""
    q = queue(pages=1, waiting_per_tenant=1000)
    q.offer(ticket("first"), 0.0)
    for n in range(100):
        q.offer(ticket(f"big{n}", tenant="big", cost=32768.0), 0.0)
        q.offer(ticket(f"small{n}", tenant="small", cost=4096.0), 0.0)
    order = served(q, "first", 90)
    assert 9 <= sum(n.startswith("big") for n in order) <= 11


def test_classes_share_by_weight_and_none_starves() -> None:
    """Under a flood of interactive work standard gets 4 of 21, batch 1 of 21."""
    q = queue(pages=1, waiting_per_tenant=1000, max_wait_s=dict.fromkeys(RequestClass, 1e9))
    q.offer(ticket("first"), 0.0)
    for n in range(300):
        for name in RequestClass:
            q.offer(ticket(f"{name}-{n}", request_class=name, cost=8192.0), 0.0)
    order = served(q, "first", 210)
    shares = {name: sum(n.startswith(name) for n in order) for name in RequestClass}
    assert abs(shares[RequestClass.INTERACTIVE] - 160) <= 16
    assert abs(shares[RequestClass.STANDARD] - 40) <= 5
    assert abs(shares[RequestClass.BATCH] - 10) <= 2


def test_earliest_deadline_first_inside_a_tenant() -> None:
    """Order of due time, arrival among equals."""
    q = queue(pages=1)
    q.offer(ticket("first"), 0.0)
    for name, due in (("c", 9.0), ("a", 3.0), ("b", 3.0)):
        q.offer(ticket(name, deadline_s=due), 0.0)
    assert served(q, "first", 3) == ["a", "b", "c"]


def test_names_in_use_and_figures_that_cannot_be_are_refused() -> None:
    """A second ticket of the same name, no cost, negative bytes."""
    q = queue()
    q.offer(ticket("a"), 0.0)
    for wrong in (ticket("a"), ticket("b", cost=0.0), ticket("b", link_bytes=-1.0), ticket("b", pages=-1)):
        with pytest.raises(ValueError, match=r"ticket_id|cost"):
            q.offer(wrong, 0.0)


class Machine(RuleBasedStateMachine):
    """Random offers, releases, departures, budgets and time, against what must always hold."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.log: list[tuple[object, ...]] = []
        self.q = self._new()
        self.twin = self._new()
        self.waiting: dict[str, Ticket] = {}
        self.held: dict[str, tuple[Ticket, bool]] = {}
        self.count = 0

    @staticmethod
    def _new() -> AdmissionQueue:
        q = AdmissionQueue(Limits(waiting=12, waiting_per_tenant=6))
        for worker in "de":
            q.set_decode(worker, 8)
        for link in "lm":
            q.set_link(link, 10.0, 2.0)
        return q

    def _take(self, results: list[Result], twin: list[Result]) -> None:
        assert results == twin  # the same calls, the same answers
        for result in results:
            name = result.ticket.ticket_id
            if result.outcome is Outcome.WAIT:
                self.waiting[name] = result.ticket
                continue
            self.waiting.pop(name, None)
            if result.outcome is Outcome.REJECT:
                assert 1.0 <= result.retry_after_s <= MAX_RETRY_S
                continue
            local = result.outcome is Outcome.LOCAL or result.ticket.link is None
            assert not (result.outcome is Outcome.LOCAL and result.ticket.local_s == math.inf)
            self.held[name] = (result.ticket, local)
            if not local:
                budget = self.q.links[result.ticket.link]
                assert budget.used <= budget.size or budget.holders == 1
            for other in self.waiting.values():
                if self._alike(other, result.ticket) and other.pages <= result.ticket.pages:
                    assert self._due(other) >= self._due(result.ticket)

    @staticmethod
    def _alike(a: Ticket, b: Ticket) -> bool:
        """Two local tickets of one tenant, class and worker: only their deadlines order them."""
        same = (a.tenant, a.request_class, a.decode) == (b.tenant, b.request_class, b.decode)
        return same and a.link is None and b.link is None

    def _due(self, t: Ticket) -> float:
        return min(t.deadline_s, t.arrived_s + self.q.limits.ttft_s[t.request_class])

    @rule(
        cls=st.sampled_from(RequestClass),
        tenant=st.sampled_from("tuv"),
        cost=st.sampled_from([1.0, 9000.0, 131072.0]),
        decode=st.sampled_from("de"),
        pages=st.integers(0, 9),
        link=st.sampled_from([None, "l", "m"]),
        size=st.sampled_from([0.0, 3.0, 10.0, 25.0]),
        service=st.floats(0, 3),
        local=st.sampled_from([0.0, 2.0, math.inf]),
    )
    def offer(
        self,
        cls: RequestClass,
        tenant: str,
        cost: float,
        decode: str,
        pages: int,
        link: Hashable | None,
        size: float,
        service: float,
        local: float,
    ) -> None:
        self.count += 1
        t = Ticket(str(self.count), cls, tenant, cost, decode, pages, self.now, link, size, service, local)
        self._take(self.q.offer(t, self.now), self.twin.offer(t, self.now))

    @rule(seconds=st.sampled_from([0.0, 0.5, 5.0, 40.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self._take(self.q.poll(self.now), self.twin.poll(self.now))

    @rule(size=st.sampled_from([0.0, 4.0, 30.0]))
    def change_the_link(self, size: float) -> None:
        for q in (self.q, self.twin):
            q.set_link("l", size, size / 5)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), how=st.sampled_from(["delivered", "release", "cancel"]))
    def end(self, data: st.DataObject, how: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.held)))
        taken, _ = self.held[name]
        if how == "delivered":
            self.held[name] = (taken, True)
        else:
            del self.held[name]
        self._take(getattr(self.q, how)(name, self.now), getattr(self.twin, how)(name, self.now))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.waiting)))
        del self.waiting[name]
        self._take(self.q.cancel(name, self.now), self.twin.cancel(name, self.now))

    @invariant()
    def reservations_are_those_of_the_admitted(self) -> None:
        for worker in "de":
            pages = [t.pages for t, _ in self.held.values() if t.decode == worker]
            assert self.q.decodes[worker].used == sum(pages) <= 8
        for link in "lm":
            sizes = [t.link_bytes for t, local in self.held.values() if t.link == link and not local]
            assert self.q.links[link].used == sum(sizes)
            assert self.q.links[link].holders == len(sizes)

    @invariant()
    def the_queue_is_bounded_and_known(self) -> None:
        assert self.q.waiting == len(self.waiting) <= 12
        assert sum(self.q.waiting_by_class().values()) == self.q.waiting

    def teardown(self) -> None:
        """Nobody starves: with every admitted one released in turn, all who wait are settled."""
        for q in (self.q, self.twin):
            q.set_link("l", 10.0, 1.0)
        self._take(self.q.poll(self.now), self.twin.poll(self.now))
        for _ in range(50):
            if not self.waiting:
                break
            assert self.held, "somebody waits for nobody"
            name = sorted(self.held)[0]
            del self.held[name]
            self._take(self.q.release(name, self.now), self.twin.release(name, self.now))
        assert not self.waiting


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
