"""What the workers tell of themselves, as far as it shapes their streams: asked once, kept for a while.

A worker that does not answer is unknown, never an error: its requests wait for decode's first token.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

import aiohttp
import msgspec

from cache_service import logs
from router.config import WorkerConfig
from router.core.hold import Traits

_log = logging.getLogger(__name__)
#: After this long a worker is asked again: it may have been started anew with other flags.
KEEP_S = 30.0
#: The worker's scheduler answers between two batches.
TIMEOUT_S = 10.0
MAX_BYTES = 4 << 20
_DECODER = msgspec.json.Decoder(Traits)


class TraitTable:
    """Traits by worker. One event loop only: no locks."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._known: dict[str, tuple[float, Traits]] = {}
        self._asking: dict[str, asyncio.Task[Traits | None]] = {}

    async def get(self, worker: WorkerConfig, headers: Mapping[str, str]) -> Traits | None:
        """Return a worker's traits, None when it does not tell; asks with the client's `headers`."""
        known = self._known.get(worker.worker_id)
        loop = asyncio.get_running_loop()
        if known is not None and loop.time() - known[0] < KEEP_S:
            return known[1]
        task = self._asking.get(worker.worker_id)
        if task is None:
            task = self._asking[worker.worker_id] = loop.create_task(self._ask(worker, headers))
            task.add_done_callback(lambda _: self._asking.pop(worker.worker_id))
        return await asyncio.shield(task)

    def forget(self, worker_id: str) -> None:
        """A worker failed: what it will be when it is back is not known."""
        self._known.pop(worker_id, None)

    async def close(self) -> None:
        """Stop asking."""
        tasks = list(self._asking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, worker: WorkerConfig, headers: Mapping[str, str]) -> Traits | None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                url = worker.url.rstrip("/") + "/server_info"
                async with self._session.get(url, headers=headers, allow_redirects=False) as response:
                    response.raise_for_status()
                    body = b""
                    async for chunk in response.content.iter_any():
                        body += chunk
                        if len(body) > MAX_BYTES:
                            raise ValueError(f"more than {MAX_BYTES} bytes")
            traits = _DECODER.decode(body)
            if traits.page_size < 1:
                raise ValueError(f"page_size {traits.page_size}")
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, msgspec.MsgspecError) as error:
            logs.event(
                _log, "traits_unknown", logging.INFO, worker_id=worker.worker_id, error=f"{error!r:.200}"
            )
            return None
        self._known[worker.worker_id] = (asyncio.get_running_loop().time(), traits)
        return traits
