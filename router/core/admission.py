"""Who may start now: budgets of links and decode workers, and a fair order for those who wait.

A ticket asks for bytes of one link (or none) and pages of one decode worker. It is admitted when both fit,
else it waits, in three levels: classes share by weight, the more urgent first; tenants inside a class take
turns by deficit (surplus round robin: a turn may overdraw, and is paid back before the next one); a tenant's
own tickets go by deadline. Whoever is next but does not fit keeps what it lacks from everybody behind it, so
large requests are not overtaken for ever, and those that need something else go on; in the second half of its
longest wait it keeps all that it needs.

    event                                                   outcome
    fits, and nobody before it lacks the same               ADMIT
    does not fit                                            WAIT (queue has room) or REJECT (it has not)
    waits, and its time to go over the link has run out,    LOCAL if it may: no link, but still the pages
      at the latest when home would have been as fast
    waits past its class's longest wait                     REJECT, with a Retry-After
    asks for more pages than the worker has in all          REJECT at once
    asks for more bytes than the link's whole budget        admitted when it can have the link to itself

Everything is bounded. Deterministic: no clock, no random numbers, ties by arrival. One thread only.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from router.core.decision import Decision, Links, LinkState, RequestClass

#: Share of each class while all wait, most urgent first.
WEIGHTS = {RequestClass.INTERACTIVE: 16, RequestClass.STANDARD: 4, RequestClass.BATCH: 1}
MIN_RETRY_S, MAX_RETRY_S = 1.0, 600.0


class Outcome(StrEnum):
    """What became of a ticket: a closed set, used as a metric label."""

    ADMIT = "admit"
    WAIT = "wait"
    LOCAL = "local"
    REJECT = "reject"


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the queue.

    Attributes:
        waiting: tickets in all; `waiting_per_tenant` of one tenant.
        ttft_s: per class, when the first token is due after arrival.
        max_wait_s: per class, how long a ticket may wait at all.
        quantum: cost (tokens) that a turn adds.
    """

    waiting: int = 1024
    waiting_per_tenant: int = 256
    ttft_s: dict[RequestClass, float] = field(
        default_factory=lambda: dict(zip(RequestClass, (2.0, 10.0, 120.0), strict=True))
    )
    max_wait_s: dict[RequestClass, float] = field(
        default_factory=lambda: dict(zip(RequestClass, (10.0, 60.0, 300.0), strict=True))
    )
    quantum: float = 8192.0


@dataclass(frozen=True, slots=True)
class Ticket:
    """What one request asks for.

    Attributes:
        ticket_id: unique among those that wait or are admitted.
        cost: what its turn costs its tenant: uncached tokens, > 0.
        link, link_bytes: which link, None for a local route, and what it will send.
        decode, pages: which decode worker, and how many of its pages.
        service_s: predicted time from admission to the first token.
        local_s: the same without the link, inf when it cannot be served so.
        arrived_s: when it came.
    """

    ticket_id: str
    request_class: RequestClass
    tenant: str
    cost: float
    decode: Hashable
    pages: int
    arrived_s: float
    link: Hashable | None = None
    link_bytes: float = 0.0
    service_s: float = 0.0
    local_s: float = math.inf
    deadline_s: float = math.inf


