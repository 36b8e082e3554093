"""What etcd's refusals mean to a caller.

Decides the class of an error from the gRPC status and etcd's text, both of which etcd keeps stable
(api/v3rpc/rpctypes/error.go, 3.4 to 3.6). Texts are matched whole after the "etcdserver: " prefix.
"""

from __future__ import annotations

from collections.abc import Callable

from cache_service.core.errors import (
    DeadlineExceeded,
    LocalProtocolError,
    PrfaasError,
    RemoteProtocolError,
    Unavailable,
)


class EtcdUnavailable(Unavailable):
    """No member answered, the members have no leader, or the connection broke."""

    reason = "etcd_unavailable"


class EtcdDeadline(DeadlineExceeded):
    """The call's time ran out. A write may have been carried out or may still be."""

    reason = "etcd_deadline"


class Ambiguous(EtcdUnavailable):
    """A call that may not be repeated was cut off: carried out once or not at all. Read to find out."""

    reason = "etcd_ambiguous"
    retryable = False


class Compacted(PrfaasError):
    """The revision asked for is gone: list again. `compact_revision`: the oldest left, 0 if unknown."""

    retryable = True
    reason = "etcd_compacted"

    def __init__(self, message: str, *, compact_revision: int = 0) -> None:
        super().__init__(message)
        self.compact_revision = compact_revision


class NoSpace(PrfaasError):
    """The quota is used up. Deletes and reads still work: delete, compact, defragment, disarm the alarm."""

    reason = "etcd_no_space"


class AuthFailed(PrfaasError):
    """The name, the password or the token was not accepted, or a name is missing."""

    reason = "etcd_auth"


class TokenRejected(AuthFailed):
    """The token ran out, or roles have changed since: a new one will do."""

    retryable = True
    reason = "etcd_token"


class PermissionDenied(PrfaasError):
    """The user is known and may not do this."""

    reason = "etcd_permission"


class TooLarge(LocalProtocolError):
    """A request is larger, or a transaction longer, than etcd takes: split it."""

    reason = "etcd_too_large"


class FarBehind(Compacted):
    """A watch would have to catch up with more revisions than is good for the server: list again."""

    reason = "etcd_far_behind"


class LeaseNotFound(PrfaasError):
    """The lease expired or was revoked."""

    reason = "etcd_lease_not_found"


class LeaseExists(PrfaasError):
    """The lease id asked for is in use."""

    reason = "etcd_lease_exists"


#: Refusals that a new token cures; the request was not carried out.
TOKEN_TEXTS = frozenset({"invalid auth token", "revision of auth store is old"})
_PREFIX = "etcdserver: "
_TEXTS: dict[str, type[PrfaasError]] = {
    "mvcc: required revision has been compacted": Compacted,
    "mvcc: database space exceeded": NoSpace,
    "request is too large": TooLarge,
    "too many operations in txn request": TooLarge,
    "duplicate key given in txn request": LocalProtocolError,
    "requested lease not found": LeaseNotFound,
    "lease already exists": LeaseExists,
    "permission denied": PermissionDenied,
    "authentication failed, invalid user ID or password": AuthFailed,
    "authentication is not enabled": AuthFailed,
    "invalid auth token": TokenRejected,
    "user name is empty": AuthFailed,
    "user name not found": AuthFailed,
    "revision of auth store is old": TokenRejected,
    "too many requests": EtcdUnavailable,
    "no leader": EtcdUnavailable,
}
_CODES: dict[str, type[PrfaasError]] = {
    "UNAVAILABLE": EtcdUnavailable,
    "DEADLINE_EXCEEDED": EtcdDeadline,
    "CANCELLED": EtcdUnavailable,
    # gRPC's own, for a stream that was reset; etcd does not use it.
    "INTERNAL": EtcdUnavailable,
    "UNAUTHENTICATED": AuthFailed,
    "PERMISSION_DENIED": PermissionDenied,
    # What is left of it after etcd's own texts is gRPC's limit on a message.
    "RESOURCE_EXHAUSTED": TooLarge,
    "INVALID_ARGUMENT": LocalProtocolError,
    "FAILED_PRECONDITION": LocalProtocolError,
    "OUT_OF_RANGE": LocalProtocolError,
}


def stem(details: str) -> str:
    """Return etcd's text without its prefix."""
    return details.removeprefix(_PREFIX)


def canceled(reason: str, *, what: str) -> PrfaasError:
    """Return the error for the reason that a canceled watch gives: a gRPC error written out, or a text."""
    text = reason.rpartition("desc = ")[2]
    kind: Callable[[str], PrfaasError] = _TEXTS.get(stem(text), RemoteProtocolError)
    return kind(f"etcd {what}: canceled by the server: {reason or 'no reason given'}")


def translate(code: str, details: str, *, what: str) -> PrfaasError:
    """Return the error for a gRPC status name and text; `what` names the call for the message."""
    kind: Callable[[str], PrfaasError] = _TEXTS.get(stem(details)) or _CODES.get(code, RemoteProtocolError)
    return kind(f"etcd {what}: {details or code}")
