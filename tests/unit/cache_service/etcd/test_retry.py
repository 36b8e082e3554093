"""What is sent again, where to, and when a lease is no longer certain."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_service.core.errors import LocalProtocolError, PrfaasError, RemoteProtocolError
from cache_service.etcd.core import errors as e
from cache_service.etcd.core.leases import LeaseClock
from cache_service.etcd.core.retry import (
    EndpointRing,
    Repeat,
    Verdict,
    backoff_s,
    judge,
    loses_data,
    parse_version,
    progress_is_sound,
)

REFUSED = "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Connection refused"
ROWS = [
    # status, text, READ, IDEMPOTENT, ONCE
    ("UNAVAILABLE", REFUSED, "again", "again", "again"),
    ("UNAVAILABLE", "etcdserver: no leader", "again", "again", "again"),
    ("RESOURCE_EXHAUSTED", "etcdserver: too many requests", "again", "again", "again"),
    ("UNAVAILABLE", "Socket closed", "again", "again", "ambiguous"),
    ("UNAVAILABLE", "etcdserver: request timed out", "again", "again", "ambiguous"),
    ("UNAVAILABLE", "etcdserver: leader changed", "again", "again", "ambiguous"),
    ("UNAVAILABLE", "etcdserver: server stopped", "again", "again", "ambiguous"),
    ("INTERNAL", "Received RST_STREAM with error code 2", "again", "again", "ambiguous"),
    ("DEADLINE_EXCEEDED", "Deadline Exceeded", "again", "again", "ambiguous"),
    ("UNAUTHENTICATED", "etcdserver: invalid auth token", *3 * ["renew_token"]),
    ("INVALID_ARGUMENT", "etcdserver: revision of auth store is old", *3 * ["renew_token"]),
    ("PERMISSION_DENIED", "etcdserver: permission denied", "fail", "fail", "fail"),
    ("OUT_OF_RANGE", "etcdserver: mvcc: required revision has been compacted", "fail", "fail", "fail"),
    ("RESOURCE_EXHAUSTED", "etcdserver: mvcc: database space exceeded", "fail", "fail", "fail"),
    ("UNKNOWN", "anything", "fail", "fail", "fail"),
]


@pytest.mark.parametrize(("code", "details", "read", "idempotent", "once"), ROWS)
def test_verdicts(code: str, details: str, read: str, idempotent: str, once: str) -> None:
    """The table of classes: a txn is sent again only when it was certainly not carried out."""
    assert judge(Repeat.READ, code, details) is Verdict(read)
    assert judge(Repeat.IDEMPOTENT, code, details) is Verdict(idempotent)
    assert judge(Repeat.ONCE, code, details) is Verdict(once)


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        ("UNAVAILABLE", "Socket closed", e.EtcdUnavailable),
        ("DEADLINE_EXCEEDED", "", e.EtcdDeadline),
        ("OUT_OF_RANGE", "etcdserver: mvcc: required revision has been compacted", e.Compacted),
        ("RESOURCE_EXHAUSTED", "etcdserver: mvcc: database space exceeded", e.NoSpace),
        ("RESOURCE_EXHAUSTED", "CLIENT: Received message larger than max (5 vs. 4)", e.TooLarge),
        ("INVALID_ARGUMENT", "etcdserver: request is too large", e.TooLarge),
        ("INVALID_ARGUMENT", "etcdserver: authentication failed, invalid user ID or password", e.AuthFailed),
        ("UNAUTHENTICATED", "etcdserver: invalid auth token", e.TokenRejected),
        ("PERMISSION_DENIED", "etcdserver: permission denied", e.PermissionDenied),
        ("NOT_FOUND", "etcdserver: requested lease not found", e.LeaseNotFound),
        ("FAILED_PRECONDITION", "etcdserver: lease already exists", e.LeaseExists),
        ("INVALID_ARGUMENT", "etcdserver: duplicate key given in txn request", LocalProtocolError),
        ("UNIMPLEMENTED", "unknown service", RemoteProtocolError),
    ],
)
def test_errors(code: str, details: str, kind: type[PrfaasError]) -> None:
    """Every refusal has its own class, with etcd's words in the message."""
    error = e.translate(code, details, what="Put")
    assert type(error) is kind
    assert details in str(error)


