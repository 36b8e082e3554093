"""The etcd fixtures, for replication, whose replicas ask often whether they are up to date."""

import pytest

from cache_service.replication import over_etcd
from tests.integration.etcd.conftest import (
    _etcd_is_there,
    client,
    make_cluster,
    prefix,
    shared_etcd,
)

__all__ = ["_etcd_is_there", "client", "make_cluster", "prefix", "shared_etcd"]


@pytest.fixture(autouse=True)
def _ages_show_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(over_etcd, "_PROGRESS_S", 0.4)
