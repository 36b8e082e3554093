"""Cache services of several sites in this process, over real etcd, with a load and the truth about it."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from cache_service import config
from cache_service.core.events import (
    AllCleared,
    BlocksRemoved,
    BlocksStored,
    Event,
    Group,
    GroupRemoved,
    GroupStored,
)
from cache_service.core.ids import BlockHash, SourceId, WorkerId
from cache_service.core.index import PrefixIndex
from cache_service.core.index_types import Needs
from cache_service.server import CacheServer

DEADLINE_S = 60.0
#: Everything is published, block by block: what is replicated can be compared with the truth exactly.
EVERYTHING = {"stride": 1, "min_tokens": 1, "min_seen": 1, "bytes_per_s": 0}


async def until(condition: Callable[[], Any], what: str, *, timeout_s: float = DEADLINE_S) -> float:
    """Wait for `condition`; return the seconds it took."""
    started_s = time.monotonic()
    while not condition():
        assert time.monotonic() - started_s < timeout_s, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.02)
    return time.monotonic() - started_s


def holdings(index: PrefixIndex, sources: Sequence[SourceId]) -> set[tuple[SourceId, BlockHash]]:
    """What an index says that some sources hold."""
    wanted = set(sources)
    return {
        (source, block)
        for source, event in index.dump()
        if source in wanted and isinstance(event, BlocksStored)
        for block in event.hashes
    }


#: Of a site's first worker's model: a state, and the window of two blocks before it.
WINDOW_BLOCKS = 2


class Site:
    """One site's service, fed by hand in place of its two workers' streams, and the truth about them.

    The first worker's model is a hybrid, the second's is not.
    """

    def __init__(
        self,
        site: str,
        endpoints: Sequence[str],
        seed: int = 0,
        listen: str = "127.0.0.1:0",
        **replication: Any,
    ) -> None:
        self.name = name = site
        self._rng = random.Random(f"{name}{seed}")
        self._next = 1 + (ord(name) << 32)
        self._chains: list[list[BlockHash]] = []
        self.sources = [SourceId(WorkerId(f"{name}-{i}"), 0) for i in range(2)]
        self.truth: set[tuple[SourceId, BlockHash]] = set()
        self._groups: dict[Group, set[BlockHash]] = {group: set() for group in Group}
        self.changes = 0
        replication.setdefault("etcd", {"endpoints": list(endpoints)} if endpoints else None)
        text = {
            "site": name,
            "listen": listen,
            "namespace": {"model": "tiny", "page_size": 1},
            "workers": [
                {"worker_id": s.worker_id, "site": name, "events": "tcp://127.0.0.1:1"} for s in self.sources
            ],
            "log_flush_s": 0.05,
            "replication": {
                "live_lease_s": 3,
                "maintenance_s": 1.0,
                "publish": EVERYTHING,
                **replication,
            },
        }
        self._config = config.parse(json.dumps(text))
        self.server = CacheServer(self._config)

    async def __aenter__(self) -> Site:
        await self.server.start()
        self.server.state.declare(self.sources[0], Needs(True, WINDOW_BLOCKS))
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.server.stop()

    @property
    def index(self) -> PrefixIndex:
        return self.server.state.index

    def about(self, other: Site) -> dict[str, Any]:
        """How this service sees another site: Replicas.report()."""
        assert self.server.replication is not None
        for found in self.server.replication.report()["sites"]:
            if found["site"] == other.name:
                return found
        return {"entries": 0, "withheld": ["dead"], "rebuilds": 0, "segments": 0, "age_s": 0.0}

    def work(self, changes: int = 20) -> None:
        """Take some random events of the site's workers."""
        for _ in range(changes):
            self.changes += 1
            source = self._rng.choice(self.sources)
            kind = self._rng.random()
            if kind < 0.6 or not self._chains:
                self._store(source)
                continue
            chain = self._rng.choice(self._chains)
            run = tuple(chain[self._rng.randrange(len(chain)) :])
            if kind < 0.8:
                self._apply(source, BlocksRemoved(run))
                self.truth -= {(source, block) for block in run}
            elif kind < 0.99:
                group = self._rng.choice(list(Group))
                self._groups[group].difference_update(run)
                self._apply(self.sources[0], GroupRemoved(group, run))
            else:
                self._apply(source, AllCleared())
                self.truth = {entry for entry in self.truth if entry[0] != source}
                for blocks in self._groups.values() if source == self.sources[0] else ():
                    blocks.clear()

    def _store(self, source: SourceId) -> None:
        above = self._rng.choice(self._chains) if self._chains and self._rng.random() < 0.6 else []
        above = above[: self._rng.randint(0, len(above))]
        run = [BlockHash(self._next + i) for i in range(self._rng.randint(1, 30))]
        self._next += len(run)
        self._chains = [*self._chains[-50:], [*above, *run]]
        self._apply(source, BlocksStored(tuple(run), above[-1] if above else None))
        self.truth |= {(source, block) for block in run}
        if source == self.sources[0]:
            # As an engine does: windows near the end of the chunk, the state of the chunk's end.
            for group, kept in ((Group.SWA, run[-self._rng.randint(1, 6) :]), (Group.STATE, run[-1:])):
                self._groups[group].update(kept)
                self._apply(source, GroupStored(group, tuple(kept)))

    def _apply(self, source: SourceId, event: Event) -> None:
        self.server.state.apply(source, [event])

    def usable(self, source: SourceId, chain: Sequence[BlockHash]) -> int:
        """What of a chain a worker's model can use, said slowly."""
        held = next((i for i, b in enumerate(chain) if (source, b) not in self.truth), len(chain))
        if source != self.sources[0]:
            return held
        for b in range(held, 0, -1):
            window = chain[max(0, b - WINDOW_BLOCKS) : b]
            if chain[b - 1] in self._groups[Group.STATE] and self._groups[Group.SWA].issuperset(window):
                return b
        return 0

    def answers(self, other: Site, chain: Sequence[BlockHash]) -> dict[SourceId, tuple[int, int]]:
        """What this service claims of another site's workers: (matched, usable), where there is any."""
        found = self.server.state.indexes.match(chain, len(chain))
        return {m.source: (m.matched, m.usable) for m in found if m.source in other.sources}

    def knows(self, other: Site) -> bool:
        """Whether this service's replica of another site equals the truth, what is usable included."""
        if holdings(self.index, other.sources) != other.truth:
            return False
        for chain in other._chains:
            answers = self.answers(other, chain)
            if any(answers.get(s, (0, 0))[1] != other.usable(s, chain) for s in other.sources):
                return not answers and bool(self.about(other)["withheld"])
        return True

    async def load(self, until_set: asyncio.Event) -> None:
        """Work until told to end."""
        while not until_set.is_set():
            self.work()
            await asyncio.sleep(0.005)


async def converged(*sites: Site) -> float:
    """Wait until every site knows every other; return the seconds it took. Indexes are checked whole."""
    took_s = await until(
        lambda: all(a.knows(b) and not a.about(b)["withheld"] for a in sites for b in sites if a is not b),
        "replicas to equal the truth",
    )
    for site in sites:
        site.index.check()
    return took_s
