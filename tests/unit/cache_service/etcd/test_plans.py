"""Paging, cutting transactions, ranges of keys: properties."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_service.core.errors import LocalProtocolError
from cache_service.etcd import codec
from cache_service.etcd.core import txn as t
from cache_service.etcd.core.errors import TooLarge
from cache_service.etcd.core.model import KeyRange
from cache_service.etcd.core.paging import PagePlan

KEYS = st.binary(min_size=1, max_size=4)


@given(prefix=st.lists(st.sampled_from(b"a\x00\xfe\xff"), max_size=4).map(bytes), key=KEYS)
def test_prefix(prefix: bytes, key: bytes) -> None:
    """The range of a prefix holds the keys that start with it, and no other."""
    assert (key in KeyRange.prefix(prefix)) == key.startswith(prefix)


@given(start=KEYS, end=st.one_of(st.just(b""), st.just(b"\0"), KEYS), key=KEYS, other=KEYS)
def test_after(start: bytes, end: bytes, key: bytes, other: bytes) -> None:
    """What is above a key of the range is the rest of the range."""
    keys = KeyRange(start, end)
    if key not in keys:
        return
    rest = keys.after(key)
    assert (rest is not None and other in rest) == (other in keys and other > key)


@given(
    sizes=st.lists(st.integers(1, 400), max_size=200),
    page_keys=st.integers(1, 300),
    page_bytes=st.integers(1, 2000),
    message_bytes=st.integers(400, 4000),
)
def test_pages(sizes: list[int], page_keys: int, page_bytes: int, message_bytes: int) -> None:
    """Every key comes once and in order, no page above the message limit, and refusals are few."""
    store = [(b"%04d" % i, size) for i, size in enumerate(sizes)]
    plan = PagePlan(KeyRange.prefix(b"0"), page_bytes=page_bytes, page_keys=page_keys)
    got: list[bytes] = []
    refusals = 0
    while plan.rest is not None:
        assert 1 <= plan.limit <= page_keys
        rest = plan.rest
        found = [(k, s) for k, s in store if k in rest]
        page = found[: plan.limit]
        size = sum(s for _, s in page)
        if size > message_bytes:
            refusals += 1
            assert refusals < 20 * (len(sizes) + 1)
            plan.refused()
            continue
        got += [k for k, _ in page]
        last = page[-1][0] if page else None
        plan.took(last, count=len(page), size_bytes=size, more=len(found) > len(page))
    assert got == [k for k, _ in store]


def test_a_key_larger_than_a_message() -> None:
    """One key that does not fit is an error, not a loop."""
    plan = PagePlan(KeyRange.prefix(b"a"), page_bytes=10, page_keys=4)
    plan.refused()
    plan.refused()
    with pytest.raises(TooLarge, match="max_message_bytes"):
        plan.refused()


RANGES = st.builds(KeyRange, KEYS, st.one_of(st.just(b""), st.just(b"\0"), KEYS))
OPS = st.one_of(
    st.builds(t.Put, KEYS, st.binary(max_size=60), st.integers(0, 2**62)),
    st.builds(t.Delete, RANGES),
    st.builds(t.Get, RANGES, limit=st.integers(0, 2**40), keys_only=st.booleans()),
)
NUMBERS = st.integers(0, 2**62)
RELATIONS = st.sampled_from([r.value for r in t.Relation])
COMPARES = st.one_of(
    st.builds(t.version, RANGES, RELATIONS, NUMBERS),
    st.builds(t.mod_revision, KEYS, RELATIONS, NUMBERS),
    st.builds(t.create_revision, KEYS, RELATIONS, NUMBERS),
    st.builds(t.lease_of, KEYS, RELATIONS, NUMBERS),
    st.builds(t.value_of, RANGES, RELATIONS, st.binary(max_size=40)),
)


@given(
    compares=st.lists(COMPARES, max_size=5),
    success=st.lists(OPS, max_size=9),
    failure=st.lists(OPS, max_size=5),
)
def test_size_is_an_upper_bound(compares: list[t.Compare], success: list[t.Op], failure: list[t.Op]) -> None:
    """No transaction is larger on the wire than it is said to be."""
    txn = t.Txn().when(*compares).then(*success).otherwise(*failure)
    assert codec.txn_request(txn).ByteSize() <= txn.size_bytes


def test_size_of_a_large_value_is_an_upper_bound() -> None:
    """Lengths of three and four bytes are counted too."""
    for size in (200, 20_000, 2_000_000):
        txn = t.Txn().then(t.Put(b"k", bytes(size), 2**62)).when(t.value_of(b"k", "=", bytes(size)))
        assert codec.txn_request(txn).ByteSize() <= txn.size_bytes


def _touches(a: t.Op, b: t.Op) -> bool:
    """Say whether etcd refuses two operations in one transaction."""
    if isinstance(a, t.Put) and isinstance(b, t.Put):
        return a.key == b.key
    if isinstance(a, t.Put) and isinstance(b, t.Delete):
        return a.key in b.keys
    if isinstance(a, t.Delete) and isinstance(b, t.Put):
        return b.key in a.keys
    return False


@given(ops=st.lists(OPS, max_size=40), max_ops=st.integers(1, 10), max_bytes=st.integers(200, 600))
def test_split(ops: list[t.Op], max_ops: int, max_bytes: int) -> None:
    """The parts are the operations in order, within the limits, without a clash, none needlessly short."""
    parts = t.split(ops, max_ops=max_ops, max_bytes=max_bytes)
    assert [op for part in parts for op in part.success] == ops
    for part in parts:
        part.check(max_ops=max_ops, max_bytes=max_bytes)
        for i, op in enumerate(part.success):
            assert not any(_touches(op, other) for other in part.success[:i])
    for part, following in pairwise(parts):
        first = following.success[0]
        longer = part.then(first)
        full = len(longer.success) > max_ops or longer.size_bytes > max_bytes
        assert full or any(_touches(first, other) for other in part.success)


def test_split_under_a_guard() -> None:
    """The guard is in every part, its size counts, and writing its key is refused."""
    guard = [t.value_of(b"epoch", "=", b"7" * 100)]
    parts = t.split([t.Put(b"%d" % i, b"") for i in range(300)], guard=guard)
    assert [len(p.success) for p in parts] == [128, 128, 44]
    assert all(p.compares == tuple(guard) for p in parts)
    with pytest.raises(TooLarge, match="are free"):
        t.split([t.Put(b"k", bytes(100))], guard=guard, max_bytes=300)
    for op in (t.Put(b"epoch", b""), t.Delete(KeyRange.prefix(b"e"))):
        with pytest.raises(LocalProtocolError, match="writes a key of its guard"):
            t.split([op], guard=guard)
    assert len(t.split([t.Get(KeyRange.one(b"epoch"))], guard=guard)) == 1
    assert t.split([]) == []


def test_what_makes_no_sense_is_refused() -> None:
    """Unknown relations, wrong types and empty keys are named."""
    with pytest.raises(LocalProtocolError, match=r"'==' is not one of =, !=, >, <"):
        t.version(b"k", "==", 1)
    with pytest.raises(LocalProtocolError, match="value is compared with bytes"):
        t.Compare(KeyRange.one(b"k"), t.Target.VALUE, t.Relation.EQUAL, 1)
    with pytest.raises(LocalProtocolError, match="version is compared with an integer"):
        t.Compare(KeyRange.one(b"k"), t.Target.VERSION, t.Relation.EQUAL, b"1")
    with pytest.raises(LocalProtocolError, match="start is empty"):
        KeyRange(b"")
    with pytest.raises(TooLarge, match="129 operations"):
        t.Txn().otherwise(*[t.Get(KeyRange.one(b"k"))] * 129).check()
