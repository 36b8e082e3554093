"""Replication of the index between sites: delta logs over etcd or peer streams, liveness, maintenance."""
