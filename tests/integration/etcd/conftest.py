"""Fixtures: one shared single-member etcd, clients, and clusters to break."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from cache_service.etcd.client import EtcdClient
from cache_service.etcd.config import EtcdConfig
from tests.integration.etcd_support import ROOT, EtcdCluster, find_etcd, running

MakeCluster = Callable[..., EtcdCluster]


@pytest.fixture(scope="session", autouse=True)
def _etcd_is_there() -> None:
    if find_etcd() is not None:
        return
    reason = Path(ROOT, ".tools", "etcd-unavailable")
    if reason.exists():
        pytest.skip(f"no etcd: {reason.read_text().strip()}; scripts/etcd.sh tries again")
    pytest.fail("no etcd: make setup, or scripts/etcd.sh, gets one")


@pytest.fixture(scope="session")
def shared_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    """One member for all tests that leave it well; each test has a prefix of its own."""
    with running(EtcdCluster(tmp_path_factory.mktemp("etcd"))) as cluster:
        yield cluster


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[MakeCluster]:
    """Make and start a cluster of the test's own: EtcdCluster's arguments without the folder."""
    clusters: list[EtcdCluster] = []

    def make(**options: object) -> EtcdCluster:
        cluster = EtcdCluster(tmp_path / f"etcd{len(clusters)}", **options)  # type: ignore[arg-type]
        clusters.append(cluster)
        return cluster.start()

    yield make
    for cluster in clusters:
        cluster.close()


@pytest.fixture
async def client(shared_etcd: EtcdCluster) -> AsyncIterator[EtcdClient]:
    """A client of the shared etcd."""
    async with EtcdClient(EtcdConfig(shared_etcd.endpoints)) as made:
        yield made


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> bytes:
    """A prefix of the test's own."""
    return f"/test/{request.node.name}/".encode()
