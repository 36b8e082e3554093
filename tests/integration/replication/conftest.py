"""The etcd fixtures, for replication."""

from tests.integration.etcd.conftest import (
    _etcd_is_there,
    client,
    make_cluster,
    prefix,
    shared_etcd,
)

__all__ = ["_etcd_is_there", "client", "make_cluster", "prefix", "shared_etcd"]
