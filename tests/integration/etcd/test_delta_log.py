"""The delta log in etcd keeps the contract of every delta log."""

from __future__ import annotations

import pytest

from cache_service.core.ids import Namespace, SiteId
from cache_service.etcd.client import EtcdClient
from cache_service.replication.etcd_log import EtcdLog
from cache_service.store import DeltaLog
from tests.integration.delta_log_conformance import DeltaLogConformance


class TestEtcdLog(DeltaLogConformance):
    """The same tests as of the log in memory, against a real member."""

    @pytest.fixture
    def log(self, client: EtcdClient, request: pytest.FixtureRequest) -> DeltaLog:
        return EtcdLog(client, Namespace(request.node.name, 64), SiteId("A"))
