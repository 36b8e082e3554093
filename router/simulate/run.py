"""The simulated fleet under the router's own lines: choose, LinkEstimator, AdmissionQueue, Fleet.

One Simulation is one run. It stands for one router that sees every site's queue as it is and every cache
`index_delay_s` late; engines, links and clients are simulated, decisions are not.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import msgspec

from cache_service.core.errors import Unavailable
from cache_service.core.ids import SiteId, WorkerId
from router.core.admission import AdmissionQueue, Outcome, Result, ticket_for
from router.core.decision import Decision, Policy, PolicyName, Request, RequestClass
from router.core.policy import choose
from router.core.profile import ModelProfile
from router.core.workers import Fleet, Role, WorkerState
from router.simulate.cache import PrefixCache, SimMatch, SiteIndex
from router.simulate.clock import Clock, Timer
from router.simulate.engine import DecodeEngine, MixedEngine, PassTime, PrefillEngine
from router.simulate.job import Job
from router.simulate.link import Link
from router.simulate.machine import Machine, Work
from router.simulate.report import Records
from router.simulate.spec import RoleChange, Scenario, policy_of, profile_of
from router.simulate.workload import Workload, make

#: Weight of a transfer on a shared link, by class.
LINK_WEIGHT = {RequestClass.INTERACTIVE: 4.0, RequestClass.STANDARD: 2.0, RequestClass.BATCH: 1.0}
#: Polynomials of Dynamo's simulated engine (lib/mocker), in seconds.
DYNAMO_TIMES = PassTime(16.50142e-3, 1.518344e-5, 4.209989e-10, 5.74e-3, 54.01e-3, -25.74e-3)
POLL_S = 0.25
MAX_ATTEMPTS = 2
_NO_BUDGET = 1 << 62


class Simulation:
    """Builds the fleet of a scenario, runs its workload to the end, keeps the records."""

    def __init__(self, scenario: Scenario, workload: Workload | None = None) -> None:
        self.scenario = scenario
        self.policy: Policy = policy_of(scenario.policy)
        self.clock = Clock()
        self._machine = Machine(self.clock, scenario.shared_cores) if scenario.shared_cores else None
        self._beside = self._cores(Work.REQUEST)
        self.fleet = Fleet()
        self.records = Records([site.name for site in scenario.sites], scenario.engine.block_tokens)
        self.indexes: dict[SiteId, SiteIndex] = {}
        self.places: dict[WorkerId, tuple[SiteIndex, int]] = {}
        self.prefills: dict[WorkerId, PrefillEngine | MixedEngine] = {}
        self.decodes: dict[WorkerId, DecodeEngine] = {}
        self.profiles: dict[SiteId, ModelProfile] = {}
        self.retired: list[tuple[SiteId, PrefillEngine | MixedEngine | DecodeEngine]] = []
        self._mixed = scenario.engine.kind == "mixed"
        self._local = replace(self.policy, name=PolicyName.LOCAL)
        self._named = 0
        for i, site in enumerate(scenario.sites):
            name = SiteId(site.name)
            self.profiles[name] = profile_of(site.profile, f"sites[{i}].profile")
            self.indexes[name] = SiteIndex(scenario.index_delay_s, scenario.engine.hybrid)
            for _ in range(site.prefill):
                self._add_prefill(name)
            for _ in range(site.decode):
                self._add_decode(name)
            if (
                self._mixed and site.prefill
            ):  # the contract wants a place to decode; the prefill worker does it
                self.fleet.add(WorkerState(WorkerId(f"{name}/same"), name, Role.DECODE))
        self.links: dict[tuple[SiteId, SiteId], Link] = {}
        for link in scenario.links:
            self._add_link(link.src, link.dst, link)
            if link.both:
                self._add_link(link.dst, link.src, link)
        self.states = {key: link.state for key, link in self.links.items()}
        self.queue = AdmissionQueue() if scenario.admission else None
        self._waiting: dict[str, tuple[Job, Decision]] = {}
        self._sessions: dict[str, WorkerId] = {}
        self._polling = False
        homes = [SiteId(h) for h in scenario.workload.homes] or [
            s for s in self.profiles if s in self.fleet.decode
        ]
        self.workload = workload or make(
            scenario.workload, homes, scenario.engine.block_tokens, scenario.seed
        )
        self._arrivals = self.workload.arrivals()

    # --- the fleet -------------------------------------------------------------------------------------

    def _cores(self, work: Work) -> Timer:
        """Return the clock of one more worker: its own, or its share of the common machine's."""
        return self.clock if self._machine is None else self._machine.worker(work)

    def _name(self, site: SiteId, role: str) -> WorkerId:
        self._named += 1
        return WorkerId(f"{site}/{role}-{self._named:04}")

    def _add_link(self, src: str, dst: str, spec: Any) -> None:
        key = (SiteId(src), SiteId(dst))
        rng = random.Random(f"link-{src}-{dst}-{self.scenario.seed}")
        self.links[key] = Link(self.clock, msgspec.structs.replace(spec, src=src, dst=dst), rng)

    def _add_prefill(self, site: SiteId) -> None:
        engine, name = self.scenario.engine, self._name(site, "prefill")
        profile, index = self.profiles[site], self.indexes[site]
        bit = index.add_worker(name)
        self.places[name] = (index, bit)
        cache = PrefixCache(engine.cache_blocks, index, bit, engine.state_slots if engine.hybrid else 0)
        if self._mixed:
            self.prefills[name] = MixedEngine(
                self.clock, cache, DYNAMO_TIMES, engine.block_tokens, engine.chunk_tokens, engine.max_batch,
                self._mixed_prefilled, self._answered,
            )  # fmt: skip
        else:
            self.prefills[name] = PrefillEngine(
                self._cores(Work.PREFILL), cache, profile, engine.block_tokens, engine.chunk_tokens,
                self._first_chunk, self._prefilled,
            )  # fmt: skip
        self.fleet.add(WorkerState(name, site, Role.PREFILL, profile, engine.chunk_tokens))

    def _add_decode(self, site: SiteId) -> None:
        name, rate = self._name(site, "decode"), self.profiles[site].decode
        assert rate is not None
        self.decodes[name] = DecodeEngine(
            self._cores(Work.DECODE), int(rate.max_batch), rate.step_s, self._decoding, self._answered
        )
        self.fleet.add(WorkerState(name, site, Role.DECODE, self.profiles[site]))

    # --- the run ---------------------------------------------------------------------------------------

    def run(self) -> Records:
        """Run to the end; return what happened."""
        for link in self.links.values():
            if self.queue is not None:
                self._budget(link)
        for name in self.decodes:
            self._pages(name)
        if self._mixed and self.queue is not None:
            for worker in self.fleet.workers.values():
                if worker.role is Role.DECODE:
                    self._pages(worker.worker_id)
        for change in self.scenario.role_changes:
            self.clock.at(change.at_s, self._change_roles, change)
        self._next_arrival(None)
        self.clock.run()
        self.records.close(self)
        return self.records

    def _pages(self, name: WorkerId) -> None:
        if self.queue is not None:
            self.queue.set_decode(name, _NO_BUDGET)

    def _budget(self, link: Link) -> None:
        assert self.queue is not None
        queued_s = self.fleet.mean_queued_s(link.state.src)
        self.queue.follow_link(link.state, self.scenario.link_horizon_s, queued_s)

    def _next_arrival(self, job: Job | None) -> None:
        following = next(self._arrivals, None)
        if following is not None:
            self.clock.at(following.arrived_s, self._next_arrival, following)
        if job is not None:
            self._arrive(job)

    def _arrive(self, job: Job) -> None:
        engine = self.scenario.engine
        need = -(-(job.total_tokens + job.output_tokens) // engine.block_tokens)
        if need > engine.cache_blocks:
            self._over(job, "rejected")
            return
        self._route(job, self.policy)

    def _request(self, job: Job) -> Request:
        return Request(
            str(job.number), job.total_tokens, job.home, job.output_tokens, job.request_class, job.tenant,
            session=job.session, previous=self._sessions.get(job.session), excluded=job.excluded,
        )  # fmt: skip

    def _decide(self, job: Job, policy: Policy) -> Decision:
        now_s = self.clock.now_s
        for index in self.indexes.values():
            index.catch_up(now_s)
        match: Any = SimMatch(self.indexes, self.places, job.blocks, self.scenario.engine.block_tokens)
        return choose(self._request(job), match, self.fleet, self.states, policy, now_s)

    def _route(self, job: Job, policy: Policy) -> None:
        try:
            decision = self._decide(job, policy)
        except Unavailable:
            self._over(job, "failed")
            return
        if self.queue is None:
            self._dispatch(job, decision)
            return
        name = f"{job.number}/{job.attempt}"
        terms = (job.request_class, job.tenant, job.arrived_s)
        ticket = ticket_for(decision, name, terms, pages=0, links=self.states)
        if ticket.link is not None:
            self._budget(self.links[decision.prefill.site, decision.decode.site])
        self._waiting[name] = (job, decision)
        self._settle(self.queue.offer(ticket, self.clock.now_s))
        if self.queue.waiting and not self._polling:
            self._polling = True
            self.clock.at(self.clock.now_s + POLL_S, self._poll)

    def _poll(self, _: object) -> None:
        assert self.queue is not None
        for link in self.links.values():
            self._budget(link)
        self._settle(self.queue.poll(self.clock.now_s))
        self._polling = self.queue.waiting > 0
        if self._polling:
            self.clock.at(self.clock.now_s + POLL_S, self._poll)

    def _settle(self, results: list[Result]) -> None:
        for result in results:
            if result.outcome is Outcome.WAIT:
                continue
            job, decision = self._waiting.pop(result.ticket.ticket_id)
            if result.outcome is Outcome.REJECT:
                self._over(job, "rejected")
                continue
            if result.outcome is Outcome.LOCAL:
                try:
                    decision = replace(self._decide(job, self._local), decode=decision.decode)
                except Unavailable:
                    self._over(job, "failed")
                    continue
            self._dispatch(job, decision)

    def _dispatch(self, job: Job, decision: Decision) -> None:
        job.decided = decision
        if job.session:
            self._sessions[job.session] = decision.prefill.worker_id
        now_s, fleet = self.clock.now_s, self.fleet
        fleet.give_prefill(decision.prefill, decision.uncached_tokens, decision.predicted.prefill_s, now_s)
        tokens = job.total_tokens + job.output_tokens
        fleet.give_decode(decision.decode, tokens)
        if not self._mixed:
            job.decode_engine = self.decodes[decision.decode.worker_id]
        pull = decision.pull
        sent = decision.wire_bytes - (pull.wire_bytes if pull is not None else 0.0)
        job.wire_bytes = sent
        if sent:
            self.states[decision.prefill.site, job.home].committed_bytes += sent
        if pull is not None and pull.wire_bytes:
            self.records.pulled_bytes += pull.wire_bytes
            link = self.links[pull.src, pull.dst]
            link.send(pull.wire_bytes, LINK_WEIGHT[job.request_class], self._pulled, job)
        elif pull is not None:
            self._pulled(job)
        else:
            self.prefills[decision.prefill.worker_id].submit(job)

    def _pulled(self, job: Any) -> None:
        """The prefix has been fetched: it is in the worker's cache as if computed there."""
        decision = job.decided
        engine = self.prefills[decision.prefill.worker_id]
        depth = decision.pull.tokens // self.scenario.engine.block_tokens
        cache, blocks, now_s = engine.cache, job.blocks[:depth], self.clock.now_s
        held = cache.depth(blocks)
        cache.lock(blocks, held)
        if cache.room(depth - held, now_s):
            cache.store(blocks, held, [depth], now_s)
            cache.release(blocks, depth)
        else:
            cache.release(blocks, held)
        engine.submit(job)

    # --- from the prompt to the first token ------------------------------------------------------------

    def _link_of(self, job: Job) -> Link | None:
        assert job.decided is not None
        return self.links.get((job.decided.prefill.site, job.home)) if job.wire_bytes else None

    def _first_chunk(self, job: Job) -> None:
        """Send what is computed while the rest is: all but the last chunk may cross before the prompt's end.

        Chunks are let out a little early (all that come before the last one at once); the last one never is.
        """
        link = self._link_of(job)
        if link is None:
            return
        chunk = self.scenario.engine.chunk_tokens
        early = job.wire_bytes * max(0.0, 1.0 - chunk / job.total_tokens)
        if early > 0:
            job.flow = [link, None, job.wire_bytes - early]
            job.flow[1] = link.send(early, LINK_WEIGHT[job.request_class], self._early_over, job)

    @staticmethod
    def _early_over(job: Any) -> None:
        job.flow[1] = None

    def _prefilled(self, job: Job) -> None:
        decision = job.decided
        assert decision is not None
        self.fleet.end_prefill(
            decision.prefill, decision.uncached_tokens, decision.predicted.prefill_s, self.clock.now_s
        )
        link = self._link_of(job)
        if link is None:
            self._answer_home(job)
            return
        rest = job.wire_bytes if job.flow is None else job.flow[2]
        under_way = None if job.flow is None else job.flow[1]
        if under_way is not None and under_way.alive:  # what is left of both goes on as one
            rest += link.left(under_way)
            link.cancel(under_way)
        job.flow = link.send(rest, LINK_WEIGHT[job.request_class], self._delivered, job)
        if link.spec.outages:
            self.clock.at(
                self.clock.now_s + self.scenario.transfer_timeout_s, self._timed_out, (job, job.flow)
            )

    def _delivered(self, job: Any) -> None:
        link = self._link_of(job)
        assert link is not None
        link.state.committed_bytes = max(0.0, link.state.committed_bytes - job.wire_bytes)
        if self.queue is not None:
            self._settle(self.queue.delivered(f"{job.number}/{job.attempt}", self.clock.now_s))
        delay_s = link.delay_s()
        if delay_s:
            self.clock.at(self.clock.now_s + delay_s, self._answer_home, job)
        else:
            self._answer_home(job)

    def _answer_home(self, job: Any) -> None:
        """What a request takes beside all that is simulated, in one piece."""
        if self.scenario.request_s:
            self._beside.at(self.clock.now_s + self.scenario.request_s, self._at_home, job)
        else:
            self._at_home(job)

    def _timed_out(self, what: Any) -> None:
        job, flow = what
        if not flow.alive or job.flow is not flow:
            return
        link, decision = self._link_of(job), job.decided
        assert link is not None
        link.cancel(flow)
        link.state.committed_bytes = max(0.0, link.state.committed_bytes - job.wire_bytes)
        self._let_go(job)
        self._release_ticket(job)
        job.excluded |= {decision.prefill.worker_id}
        job.again()
        if job.attempt >= MAX_ATTEMPTS:
            self._over(job, "failed")
        else:
            self.records.retries += 1
            self._route(job, self._local)

    def _let_go(self, job: Job) -> None:
        """Release the prefill worker's blocks and the decode worker's reservation."""
        assert job.decided is not None
        engine = self.prefills[job.decided.prefill.worker_id]
        if isinstance(engine, PrefillEngine):
            engine.release(job)
        self.fleet.end_decode(job.decided.decode, job.total_tokens + job.output_tokens)

    def _at_home(self, job: Any) -> None:
        job.transferred_s = self.clock.now_s
        engine: Any = self.prefills[job.decided.prefill.worker_id]
        engine.release(job)
        job.decode_engine.submit(job)

    def _decoding(self, job: Job) -> None:
        job.decoding_s = job.first_s = self.clock.now_s

    def _mixed_prefilled(self, job: Job) -> None:
        decision = job.decided
        assert decision is not None
        now_s = self.clock.now_s
        self.fleet.end_prefill(
            decision.prefill, decision.uncached_tokens, decision.predicted.prefill_s, now_s
        )
        job.transferred_s = job.decoding_s = job.first_s = now_s

    # --- the end ---------------------------------------------------------------------------------------

    def _answered(self, job: Job) -> None:
        assert job.decided is not None
        job.done_s = self.clock.now_s
        self.fleet.end_decode(job.decided.decode, job.total_tokens + job.output_tokens)
        self._release_ticket(job)
        self._over(job, "answered")

    def _release_ticket(self, job: Job) -> None:
        if self.queue is not None:
            self._settle(self.queue.release(f"{job.number}/{job.attempt}", self.clock.now_s))

    def _over(self, job: Job, outcome: str) -> None:
        self.records.add(job, outcome)
        for following in self.workload.after(job, self.clock.now_s):
            self.clock.at(following.arrived_s, self._later, following)

    def _later(self, job: Any) -> None:
        self._arrive(job)

    # --- roles -----------------------------------------------------------------------------------------

    def _change_roles(self, change: RoleChange) -> None:
        site = SiteId(change.site)
        pool = (self.fleet.decode if change.to == "prefill" else self.fleet.prefill).get(site)
        members = [w for w in pool.members.values() if w.healthy] if pool is not None else []
        for worker in sorted(members, key=WorkerState.load)[: min(change.count, len(members) - 1)]:
            self.fleet.set_healthy(worker, False)
            self._drain((worker, change))

    def _drain(self, what: tuple[WorkerState, RoleChange]) -> None:
        worker, change = what
        prefill = self.prefills.get(worker.worker_id)
        if isinstance(prefill, PrefillEngine):
            busy = worker.jobs or any(prefill.cache.refs.values())
        else:
            busy = worker.running
        if busy:
            self.clock.at(self.clock.now_s + 1.0, self._drain, what)
            return
        self.fleet.remove(worker.worker_id)
        if isinstance(prefill, PrefillEngine):
            prefill.cache.clear(self.clock.now_s)
            self.retired.append((worker.site, self.prefills.pop(worker.worker_id)))
        else:
            self.retired.append((worker.site, self.decodes.pop(worker.worker_id)))
        self.clock.at(self.clock.now_s + change.cost_s, self._join, (worker.site, change.to))

    def _join(self, what: tuple[SiteId, str]) -> None:
        site, role = what
        if role == "prefill":
            self._add_prefill(site)
        else:
            before = set(self.decodes)
            self._add_decode(site)
            for name in set(self.decodes) - before:
                self._pages(name)


def simulate(scenario: Scenario, workload: Workload | None = None) -> Records:
    """Run a scenario; the same scenario gives the same records."""
    return Simulation(scenario, workload).run()
