"""An asyncio client of etcd's v3 API: docs/etcd.md. `client.EtcdClient` is the way in."""
