"""Transactions: comparisons and operations, and cutting long lists of operations to what etcd takes.

Limits (etcd 3.4 to 3.6, defaults): 128 operations in each list of a transaction, 1.5 MiB for the whole
request, and no key written twice. Sizes here are upper bounds of the encoded size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from cache_service.core.errors import LocalProtocolError
from cache_service.etcd.core.errors import TooLarge
from cache_service.etcd.core.model import KeyRange, RangeResult

MAX_OPS = 128
#: etcd's default --max-request-bytes (1.5 MiB) less room for what it adds around a request.
MAX_REQUEST_BYTES = 1536 * 1024 - 8192
#: Tags, lengths and numbers of one operation or comparison, at most.
_OVERHEAD_BYTES = 64


class Relation(Enum):
    """How a comparison compares the key's field with the given value."""

    EQUAL = "="
    NOT_EQUAL = "!="
    GREATER = ">"
    LESS = "<"


class Target(Enum):
    """The field of a key that a comparison looks at. A key that is absent has 0 in every number."""

    VERSION = "version"
    CREATE_REVISION = "create_revision"
    MOD_REVISION = "mod_revision"
    VALUE = "value"
    LEASE = "lease"


@dataclass(frozen=True, slots=True)
class Compare:
    """`target` of every key in `keys` stands in `relation` to `value`; make one with the functions below."""

    keys: KeyRange
    target: Target
    relation: Relation
    value: int | bytes

    def __post_init__(self) -> None:
        if isinstance(self.value, bytes) != (self.target is Target.VALUE):
            accepted = "bytes" if self.target is Target.VALUE else "an integer"
            raise LocalProtocolError(f"etcd compare: {self.target.value} is compared with {accepted}")


def _compare(target: Target, keys: bytes | KeyRange, relation: str, value: int | bytes) -> Compare:
    try:
        found = Relation(relation)
    except ValueError:
        accepted = ", ".join(r.value for r in Relation)
        raise LocalProtocolError(f"etcd compare: relation {relation!r} is not one of {accepted}") from None
    return Compare(KeyRange.one(keys) if isinstance(keys, bytes) else keys, target, found, value)


def version(keys: bytes | KeyRange, relation: str, value: int) -> Compare:
    """Compare the number of times a key was written since it was created."""
    return _compare(Target.VERSION, keys, relation, value)


def create_revision(keys: bytes | KeyRange, relation: str, value: int) -> Compare:
    """Compare the revision at which a key was created."""
    return _compare(Target.CREATE_REVISION, keys, relation, value)


def mod_revision(keys: bytes | KeyRange, relation: str, value: int) -> Compare:
    """Compare the revision at which a key was last written."""
    return _compare(Target.MOD_REVISION, keys, relation, value)


def value_of(keys: bytes | KeyRange, relation: str, value: bytes) -> Compare:
    """Compare a key's value; false for an absent key."""
    return _compare(Target.VALUE, keys, relation, value)


def lease_of(keys: bytes | KeyRange, relation: str, value: int) -> Compare:
    """Compare the lease a key is attached to."""
    return _compare(Target.LEASE, keys, relation, value)


def absent(key: bytes) -> Compare:
    """Compare true when the key does not exist."""
    return create_revision(key, "=", 0)


def exists(key: bytes) -> Compare:
    """Compare true when the key exists."""
    return create_revision(key, ">", 0)