def ticket_for(
    decision: Decision,
    ticket_id: str,
    terms: tuple[RequestClass, str, float],
    *,
    pages: int,
    links: Links,
) -> Ticket:
    """Return what `decision` asks for; `terms` are class, tenant and arrival, `links` those with a budget."""
    request_class, tenant, arrived_s = terms
    key = (decision.prefill.site, decision.decode.site)
    return Ticket(
        ticket_id,
        request_class,
        tenant,
        cost=float(max(1, decision.uncached_tokens)),
        decode=decision.decode.worker_id,
        pages=pages,
        arrived_s=arrived_s,
        link=key if key in links else None,
        link_bytes=decision.wire_bytes,
        service_s=decision.predicted.ttft_s,
        local_s=decision.local_s,
    )


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of one ticket; `retry_after_s` only with REJECT, `reason` says what it lacked."""

    ticket: Ticket
    outcome: Outcome
    retry_after_s: float = 0.0
    reason: str = ""


@dataclass(slots=True)
class Budget:
    """One resource: `size` units, `used` of them given, and how fast they come back."""

    size: float = 0.0
    used: float = 0.0
    holders: int = 0
    per_s: float = 0.0
    #: For the rate at which units come back where nobody says it.
    freed: float = 0.0
    since_s: float | None = None

    def fits(self, units: float) -> bool:
        return self.used + units <= self.size or not self.holders


@dataclass(slots=True)
class _Waiting:
    ticket: Ticket
    number: int
    due_s: float
    local: bool = False


@dataclass(slots=True)
class _Tenant:
    deficit: float = 0.0
    queue: list[_Waiting] = field(default_factory=list)


@dataclass(slots=True)
class _Class:
    deficit: float = 0.0
    tenants: dict[str, _Tenant] = field(default_factory=dict)


class AdmissionQueue:
    """Budgets, reservations and the queue. `offer`, then `poll` as time passes."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.links: dict[Hashable, Budget] = {}
        self.decodes: dict[Hashable, Budget] = {}
        self._classes = {name: _Class() for name in RequestClass}
        self._admitted: dict[str, tuple[Ticket, bool]] = {}
        self._waiting: dict[str, _Waiting] = {}
        self._waiting_on: dict[Hashable, int] = {}
        self._arrivals = 0

    # --- budgets --------------------------------------------------------------------------------------

    def set_link(self, link: Hashable, budget_bytes: float, bytes_per_s: float) -> None:
        """Say how many bytes may be under way on a link, and how fast it carries them."""
        budget = self.links.setdefault(link, Budget())
        budget.size, budget.per_s = max(0.0, budget_bytes), max(0.0, bytes_per_s)

    def follow_link(self, link: LinkState, horizon_s: float, queued_s: float) -> None:
        """Set a link's budget: what it carries in `horizon_s`, and while prompts wait for their prefill.

        `queued_s`: how long they do at its source, in the mean; they do not need the link yet.
        """
        rate = link.rate_bytes_per_s if link.usable else 0.0
        self.set_link((link.src, link.dst), rate * (horizon_s + queued_s), rate)

    def set_decode(self, worker: Hashable, pages: int) -> None:
        """Say how many KV pages a decode worker has."""
        self.decodes.setdefault(worker, Budget()).size = max(0, pages)

    @property
    def waiting(self) -> int:
        """Tickets that wait."""
        return len(self._waiting)

    def waiting_by_class(self) -> dict[RequestClass, int]:
        """Return how many tickets of each class wait."""
        return {
            name: sum(len(t.queue) for t in entry.tenants.values()) for name, entry in self._classes.items()
        }

    # --- in and out -----------------------------------------------------------------------------------

    def offer(self, ticket: Ticket, now_s: float) -> list[Result]:
        """Take a ticket in; return its outcome (WAIT among them) and those of others that this settled.

        Raises ValueError when its id is in use, or a figure is not one that can be asked for.
        """
        if ticket.ticket_id in self._waiting or ticket.ticket_id in self._admitted:
            raise ValueError(f"ticket_id: {ticket.ticket_id!r} is in use")
        if not (ticket.cost > 0 and ticket.pages >= 0 and ticket.link_bytes >= 0):
            raise ValueError("cost must be > 0, pages and link_bytes >= 0")
        decode = self.decodes.setdefault(ticket.decode, Budget())
        if ticket.pages > decode.size:
            return [Result(ticket, Outcome.REJECT, MAX_RETRY_S, "too_large")]
        tenant = self._classes[ticket.request_class].tenants.get(ticket.tenant)
        full = len(self._waiting) >= self.limits.waiting
        if full or (tenant is not None and len(tenant.queue) >= self.limits.waiting_per_tenant):
            return [*self.poll(now_s), self._rejected(ticket, ticket.link is None, "queue_full", now_s)]
        self._arrivals += 1
        due_s = min(ticket.deadline_s, ticket.arrived_s + self.limits.ttft_s[ticket.request_class])
        entry = _Waiting(ticket, self._arrivals, due_s, ticket.link is None)
        self._enqueue(entry)
        results = self.poll(now_s)
        if ticket.ticket_id in self._waiting:
            results.append(Result(ticket, Outcome.WAIT))
        return results

    def cancel(self, ticket_id: str, now_s: float) -> list[Result]:
        """Forget a ticket, waiting or admitted: its client has left. Unknown ids are nothing."""
        entry = self._waiting.get(ticket_id)
        if entry is not None:
            self._dequeue(entry)
        self._free(ticket_id, now_s)
        return self.poll(now_s)

    def delivered(self, ticket_id: str, now_s: float) -> list[Result]:
        """Give back an admitted ticket's bytes: its KV is over the link; its pages stay."""
        ticket, local = self._admitted.get(ticket_id, (None, True))
        if ticket is not None and not local:
            self._give_back(self.links[ticket.link], ticket.link_bytes, now_s)
            self._admitted[ticket_id] = (ticket, True)
        return self.poll(now_s)

    def release(self, ticket_id: str, now_s: float) -> list[Result]:
        """Give back all that an admitted ticket holds. Idempotent."""
        self._free(ticket_id, now_s)
        return self.poll(now_s)

    def poll(self, now_s: float) -> list[Result]:
        """Return every ticket that is settled now, in order. O(waiting)."""
        results = [*self._overdue(now_s), *self._let_in(now_s)]
        if self._send_home(now_s):
            results += self._let_in(now_s)
        return results

    def _let_in(self, now_s: float) -> list[Result]:
        """Admit whoever fits, in the order of turns."""
        results: list[Result] = []
        lacking: set[tuple[str, Hashable]] = set()
        passed: dict[tuple[RequestClass, str], int] = {}
        while self._waiting and (entry := self._next(passed)) is not None:
            lacks = self._lacks(entry)
            if not lacks and lacking.isdisjoint(self._needs(entry)):
                self._admit(entry)
                local = entry.local and entry.ticket.link is not None
                results.append(Result(entry.ticket, Outcome.LOCAL if local else Outcome.ADMIT))
                continue
            where = (entry.ticket.request_class, entry.ticket.tenant)
            passed[where] = passed.get(where, 0) + 1
            lacking.update(self._needs(entry) if self._old(entry, now_s) else lacks)
            if all(("decode", worker) in lacking for worker in self._waiting_on):
                break  # everybody needs pages
        return results

    # --- order ----------------------------------------------------------------------------------------

    def _next(self, passed: dict[tuple[RequestClass, str], int]) -> _Waiting | None:
        """Return whose turn it is; `passed` counts those of each tenant that had theirs in this round."""
        spare: _Waiting | None = None
        for name, group in self._classes.items():
            entry = self._next_of(name, group, passed)
            if entry is not None and group.deficit > 0:
                return entry
            spare = spare or entry
        return spare

    def _next_of(
        self, name: RequestClass, group: _Class, passed: dict[tuple[RequestClass, str], int]
    ) -> _Waiting | None:
        spare: _Waiting | None = None
        for tenant, entry in group.tenants.items():
            at = passed.get((name, tenant), 0)
            if at < len(entry.queue):
                if entry.deficit > 0:
                    return entry.queue[at]
                spare = spare or entry.queue[at]
        return spare

    def _old(self, entry: _Waiting, now_s: float) -> bool:
        """Say whether a ticket has waited so long that it keeps all that it needs from those behind it."""
        ticket = entry.ticket
        return now_s - ticket.arrived_s >= 0.5 * self.limits.max_wait_s[ticket.request_class]

    def _charge(self, entry: _Waiting) -> None:
        """Take the cost from the tenant and its class; when no one waiting has any left, all get a turn."""
        ticket, quantum = entry.ticket, self.limits.quantum
        group = self._classes[ticket.request_class]
        tenant = group.tenants[ticket.tenant]
        tenant.deficit -= ticket.cost
        group.deficit -= ticket.cost
        if tenant.deficit <= 0:  # its turn is over: to the end of the ring
            group.tenants[ticket.tenant] = group.tenants.pop(ticket.tenant)
        active = [t for t in group.tenants.values() if t.queue]
        if active and all(t.deficit <= 0 for t in active):
            turns = 1 + math.floor(-max(t.deficit for t in active) / quantum)
            for t in active:
                t.deficit += turns * quantum
        waiting = [
            (WEIGHTS[n], c) for n, c in self._classes.items() if any(t.queue for t in c.tenants.values())
        ]
        if waiting and all(c.deficit <= 0 for _, c in waiting):
            turns = 1 + math.floor(min(-c.deficit / (w * quantum) for w, c in waiting))
            for weight, c in waiting:
                c.deficit += turns * weight * quantum

    # --- resources ------------------------------------------------------------------------------------

    def _needs(self, entry: _Waiting) -> Iterator[tuple[str, Hashable]]:
        yield "decode", entry.ticket.decode
        if not entry.local:
            yield "link", entry.ticket.link

    def _lacks(self, entry: _Waiting) -> list[tuple[str, Hashable]]:
        ticket = entry.ticket
        found: list[tuple[str, Hashable]] = []
        if not self._decode_fits(ticket):
            found.append(("decode", ticket.decode))
        if not entry.local and not self.links.setdefault(ticket.link, Budget()).fits(ticket.link_bytes):
            found.append(("link", ticket.link))
        return found

    def _decode_fits(self, ticket: Ticket) -> bool:
        budget = self.decodes[ticket.decode]
        return budget.used + ticket.pages <= budget.size

    def _admit(self, entry: _Waiting) -> None:
        ticket = entry.ticket
        self._charge(entry)
        self._dequeue(entry)
        self._admitted[ticket.ticket_id] = (ticket, entry.local)
        decode = self.decodes[ticket.decode]
        decode.used += ticket.pages
        decode.holders += 1
        if not entry.local:
            link = self.links[ticket.link]
            link.used += ticket.link_bytes
            link.holders += 1

    def _free(self, ticket_id: str, now_s: float) -> None:
        ticket, local = self._admitted.pop(ticket_id, (None, True))
        if ticket is None:
            return
        self._give_back(self.decodes[ticket.decode], ticket.pages, now_s)
        if not local:
            self._give_back(self.links[ticket.link], ticket.link_bytes, now_s)

    @staticmethod
    def _give_back(budget: Budget, units: float, now_s: float) -> None:
        budget.holders -= 1
        budget.used = budget.used - units if budget.holders else 0.0
        # Halved at times, so that the rate of coming back is that of late.
        if budget.since_s is None:
            budget.since_s = now_s
        elif now_s - budget.since_s > 60.0:
            budget.freed /= 2
            budget.since_s = now_s - (now_s - budget.since_s) / 2
        budget.freed += units

    # --- the queue ------------------------------------------------------------------------------------

    def _enqueue(self, entry: _Waiting) -> None:
        ticket = entry.ticket
        self._waiting[ticket.ticket_id] = entry
        self._waiting_on[ticket.decode] = self._waiting_on.get(ticket.decode, 0) + 1
        tenants = self._classes[ticket.request_class].tenants
        tenant = tenants.setdefault(ticket.tenant, _Tenant())
        at = len(tenant.queue)
        while at and (tenant.queue[at - 1].due_s, tenant.queue[at - 1].number) > (entry.due_s, entry.number):
            at -= 1
        tenant.queue.insert(at, entry)

    def _dequeue(self, entry: _Waiting) -> None:
        ticket = entry.ticket
        del self._waiting[ticket.ticket_id]
        self._waiting_on[ticket.decode] -= 1
        if not self._waiting_on[ticket.decode]:
            del self._waiting_on[ticket.decode]
        group = self._classes[ticket.request_class]
        tenant = group.tenants[ticket.tenant]
        tenant.queue.remove(entry)
        # Who has nothing waiting keeps no credit, but does keep what it overdrew while others wait.
        if not tenant.queue:
            others = any(t.queue for t in group.tenants.values())
            tenant.deficit = min(tenant.deficit, 0.0) if others else 0.0
            if tenant.deficit >= 0:
                del group.tenants[ticket.tenant]
            if not others:
                group.tenants.clear()
                group.deficit = min(group.deficit, 0.0) if self._waiting else 0.0

    def _overdue(self, now_s: float) -> list[Result]:
        """Reject those that have waited as long as their class may."""
        results: list[Result] = []
        for entry in list(self._waiting.values()):
            ticket = entry.ticket
            if now_s - ticket.arrived_s >= self.limits.max_wait_s[ticket.request_class]:
                self._dequeue(entry)
                results.append(self._rejected(ticket, entry.local, "waited_too_long", now_s))
        return results

    def _send_home(self, now_s: float) -> bool:
        """Give up the link for those that will be late over it and no sooner than at home; say if any."""
        found = False
        for entry in self._waiting.values():
            ticket = entry.ticket
            over_s = now_s + ticket.service_s
            if not entry.local and over_s >= entry.due_s and over_s >= ticket.arrived_s + ticket.local_s:
                entry.local = found = True
        return found

    def _rejected(self, ticket: Ticket, local: bool, reason: str, now_s: float) -> Result:
        """Return a rejection that says when what the ticket lacks is likely to be there."""
        waits = [self._decode_wait_s(ticket, now_s)]
        if not local:
            link = self.links.setdefault(ticket.link, Budget())
            ahead = sum(w.ticket.link_bytes for w in self._waiting.values() if w.ticket.link == ticket.link)
            over = link.used + ahead + ticket.link_bytes - link.size
            waits.append(over / link.per_s if link.per_s else MAX_RETRY_S)
        return Result(ticket, Outcome.REJECT, min(MAX_RETRY_S, max(MIN_RETRY_S, *waits)), reason)

    def _decode_wait_s(self, ticket: Ticket, now_s: float) -> float:
        budget = self.decodes[ticket.decode]
        ahead = sum(w.ticket.pages for w in self._waiting.values() if w.ticket.decode == ticket.decode)
        over = budget.used + ahead + ticket.pages - budget.size
        if over <= 0:
            return 0.0
        if budget.since_s is None or now_s <= budget.since_s or not budget.freed:
            return MIN_RETRY_S
        return over * (now_s - budget.since_s) / budget.freed
