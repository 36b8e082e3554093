"""The long loop at work: counts prompts, samples how busy the home site is, applies a better threshold.

Decides nothing (router/core/long_loop.py does). The threshold is changed here when `tune.apply` is set; a
change of worker roles is only proposed, in the log and in GET /decisions: the router starts no workers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from cache_service import logs
from router.config import RouterConfig
from router.core.decision import Decision
from router.core.long_loop import LongLoop, LoopLimits, Proposal, Utilisation
from router.core.profile import ModelProfile
from router.core.throughput import Remote, System
from router.core.workers import Role, WorkerState
from router.workers import WorkerTable

_log = logging.getLogger(__name__)
SAMPLE_S = 0.5


class Tuner:
    """Runs the loop every `tune.period_s`; made and used inside a running event loop."""

    def __init__(self, config: RouterConfig, table: WorkerTable, apply: Callable[[int], None]) -> None:
        """`apply` takes the new threshold."""
        self._config = config.tune
        self._table = table
        self._apply = apply
        self._threshold = config.policy.threshold_tokens
        self._loop = LongLoop(
            LoopLimits(
                min_requests=self._config.min_requests,
                min_gain=self._config.min_gain,
                damping=self._config.damping,
                cooldown_s=self._config.cooldown_s,
            )
        )
        self._busy = {Role.PREFILL: 0.0, Role.DECODE: 0.0}
        self._samples = 0
        self._output_tokens = 0
        self._requests = 0
        self._task: asyncio.Task[None] | None = None
        self.proposal: Proposal | None = None

    def start(self) -> None:
        """Begin, if it is switched on."""
        if self._config.enabled:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """End. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def observe(self, decision: Decision, total_tokens: int, output_tokens: int) -> None:
        """Count one dispatched request."""
        uncached = decision.local_uncached_tokens
        self._loop.observe(uncached, max(0, total_tokens - uncached))
        self._requests += 1
        self._output_tokens += output_tokens

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time() + self._config.period_s
        while True:
            await asyncio.sleep(SAMPLE_S)
            self._sample()
            if loop.time() >= due_s:
                due_s = loop.time() + self._config.period_s
                self.evaluate(loop.time())

    def _sample(self) -> None:
        self._samples += 1
        for role in Role:
            workers = self._home(role)
            if workers:
                self._busy[role] += sum(map(_busy, workers)) / len(workers)

    def _home(self, role: Role) -> list[WorkerState]:
        table = self._table
        pools = table.fleet.prefill if role is Role.PREFILL else table.fleet.decode
        return list(pools[table.site].members.values()) if table.site in pools else []

    def system(self) -> System | None:
        """Return the fleet as the throughput model sees it, None while a profile is missing."""
        home = next((w.profile for w in self._home(Role.DECODE) if w.profile is not None), None)
        if home is None or home.decode is None:
            return None
        remotes = []
        for site, pool in sorted(self._table.fleet.prefill.items()):
            link = self._table.links.get((site, self._table.site))
            profile = next((w.profile for w in pool.members.values() if w.profile is not None), None)
            if link is not None and profile is not None:
                rate = link.rate_bytes_per_s if link.usable else 0.0
                healthy = sum(w.healthy for w in pool.members.values())
                remotes.append(Remote(healthy, profile, rate))
        output = self._output_tokens / self._requests if self._requests else 1.0
        return System(
            self._home_profile(home),
            len(self._home(Role.PREFILL)),
            len(self._home(Role.DECODE)),
            max(1.0, output),
            tuple(remotes),
        )

    def _home_profile(self, decode: ModelProfile) -> ModelProfile:
        """Return the home profile: prefill's curve with decode's rate, should they differ."""
        prefill = next((w.profile for w in self._home(Role.PREFILL) if w.profile is not None), decode)
        return ModelProfile(prefill.name, prefill.kv, prefill.curve, decode.decode)

    def evaluate(self, now_s: float) -> Proposal | None:
        """Ask the loop once, log and apply what it says. Some milliseconds of CPU."""
        system = self.system()
        if system is None:
            return None
        samples = max(1, self._samples)
        busy = Utilisation(self._busy[Role.PREFILL] / samples, self._busy[Role.DECODE] / samples)
        self._busy = dict.fromkeys(Role, 0.0)
        self._samples = self._requests = self._output_tokens = 0
        found = self._loop.propose(system, self._threshold, busy, now_s)
        if found is None:
            return None
        self.proposal = found
        if self._config.apply and not found.convert:
            self._threshold = found.threshold_tokens
            self._apply(found.threshold_tokens)
        logs.event(
            _log,
            "tune_proposal",
            threshold_tokens=found.threshold_tokens,
            prefill=found.prefill,
            decode=found.decode,
            gain_ratio=round(found.gain_ratio, 4),
            bottleneck=found.bottleneck,
            convert=found.convert,
            applied=self._config.apply and not found.convert,
        )
        return found


def _busy(worker: WorkerState) -> float:
    """Return how busy a worker is, 0 to 1: prefill that has work; the filled share of decode's batch."""
    if worker.role is Role.PREFILL or worker.profile is None or worker.profile.decode is None:
        return 1.0 if worker.jobs or worker.running else 0.0
    return min(1.0, worker.running / worker.profile.decode.max_batch)
