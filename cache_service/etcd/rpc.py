"""The RPCs of etcd that are used: path, messages, and whether a call may be repeated (core/retry.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message

from cache_service.etcd import etcd_pb2 as pb
from cache_service.etcd.core.retry import Repeat

Response = TypeVar("Response", bound=Message)


@dataclass(frozen=True, slots=True)
class Method(Generic[Response]):
    """One RPC. `leader`: refuse at once when the member has no leader, rather than wait for one."""

    path: str
    response: type[Response]
    repeat: Repeat
    leader: bool = True

    @property
    def name(self) -> str:
        """Return the name for messages and logs."""
        return self.path.rsplit("/", 1)[1]


RANGE = Method("/etcdserverpb.KV/Range", pb.RangeResponse, Repeat.READ)
PUT = Method("/etcdserverpb.KV/Put", pb.PutResponse, Repeat.IDEMPOTENT)
DELETE_RANGE = Method("/etcdserverpb.KV/DeleteRange", pb.DeleteRangeResponse, Repeat.IDEMPOTENT)
TXN = Method("/etcdserverpb.KV/Txn", pb.TxnResponse, Repeat.ONCE)
COMPACT = Method("/etcdserverpb.KV/Compact", pb.CompactionResponse, Repeat.IDEMPOTENT)
WATCH = Method("/etcdserverpb.Watch/Watch", pb.WatchResponse, Repeat.READ)
# Repeatable because the id is ours: a second grant is refused as existing.
LEASE_GRANT = Method("/etcdserverpb.Lease/LeaseGrant", pb.LeaseGrantResponse, Repeat.IDEMPOTENT)
LEASE_REVOKE = Method("/etcdserverpb.Lease/LeaseRevoke", pb.LeaseRevokeResponse, Repeat.IDEMPOTENT)
LEASE_KEEP_ALIVE = Method("/etcdserverpb.Lease/LeaseKeepAlive", pb.LeaseKeepAliveResponse, Repeat.IDEMPOTENT)
LEASE_TIME_TO_LIVE = Method("/etcdserverpb.Lease/LeaseTimeToLive", pb.LeaseTimeToLiveResponse, Repeat.READ)
LEASE_LEASES = Method("/etcdserverpb.Lease/LeaseLeases", pb.LeaseLeasesResponse, Repeat.READ)
MEMBER_LIST = Method("/etcdserverpb.Cluster/MemberList", pb.MemberListResponse, Repeat.READ, leader=False)
ALARM = Method("/etcdserverpb.Maintenance/Alarm", pb.AlarmResponse, Repeat.IDEMPOTENT)
STATUS = Method("/etcdserverpb.Maintenance/Status", pb.StatusResponse, Repeat.READ, leader=False)
DEFRAGMENT = Method("/etcdserverpb.Maintenance/Defragment", pb.DefragmentResponse, Repeat.ONCE, leader=False)
AUTHENTICATE = Method("/etcdserverpb.Auth/Authenticate", pb.AuthenticateResponse, Repeat.READ)
