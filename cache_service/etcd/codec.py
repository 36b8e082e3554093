"""Messages on the wire <-> our values."""

from __future__ import annotations

from collections.abc import Sequence

from cache_service.core.errors import RemoteProtocolError
from cache_service.etcd import etcd_pb2 as pb
from cache_service.etcd.core import txn as t
from cache_service.etcd.core.model import (
    Alarm,
    AlarmKind,
    Event,
    EventKind,
    KeyRange,
    KeyValue,
    LeaseInfo,
    Member,
    RangeResult,
    Status,
)
from cache_service.etcd.core.watching import Answer

_RELATIONS = {
    t.Relation.EQUAL: pb.Compare.EQUAL,
    t.Relation.NOT_EQUAL: pb.Compare.NOT_EQUAL,
    t.Relation.GREATER: pb.Compare.GREATER,
    t.Relation.LESS: pb.Compare.LESS,
}
_TARGETS = {
    t.Target.VERSION: pb.Compare.VERSION,
    t.Target.CREATE_REVISION: pb.Compare.CREATE,
    t.Target.MOD_REVISION: pb.Compare.MOD,
    t.Target.VALUE: pb.Compare.VALUE,
    t.Target.LEASE: pb.Compare.LEASE,
}
_ALARMS = {pb.NOSPACE: AlarmKind.NO_SPACE, pb.CORRUPT: AlarmKind.CORRUPT}


def key_value(message: pb.KeyValue) -> KeyValue:
    """Decode a key."""
    return KeyValue(
        message.key,
        message.value,
        message.create_revision,
        message.mod_revision,
        message.version,
        message.lease,
    )


def range_request(
    keys: KeyRange,
    *,
    limit: int = 0,
    revision: int = 0,
    serializable: bool = False,
    keys_only: bool = False,
    count_only: bool = False,
) -> pb.RangeRequest:
    """Encode a read."""
    return pb.RangeRequest(
        key=keys.start,
        range_end=keys.end,
        limit=limit,
        revision=revision,
        serializable=serializable,
        keys_only=keys_only,
        count_only=count_only,
    )


def range_result(message: pb.RangeResponse, revision: int = 0) -> RangeResult:
    """Decode a read; `revision` is the enclosing transaction's, whose reads carry no header revision."""
    return RangeResult(
        message.header.revision or revision, tuple(map(key_value, message.kvs)), message.more, message.count
    )


def put_request(put: t.Put) -> pb.PutRequest:
    """Encode a write."""
    return pb.PutRequest(key=put.key, value=put.value, lease=put.lease)


def delete_request(keys: KeyRange) -> pb.DeleteRangeRequest:
    """Encode a deletion."""
    return pb.DeleteRangeRequest(key=keys.start, range_end=keys.end)


def _op(op: t.Op) -> pb.RequestOp:
    if isinstance(op, t.Put):
        return pb.RequestOp(request_put=put_request(op))
    if isinstance(op, t.Delete):
        return pb.RequestOp(request_delete_range=delete_request(op.keys))
    return pb.RequestOp(request_range=range_request(op.keys, limit=op.limit, keys_only=op.keys_only))


def _compare(compare: t.Compare) -> pb.Compare:
    message = pb.Compare(
        result=_RELATIONS[compare.relation],
        target=_TARGETS[compare.target],
        key=compare.keys.start,
        range_end=compare.keys.end,
    )
    setattr(message, compare.target.value, compare.value)
    return message


def txn_request(txn: t.Txn) -> pb.TxnRequest:
    """Encode a transaction."""
    return pb.TxnRequest(
        compare=[_compare(c) for c in txn.compares],
        success=[_op(op) for op in txn.success],
        failure=[_op(op) for op in txn.failure],
    )


def txn_result(message: pb.TxnResponse) -> t.TxnResult:
    """Decode a transaction's answer."""
    revision = message.header.revision
    return t.TxnResult(message.succeeded, revision, tuple(_result(r, revision) for r in message.responses))


def _result(message: pb.ResponseOp, revision: int) -> t.OpResult:
    kind = message.WhichOneof("response")
    if kind == "response_put":
        return t.Done()
    if kind == "response_delete_range":
        return t.Deleted(message.response_delete_range.deleted)
    if kind == "response_range":
        return range_result(message.response_range, revision)
    raise RemoteProtocolError("etcd txn: a result of an operation that was not asked for")


def watch_request(keys: KeyRange, start_revision: int, *, previous: bool) -> pb.WatchRequest:
    """Encode the opening of a watch: fragments, and the server's own progress notifications."""
    return pb.WatchRequest(
        create_request=pb.WatchCreateRequest(
            key=keys.start,
            range_end=keys.end,
            start_revision=start_revision,
            progress_notify=True,
            prev_kv=previous,
            fragment=True,
        )
    )


def progress_request() -> pb.WatchRequest:
    """Encode the question how far the watch is."""
    return pb.WatchRequest(progress_request=pb.WatchProgressRequest())


def watch_answer(message: pb.WatchResponse) -> Answer:
    """Decode a watch response."""
    return Answer(
        revision=message.header.revision,
        watch_id=message.watch_id,
        created=message.created,
        canceled=message.canceled,
        compact_revision=message.compact_revision,
        reason=message.cancel_reason,
        fragment=message.fragment,
        events=tuple(map(_event, message.events)),
    )


def _event(message: pb.Event) -> Event:
    return Event(
        EventKind.DELETE if message.type == pb.Event.DELETE else EventKind.PUT,
        key_value(message.kv),
        key_value(message.prev_kv) if message.HasField("prev_kv") else None,
    )


def lease_info(message: pb.LeaseTimeToLiveResponse) -> LeaseInfo:
    """Decode a lease's state."""
    return LeaseInfo(message.ID, message.TTL, message.grantedTTL, tuple(message.keys))


def members(messages: Sequence[pb.Member]) -> tuple[Member, ...]:
    """Decode a list of members."""
    return tuple(Member(m.ID, m.name, tuple(m.peerURLs), tuple(m.clientURLs), m.isLearner) for m in messages)


def status(message: pb.StatusResponse) -> Status:
    """Decode a member's state."""
    return Status(
        version=message.version,
        member=message.header.member_id,
        leader=message.leader,
        revision=message.header.revision,
        db_bytes=message.dbSize,
        db_in_use_bytes=message.dbSizeInUse,
        raft_term=message.raftTerm,
        raft_index=message.raftIndex,
        raft_applied_index=message.raftAppliedIndex,
        learner=message.isLearner,
        errors=tuple(message.errors),
    )


def alarms(message: pb.AlarmResponse) -> tuple[Alarm, ...]:
    """Decode the active alarms; kinds that are not known are left out."""
    return tuple(Alarm(a.memberID, _ALARMS[a.alarm]) for a in message.alarms if a.alarm in _ALARMS)


def disarm_request(alarm: Alarm) -> pb.AlarmRequest:
    """Encode the end of an alarm."""
    kind = pb.NOSPACE if alarm.kind is AlarmKind.NO_SPACE else pb.CORRUPT
    return pb.AlarmRequest(action=pb.AlarmRequest.DEACTIVATE, memberID=alarm.member, alarm=kind)