@given(
    steps=st.lists(st.tuples(st.sampled_from("ab"), st.booleans(), st.floats(0, 3)), max_size=40),
    avoid=st.sets(st.sampled_from("abc")),
)
def test_ring_always_has_an_endpoint(steps: list[tuple[str, bool, float]], avoid: set[str]) -> None:
    """Whatever failed, one is chosen; one that never failed goes before one that rests, unless avoided."""
    ring = EndpointRing(("a", "b", "c"))
    now_s = 0.0
    resting: dict[str, bool] = {"a": False, "b": False, "c": False}
    for address, fails, later_s in steps:
        now_s += later_s
        if fails:
            assert ring.failed(address, now_s) is not resting[address]
        else:
            assert ring.answered(address) is resting[address]
        resting[address] = fails
    if all(resting[a] for a in "ab"):
        ring.failed("a", now_s)
        ring.failed("b", now_s)
        assert ring.choose(now_s) == "c"
        assert ring.choose(now_s, avoid=frozenset("c")) in "ab"
    chosen = ring.choose(now_s, avoid=frozenset(avoid))
    assert chosen not in avoid or avoid == {"a", "b", "c"}


def test_ring_goes_round() -> None:
    """Healthy endpoints take turns; one that rests is taken again afterwards."""
    ring = EndpointRing(("a", "b", "c"))
    assert [ring.choose(0.0) for _ in range(6)] == ["a", "b", "c", "a", "b", "c"]
    ring.failed("b", 0.0)
    assert "b" not in {ring.choose(0.01) for _ in range(6)}
    assert "b" in {ring.choose(1.0) for _ in range(6)}


def test_backoff() -> None:
    """It doubles up to its bound, for any number of failures."""
    assert [backoff_s(n) for n in (1, 2, 3)] == [0.05, 0.1, 0.2]
    assert backoff_s(10_000) == 2.0


def test_versions() -> None:
    """Releases that lose data, and those whose progress answers run ahead of events."""
    assert parse_version("3.5.16") == (3, 5, 16)
    assert parse_version("3.6.0-rc.1") == (3, 6, 0)
    assert parse_version("weird") == (0, 0, 0)
    for text, loses, sound in [
        ("3.4.23", False, False),
        ("3.4.25", False, True),
        ("3.5.1", True, False),
        ("3.5.5", True, False),
        ("3.5.6", False, False),
        ("3.5.16", False, True),
        ("3.6.1", False, True),
    ]:
        assert loses_data(parse_version(text)) is loses, text
        assert progress_is_sound(parse_version(text)) is sound, text


def test_lease_clock() -> None:
    """Renewals are due after a third, again after a sixth; certainty ends a TTL after the last confirmed."""
    clock = LeaseClock(6.0, 100.0)
    assert (clock.due_at_s, clock.valid_until_s) == (102.0, 106.0)
    clock.asked(102.0)
    assert clock.due_at_s == 103.0
    clock.confirmed(102.0, 6.0)
    assert (clock.due_at_s, clock.valid_until_s) == (104.0, 108.0)
    clock.confirmed(101.0, 60.0)  # an old answer
    assert clock.valid_until_s == 108.0
    clock.asked(104.0)
    clock.cut()
    assert clock.due_at_s == 104.0
    assert not clock.expired(107.9)
    assert clock.expired(108.0)


@given(
    asks=st.lists(st.tuples(st.floats(0, 5), st.floats(0, 5), st.booleans()), max_size=30),
    ttl_s=st.integers(2, 10),
)
def test_the_holder_gives_up_before_the_server(asks: list[tuple[float, float, bool]], ttl_s: int) -> None:
    """Whatever the delays on the way, the holder's end is never after the server's."""
    clock = LeaseClock(ttl_s, 0.0)
    server_until_s, now_s = float(ttl_s), 0.0
    for there_s, back_s, answered in asks:
        sent_s = now_s
        clock.asked(sent_s)
        if sent_s + there_s < server_until_s:
            server_until_s = sent_s + there_s + ttl_s
            if answered:
                clock.confirmed(sent_s, ttl_s)
        now_s += there_s + back_s
        assert clock.valid_until_s <= server_until_s
