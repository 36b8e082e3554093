"""Keeping etcd small: one elected process compacts history, defragments members and clears a full quota.

Decides when. Compaction leaves what was written since the round before last, so a watch that was cut for up
to a round resumes without a listing. A member that is defragmented answers nothing meanwhile: one at a time,
the leader last, and only when most of its file is free space.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from cache_service import logs
from cache_service.core.errors import PrfaasError
from cache_service.etcd.client import EtcdClient
from cache_service.etcd.core import txn as t
from cache_service.etcd.core.errors import Compacted, NoSpace
from cache_service.etcd.core.model import AlarmKind, KeyRange, RangeResult, Status
from cache_service.etcd.lease import Lease
from cache_service.replication.core.layout import ROOT

log = logging.getLogger(__name__)

ROUND_S = 60.0
#: After a round that met a full quota: each member raises an alarm of its own, perhaps only after that round.
AGAIN_S = 2.0
LEADER_KEY = ROOT + b"maintenance/leader"
#: Free space worth a member's pause.
_WASTE_BYTES = 64 << 20
#: History kept whatever its age: compacting less than this is not worth a write.
_KEEP_REVISIONS = 1000


class Maintenance:
    """Does the rounds while it is elected; `run` for ever."""

    def __init__(
        self, etcd: EtcdClient, endpoints: tuple[str, ...], instance: str, *, round_s: float = ROUND_S
    ) -> None:
        self._etcd = etcd
        self._endpoints = endpoints
        self._instance = instance.encode()
        self._round_s = round_s
        self._lease: Lease | None = None
        self._revision_before = 0
        self._full = False
        #: Rounds done as the leader, compactions, members defragmented, alarms cleared.
        self.rounds = self.compactions = self.defragmented = self.cleared = 0

    async def run(self) -> None:
        """One round after the other."""
        while True:
            self._full = False
            try:
                await self.round()
            except PrfaasError as error:
                logs.event(log, "maintenance_failed", logging.WARNING, reason=error.reason, error=str(error))
            await asyncio.sleep(min(AGAIN_S, self._round_s) if self._full else self._round_s)

    async def round(self) -> None:
        """Do what is due, if this process is elected. Raises PrfaasError."""
        try:
            elected = await self._elected()
        except NoSpace:
            elected = True  # without room for a leader's key, everybody may make room
        if not elected:
            return
        self.rounds += 1
        statuses = await self._statuses()
        if any(alarm.kind is AlarmKind.NO_SPACE for alarm in await self._etcd.alarms()):
            await self._clear_quota(statuses)
            return
        revision = max((status.revision for status in statuses.values()), default=0)
        upto = min(self._revision_before, revision - _KEEP_REVISIONS)
        self._revision_before = revision
        if upto > 0:
            with contextlib.suppress(Compacted):
                await self._etcd.compact(upto)
                self.compactions += 1
        for endpoint, status in _leader_last(statuses):
            free = status.db_bytes - status.db_in_use_bytes
            if free > max(_WASTE_BYTES, status.db_bytes // 2):
                await self._defragment(endpoint)

    async def _elected(self) -> bool:
        if self._lease is None or self._lease.loss is not None:
            self._lease = await self._etcd.lease(max(int(self._round_s), 10))
        result = await self._etcd.txn(
            t.Txn()
            .when(t.absent(LEADER_KEY))
            .then(t.Put(LEADER_KEY, self._instance, self._lease.id))
            .otherwise(t.Get(KeyRange.one(LEADER_KEY)))
        )
        if result.succeeded:
            return True
        found = result.results[0]
        assert isinstance(found, RangeResult)
        return bool(found.kvs) and found.kvs[0].value == self._instance

    async def _statuses(self) -> dict[str, Status]:
        """Return the state of every member that answers."""
        found = {}
        for endpoint in self._endpoints:
            try:
                found[endpoint] = await self._etcd.status(endpoint)
            except PrfaasError as error:
                logs.event(log, "member_silent", logging.WARNING, endpoint=endpoint, error=str(error))
        return found

    async def _clear_quota(self, statuses: dict[str, Status]) -> None:
        self._full = True
        logs.event(log, "quota_used_up", logging.ERROR)
        revision = max(status.revision for status in statuses.values())
        with contextlib.suppress(Compacted):
            await self._etcd.compact(revision, physical=True)
            self.compactions += 1
        for endpoint, _ in _leader_last(statuses):
            await self._defragment(endpoint)
        for alarm in await self._etcd.alarms():
            if alarm.kind is AlarmKind.NO_SPACE:
                await self._etcd.disarm(alarm)
                self.cleared += 1

    async def _defragment(self, endpoint: str) -> None:
        await self._etcd.defragment(endpoint)
        self.defragmented += 1
        logs.event(log, "member_defragmented", endpoint=endpoint)


def _leader_last(statuses: dict[str, Status]) -> list[tuple[str, Status]]:
    return sorted(statuses.items(), key=lambda item: item[1].leader == item[1].member)
