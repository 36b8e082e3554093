"""Following other sites: a reader for each, and whether what it holds is offered.

Decides when a site's entries are withheld: at once when its live key (or its stream) is gone, and while its
log does not parse. Nothing is dropped for either; a log that is gone says so itself. Loss of the store
changes nothing here: `age_s` grows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from cache_service import logs
from cache_service.core.errors import PrfaasError, RemoteProtocolError
from cache_service.core.ids import SiteId
from cache_service.core.log import LogEntry, LogPosition
from cache_service.etcd.core.retry import backoff_s
from cache_service.replication.replica import Claims, Indexes, RemoteSite, Withheld

log = logging.getLogger(__name__)

MAX_SITES = 256
_RETRY_MOST_S = 30.0
Call = Callable[[], None]
#: Opens a site's log after a position; calls back whenever it heard from the store or the peer, and when all
#: that the log had was taken.
OpenLog = Callable[[SiteId, LogPosition | None, Call, Call], AsyncGenerator[LogEntry, None]]


class Replicas:
    """Every other site's entries. Use from one event loop; `close` at the end."""

    def __init__(self, own: SiteId, indexes: Indexes, claims: Claims, open_log: OpenLog) -> None:
        self._own = own
        self._indexes = indexes
        self._claims = claims
        self._open_log = open_log
        self._tasks: dict[SiteId, asyncio.Task[None]] = {}
        self._heard_s: dict[SiteId, float] = {}
        self.sites: dict[SiteId, RemoteSite] = {}
        self._caught_up: set[SiteId] = set()
        #: Logs that did not parse.
        self.broken = 0

    def alive(self, site: SiteId, stride: int) -> None:
        """Offer a site's entries; follow it from now on."""
        if site == self._own:
            return
        known = self.sites.get(site)
        if known is None:
            if len(self.sites) >= MAX_SITES:
                logs.event(log, "too_many_sites", logging.ERROR, site=site, most=MAX_SITES)
                return
            known = self.sites[site] = RemoteSite(site, stride, self._indexes, self._claims)
        elif known.stride != stride:
            self._stop(site)
            known.restride(stride)
            self._caught_up.discard(site)
        if site not in self._tasks:
            self._heard_s[site] = self._now()
            self._tasks[site] = asyncio.create_task(self._follow(known), name=f"replica {site}")
        if Withheld.DEAD in known.withheld:
            logs.event(log, "site_alive", site=site, entries=known.entries)
        known.offer(Withheld.DEAD)

    def dead(self, site: SiteId) -> None:
        """Keep a site's entries, offer none."""
        known = self.sites.get(site)
        if known is not None and Withheld.DEAD not in known.withheld:
            logs.event(log, "site_dead", logging.WARNING, site=site, entries=known.entries)
            known.withhold(Withheld.DEAD)

    def age_s(self, site: SiteId) -> float:
        """Return how long ago the store last spoke of this site: what is held may be stale by as much."""
        return self._now() - self._heard_s[site]

    def behind(self, site: SiteId) -> bool:
        """Say whether what a site's log had when it was first opened is still to be taken.

        False for a log that does not parse: there is no telling when it will.
        """
        known = self.sites.get(site)
        return site not in self._caught_up and (known is None or Withheld.BROKEN not in known.withheld)

    def report(self) -> list[dict[str, Any]]:
        """Return how every other site is doing."""
        return [
            {
                "site": name,
                "entries": site.entries,
                "withheld": sorted(why.value for why in site.withheld),
                "age_s": round(self.age_s(name), 3),
                "rebuilds": site.rebuilds,
                "segments": site.segments,
                "refused_changes": site.refused_changes,
            }
            for name, site in self.sites.items()
        ]

    async def close(self) -> None:
        """Stop following."""
        for site in list(self._tasks):
            self._stop(site)

    async def _follow(self, site: RemoteSite) -> None:
        failures = 0
        broke_at: LogPosition | None = None

        def heard() -> None:
            self._heard_s[site.site] = self._now()

        def caught_up() -> None:
            self._caught_up.add(site.site)

        while True:
            try:
                async with aclosing(self._open_log(site.site, site.position, heard, caught_up)) as entries:
                    async for entry in entries:
                        await site.apply(entry)
                        heard()
                        if broke_at is None or not _same_life_before(entry.position, broke_at):
                            failures, broke_at = 0, None
                            site.offer(Withheld.BROKEN)
            except RemoteProtocolError as error:
                # What follows cannot be placed. The writer's next snapshot or epoch heals it.
                self.broken += 1
                site.withhold(Withheld.BROKEN)
                broke_at, site.position = site.position or broke_at, None
                failures += 1
                logs.event(log, "replica_broken", logging.ERROR, site=site.site, error=str(error)[:300])
            except PrfaasError as error:
                failures += 1
                logs.event(log, "replica_waits", logging.WARNING, site=site.site, error=str(error)[:300])
            await asyncio.sleep(backoff_s(failures, first_s=0.1, most_s=_RETRY_MOST_S))

    def _stop(self, site: SiteId) -> None:
        self._tasks.pop(site).cancel()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def _same_life_before(position: LogPosition, broke_at: LogPosition) -> bool:
    """Say whether a position is one that was passed before the log broke: nothing is healed yet."""
    return position.epoch == broke_at.epoch and position <= broke_at
