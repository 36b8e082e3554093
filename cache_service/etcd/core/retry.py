"""What may be sent again, when, and to which endpoint.

A lost answer does not say whether a write was carried out. So a call states its class:

| class | sent again after | example |
|---|---|---|
| READ | any lost connection or attempt deadline | range, time to live, status |
| IDEMPOTENT | the same: twice leaves the same keys, though not the same revision | put, delete |
| ONCE | only what proves that the server did not carry it out | txn |

An old attempt of an IDEMPOTENT put may still be carried out after a newer put by the same caller (a member
that was stopped goes on). Where that matters, use a txn with a compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from cache_service.etcd.core.errors import TOKEN_TEXTS, stem


class Repeat(Enum):
    """The class of a call: see the module."""

    READ = "read"
    IDEMPOTENT = "idempotent"
    ONCE = "once"


class Verdict(Enum):
    """What to do with a failed attempt."""

    AGAIN = "again"  # on the next endpoint
    RENEW_TOKEN = "renew_token"  # authenticate, then again: the server carried nothing out
    FAIL = "fail"
    AMBIGUOUS = "ambiguous"  # fail, and say that the call may have been carried out


#: INTERNAL is gRPC's for a stream that was reset; etcd does not use it.
_LOST = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "INTERNAL"})
#: The request was refused before it was proposed.
_NOT_DONE_TEXTS = frozenset({"too many requests", "no leader", "not capable"})
#: gRPC's words for a connection that was never made.
_NO_CONNECTION = ("failed to connect to all addresses", "empty address list", "DNS resolution failed")


def not_done(code: str, details: str) -> bool:
    """Say whether the status proves that the request was not carried out."""
    if stem(details) in _NOT_DONE_TEXTS:
        return True
    return code == "UNAVAILABLE" and any(text in details for text in _NO_CONNECTION)


def judge(repeat: Repeat, code: str, details: str) -> Verdict:
    """Return what to do after an attempt failed with this gRPC status name and text."""
    if stem(details) in TOKEN_TEXTS:
        return Verdict.RENEW_TOKEN
    if not_done(code, details):
        return Verdict.AGAIN
    if code not in _LOST:
        return Verdict.FAIL
    return Verdict.AMBIGUOUS if repeat is Repeat.ONCE else Verdict.AGAIN


def backoff_s(failures: int, *, first_s: float = 0.05, most_s: float = 2.0) -> float:
    """Return the pause after the nth failure in a row (1, 2, ...): doubling, bounded."""
    return min(most_s, first_s * (1 << min(failures - 1, 16)))


@dataclass(slots=True)
class _Endpoint:
    address: str
    failures: int = 0
    rests_until_s: float = 0.0


class EndpointRing:
    """Round robin over the endpoints that are not resting; after a failure an endpoint rests for a while.

    When all rest, the one whose rest ends first is taken: a call is never refused for want of an endpoint.
    """

    def __init__(self, addresses: tuple[str, ...]) -> None:
        self._endpoints = [_Endpoint(address) for address in addresses]
        self._next = 0

    def choose(self, now_s: float, *, avoid: frozenset[str] = frozenset()) -> str:
        """Return the endpoint for the next attempt; those in `avoid` only when there is no other."""
        turn = self._next
        self._next = (turn + 1) % len(self._endpoints)
        ring = self._endpoints[turn:] + self._endpoints[:turn]
        order = sorted(ring, key=lambda e: (e.address in avoid, max(e.rests_until_s - now_s, 0.0)))
        return order[0].address

    def failed(self, address: str, now_s: float) -> bool:
        """Let an endpoint rest. Return whether it had been well."""
        endpoint = self._find(address)
        endpoint.failures += 1
        endpoint.rests_until_s = now_s + backoff_s(endpoint.failures)
        return endpoint.failures == 1

    def answered(self, address: str) -> bool:
        """Note an answer. Return whether the endpoint had been resting."""
        endpoint = self._find(address)
        recovered = endpoint.failures > 0
        endpoint.failures, endpoint.rests_until_s = 0, 0.0
        return recovered

    def _find(self, address: str) -> _Endpoint:
        return next(e for e in self._endpoints if e.address == address)


def parse_version(text: str) -> tuple[int, int, int]:
    """Return major, minor and patch of "3.5.16"; a suffix ("-rc.1") is ignored. Unreadable: (0, 0, 0)."""
    parts = text.split("-")[0].split("+")[0].split(".")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        return (0, 0, 0)
    return (int(parts[0]), int(parts[1]), int(parts[2]))


def loses_data(version: tuple[int, int, int]) -> bool:
    """Say whether a release is known to lose data: 3.5.0 to 3.5.5 (etcd-io/etcd#13766 and its sequels)."""
    return (3, 5, 0) <= version <= (3, 5, 5)


def progress_is_sound(version: tuple[int, int, int]) -> bool:
    """Say whether an answer to a progress request means it.

    Before 3.4.25 and 3.5.8 it may run ahead of events not yet sent (etcd-io/etcd#15220).
    """
    return (3, 4, 25) <= version < (3, 5, 0) or version >= (3, 5, 8)
