"""The one error tree that all three packages raise from.

Core code raises for misuse and returns effects for expected trouble; a shell translates an error once
(to a gRPC status, an HTTP body, a failed request). `retryable` says whether another worker may succeed.
"""

from __future__ import annotations


class PrfaasError(Exception):
    """Base of every error this project raises on purpose.

    `reason` is a short constant word fit for a metric label; `context` holds the facts for the log line
    (never prompts, tokens or secrets).
    """

    retryable: bool = False
    reason: str = "internal"

    def __init__(self, message: str, *, reason: str | None = None, **context: object) -> None:
        super().__init__(message)
        if reason is not None:
            self.reason = reason
        self.context = context


class ConfigError(PrfaasError):
    """A configuration is wrong; the message names the path of the field and the accepted values."""

    reason = "config"


class UnsupportedEngine(PrfaasError):
    """The installed SGLang is not one that this release was tested with."""

    reason = "unsupported_engine"


class LocalProtocolError(PrfaasError):
    """Our own side broke a protocol: a bug here."""

    reason = "local_protocol"


class RemoteProtocolError(PrfaasError):
    """The peer broke a protocol: close the connection, count it, resynchronise."""

    reason = "remote_protocol"


class Rejected(PrfaasError):
    """Admission said no; `retry_after_s` says when to come back."""

    reason = "rejected"

    def __init__(self, message: str, *, retry_after_s: float, **context: object) -> None:
        super().__init__(message, reason=None, **context)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(PrfaasError):
    """A bounded wait ran out."""

    retryable = True
    reason = "deadline"


class Unavailable(PrfaasError):
    """Something needed is not reachable now; another route may be."""

    retryable = True
    reason = "unavailable"


class IndexUnavailable(Unavailable):
    """The prefix index did not answer: route with no match."""

    reason = "index_unavailable"


class WorkerUnavailable(Unavailable):
    """A worker refused or dropped the request before any token was produced."""

    reason = "worker_unavailable"


class TransferError(PrfaasError):
    """A KV transfer failed; the request can be prefilled again elsewhere."""

    retryable = True
    reason = "transfer"


class IntegrityError(TransferError):
    """Received bytes do not match their checksum: never retried on the same bytes."""

    reason = "integrity"
