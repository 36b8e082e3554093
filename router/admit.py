"""The admission queue at work: requests wait here for their turn, and time passes for queue and links.

Decides nothing (router/core/admission.py does). One event loop only; made and used inside it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from cache_service.core.errors import Rejected
from router.config import ClassSeconds, RouterConfig
from router.core.admission import AdmissionQueue, Limits, Outcome, Result, Ticket, ticket_for
from router.core.decision import Decision, RequestClass
from router.core.workers import Role
from router.links import LinkTable
from router.metrics import RouterMetrics
from router.workers import WorkerTable

PERIOD_S = 0.25
#: The links are looked at as often as they are asked.
LINKS_EVERY = 4
#: A decode worker whose memory is not known has as many pages as anybody could ask for.
_NO_BUDGET = 1 << 62


def _seconds(value: ClassSeconds) -> dict[RequestClass, float]:
    return {name: getattr(value, name) for name in RequestClass}


class Gate:
    """Lets requests through in the queue's order."""

    def __init__(
        self, config: RouterConfig, table: WorkerTable, told: LinkTable, metrics: RouterMetrics
    ) -> None:
        self._config = config.admission
        self._table = table
        self._told = told
        self._metrics = metrics
        self.queue = AdmissionQueue(
            Limits(
                config.admission.waiting,
                config.admission.waiting_per_tenant,
                _seconds(config.admission.ttft_s),
                _seconds(config.admission.max_wait_s),
            )
        )
        for worker in table.fleet.workers.values():
            if worker.role is Role.DECODE:
                self.queue.set_decode(worker.worker_id, worker.total_pages or _NO_BUDGET)
        self._futures: dict[str, asyncio.Future[Result]] = {}
        self._task: asyncio.Task[None] | None = None
        self._set_links()

    def start(self) -> None:
        """Let time pass."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """End. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        beat = 0
        while True:
            if beat % LINKS_EVERY == 0:
                self._table.observe(self._told.links(loop.time()), loop.time())
                self._set_links()
            beat += 1
            self._settle(self.queue.poll(loop.time()))
            await asyncio.sleep(PERIOD_S)

    def _set_links(self) -> None:
        for link in self._table.links.values():
            self.queue.follow_link(
                link, self._config.link_horizon_s, self._table.fleet.mean_queued_s(link.src)
            )

    def _settle(self, results: Sequence[Result]) -> None:
        for result in results:
            future = self._futures.get(result.ticket.ticket_id)
            if future is not None and not future.done() and result.outcome is not Outcome.WAIT:
                future.set_result(result)

    def ticket(
        self, ticket_id: str, decision: Decision, tokens: int, terms: tuple[RequestClass, str, float]
    ) -> Ticket:
        """Return what `decision` asks for; `terms` are class, tenant and arrival on the loop's clock."""
        pages = -(-tokens // decision.decode.page_tokens)
        return ticket_for(decision, ticket_id, terms, pages=pages, links=self._table.links)

    @contextlib.asynccontextmanager
    async def enter(self, ticket: Ticket) -> AsyncIterator[Outcome]:
        """Wait for the ticket's turn and hold what it asked for until the block is left.

        Gives ADMIT or LOCAL (it must then not use the link). Raises Rejected with the time to wait.
        """
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        future: asyncio.Future[Result] = loop.create_future()
        self._futures[ticket.ticket_id] = future
        try:
            self._settle(self.queue.offer(ticket, began_s))
            result = await future
            self._metrics.admission.labels(result.outcome, ticket.request_class).inc()
            self._metrics.admission_wait.labels(ticket.request_class).observe(loop.time() - began_s)
            if result.outcome is Outcome.REJECT:
                raise Rejected(
                    f"the request cannot be served now ({result.reason}); "
                    f"try again in {result.retry_after_s:.0f} s",
                    retry_after_s=result.retry_after_s,
                    why=result.reason,
                )
            yield result.outcome
        finally:
            del self._futures[ticket.ticket_id]
            self._settle(self.queue.cancel(ticket.ticket_id, loop.time()))

    def delivered(self, ticket: Ticket) -> None:
        """Its KV is over the link."""
        self._settle(self.queue.delivered(ticket.ticket_id, asyncio.get_running_loop().time()))