@dataclass(frozen=True, slots=True)
class Put:
    """Write a key."""

    key: bytes
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a key or a range."""

    keys: KeyRange


@dataclass(frozen=True, slots=True)
class Get:
    """Read a key or a range; `limit` 0 means all of it."""

    keys: KeyRange
    limit: int = 0
    keys_only: bool = False


Op = Put | Delete | Get


@dataclass(frozen=True, slots=True)
class Done:
    """What a Put did: nothing to say."""


@dataclass(frozen=True, slots=True)
class Deleted:
    """How many keys a Delete deleted."""

    count: int


OpResult = Done | Deleted | RangeResult


@dataclass(frozen=True, slots=True)
class TxnResult:
    """Whether every comparison held, and the results of the branch that was carried out, in its order."""

    succeeded: bool
    revision: int
    results: tuple[OpResult, ...]


@dataclass(frozen=True, slots=True)
class Txn:
    """If every one of `compares` holds, `success`, else `failure`; in one revision. Immutable builder:

    Txn().when(absent(b"k")).then(Put(b"k", b"v")).otherwise(Get(KeyRange.one(b"k")))
    """

    compares: tuple[Compare, ...] = ()
    success: tuple[Op, ...] = ()
    failure: tuple[Op, ...] = field(default=())

    def when(self, *compares: Compare) -> Txn:
        """Add comparisons."""
        return replace(self, compares=self.compares + compares)

    def then(self, *ops: Op) -> Txn:
        """Add operations for when all comparisons hold."""
        return replace(self, success=self.success + ops)

    def otherwise(self, *ops: Op) -> Txn:
        """Add operations for when one does not."""
        return replace(self, failure=self.failure + ops)

    @property
    def size_bytes(self) -> int:
        """An upper bound of the request's size."""
        ops = sum(op_bytes(op) for op in (*self.success, *self.failure))
        return ops + sum(compare_bytes(compare) for compare in self.compares)

    def check(self, *, max_ops: int = MAX_OPS, max_bytes: int = MAX_REQUEST_BYTES) -> None:
        """Raise TooLarge when etcd would."""
        longest = max(len(self.compares), len(self.success), len(self.failure))
        if longest > max_ops:
            raise TooLarge(f"etcd txn: {longest} operations, etcd takes {max_ops}: use split")
        if self.size_bytes > max_bytes:
            raise TooLarge(f"etcd txn: up to {self.size_bytes} bytes, etcd takes {max_bytes}: use split")


def op_bytes(op: Op) -> int:
    """Return an upper bound of an operation's encoded size."""
    if isinstance(op, Put):
        return len(op.key) + len(op.value) + _OVERHEAD_BYTES
    return len(op.keys.start) + len(op.keys.end) + _OVERHEAD_BYTES


def compare_bytes(compare: Compare) -> int:
    """Return an upper bound of a comparison's encoded size."""
    value = len(compare.value) if isinstance(compare.value, bytes) else 0
    return len(compare.keys.start) + len(compare.keys.end) + value + _OVERHEAD_BYTES


def split(
    ops: Iterable[Op],
    *,
    guard: Sequence[Compare] = (),
    max_ops: int = MAX_OPS,
    max_bytes: int = MAX_REQUEST_BYTES,
) -> list[Txn]:
    """Cut operations into transactions that etcd takes, in order, each under the whole `guard`.

    Each is atomic, all together are not: stop at the first whose guard fails. A key written twice starts a
    new transaction. Raises TooLarge when one operation does not fit with the guard, LocalProtocolError when
    an operation writes a key of the guard (the next part's guard would see it).
    """
    room = max_bytes - sum(compare_bytes(compare) for compare in guard)
    parts: list[Txn] = []
    current: list[Op] = []
    writes = _Writes()
    size = 0
    for op in ops:
        more = op_bytes(op)
        if more > room:
            raise TooLarge(f"etcd txn: an operation of up to {more} bytes, {room} are free")
        for compare in guard:
            if not isinstance(op, Get) and _overlap(_written(op), compare.keys):
                raise LocalProtocolError(
                    f"etcd txn: a guarded split writes a key of its guard: {compare.keys}"
                )
        if len(current) == max_ops or size + more > room or writes.clash(op):
            parts.append(Txn(tuple(guard), tuple(current)))
            current, size, writes = [], 0, _Writes()
        current.append(op)
        writes.add(op)
        size += more
    if current:
        parts.append(Txn(tuple(guard), tuple(current)))
    return parts


class _Writes:
    """What one transaction writes: etcd refuses a key put twice, or put and deleted."""

    def __init__(self) -> None:
        self._puts: set[bytes] = set()
        self._deletes: list[KeyRange] = []

    def clash(self, op: Op) -> bool:
        if isinstance(op, Put):
            return op.key in self._puts or any(op.key in keys for keys in self._deletes)
        if isinstance(op, Delete):
            return any(key in op.keys for key in self._puts)
        return False

    def add(self, op: Op) -> None:
        if isinstance(op, Put):
            self._puts.add(op.key)
        elif isinstance(op, Delete):
            self._deletes.append(op.keys)


def _written(op: Put | Delete) -> KeyRange:
    return KeyRange.one(op.key) if isinstance(op, Put) else op.keys


def _overlap(a: KeyRange, b: KeyRange) -> bool:
    return a.start in b or b.start in a
