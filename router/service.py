"""The router as a whole: everything put together, started and stopped in order.

Decides nothing. Stopping refuses new connections first, lets the requests in flight end (at most `drain_s`,
then they are cancelled and aborted on their workers), and closes what they needed last.
"""

from __future__ import annotations

import asyncio

from aiohttp import web
from prometheus_client import CollectorRegistry

from cache_service.core.addresses import split_address
from router.admit import Gate
from router.app import DRAINING, build
from router.config import RouterConfig
from router.index import PrefixIndex
from router.links import LinkCollector, LinkPoller, LinkTable
from router.metrics import RouterMetrics
from router.serve import Server
from router.tokenize import PromptTokenizer, TokenizerPool
from router.upstream import Upstream
from router.workers import WorkerTable


class Service:
    """One router on one address; made and used inside a running loop."""

    def __init__(
        self,
        config: RouterConfig,
        tokenizer: PromptTokenizer,
        index: PrefixIndex | None,
    ) -> None:
        """Take ownership of `index`."""
        loop = asyncio.get_running_loop()
        self._config = config
        self._index = index
        self._table = WorkerTable(config)
        self.metrics = RouterMetrics(CollectorRegistry())
        self.metrics.watch_workers(
            self._table.in_flight,
            lambda: {w: self._table.breakers.usable(w, loop.time()) for w in self._table.in_flight()},
        )
        self._links = LinkTable()
        self._poller = LinkPoller(self._links, config.workers, self._table.set_kv)
        self.metrics.registry.register(LinkCollector(self._links))
        self._gate = Gate(config, self._table, self._links, self.metrics)
        self.metrics.watch_queue(self._gate.queue.waiting_by_class, lambda: list(self._table.links.values()))
        self._upstream = Upstream(config.timeouts, config.limits, self.metrics)
        self._tokenizer = TokenizerPool(tokenizer, config.model.page_size, config.limits.tokenizer_threads)
        self._server = Server(
            config,
            tokenizer=self._tokenizer,
            index=index,
            table=self._table,
            upstream=self._upstream,
            metrics=self.metrics,
            links=self._links,
            gate=self._gate,
        )
        self._app = build(self._server)
        self._runner = web.AppRunner(
            self._app,
            access_log=None,
            handler_cancellation=True,  # a client that leaves ends its handler, which aborts the workers
            shutdown_timeout=config.timeouts.drain_s,
        )

    async def start(self) -> str:
        """Listen; return the address ("host:port", the port as bound). Raises OSError when it is taken."""
        await self._runner.setup()
        self._poller.start()
        self._gate.start()
        self._server.tuner.start()
        host, port = split_address(self._config.listen, field="listen")
        await web.TCPSite(self._runner, host, port).start()
        address = self._runner.addresses[0]
        return f"{address[0]}:{address[1]}"

    def in_flight(self) -> int:
        """Return the requests in flight, counted on decode and prefill workers alike."""
        return sum(self._table.in_flight().values())

    async def stop(self) -> None:
        """Drain and close. Idempotent."""
        self._app[DRAINING].set()
        await self._poller.stop()
        await self._runner.cleanup()
        await self._gate.stop()
        await self._server.tuner.stop()
        await self._upstream.close()
        self._tokenizer.close()
        if self._index is not None:
            await self._index.close()
