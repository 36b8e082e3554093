"""How to reach etcd: checked once, before anything is opened."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from cache_service.core.addresses import split_address
from cache_service.core.errors import ConfigError
from cache_service.etcd.core.txn import MAX_REQUEST_BYTES


@dataclass(frozen=True, slots=True)
class TlsPaths:
    """PEM files: the authority of the members' certificates; our certificate and key, both or neither.

    `server_name` replaces the host name that the members' certificates are checked against.
    """

    ca: str
    cert: str = ""
    key: str = ""
    server_name: str = ""

    def __post_init__(self) -> None:
        if bool(self.cert) != bool(self.key):
            raise ConfigError("etcd.tls: cert and key go together: give both or neither")
        for name in ("ca", "cert", "key"):
            path = getattr(self, name)
            if path and not Path(path).is_file():
                raise ConfigError(f"etcd.tls.{name}: {path} is not a file")


@dataclass(frozen=True, slots=True)
class EtcdConfig:
    """Endpoints and limits of a client. Times in seconds, sizes in bytes.

    A call may take `timeout_s` in all and `attempt_s` per endpoint; so one member that hangs costs
    `attempt_s`.
    """

    endpoints: tuple[str, ...]
    tls: TlsPaths | None = None
    user: str = ""
    password: str = field(default="", repr=False)
    timeout_s: float = 5.0
    attempt_s: float = 1.5
    #: Pings on a connection with calls in flight; etcd refuses more than one per 5 s.
    keepalive_s: float = 10.0
    keepalive_timeout_s: float = 3.0
    max_message_bytes: int = 16 << 20
    max_request_bytes: int = MAX_REQUEST_BYTES
    page_bytes: int = 2 << 20
    page_keys: int = 10_000

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise ConfigError("etcd.endpoints: empty; give at least one host:port")
        for index, endpoint in enumerate(self.endpoints):
            split_address(endpoint, field=f"etcd.endpoints[{index}]")
        if len(set(self.endpoints)) != len(self.endpoints):
            raise ConfigError("etcd.endpoints: one is named twice")
        for name in ("timeout_s", "attempt_s", "keepalive_timeout_s", "page_bytes", "page_keys"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"etcd.{name}: {getattr(self, name)} is not above 0")
        if self.keepalive_s < 5:
            raise ConfigError(
                f"etcd.keepalive_s: {self.keepalive_s} is below 5, which etcd answers by hanging up"
            )
        if self.max_message_bytes < 2 * self.page_bytes or self.max_message_bytes < 4 << 20:
            raise ConfigError("etcd.max_message_bytes: not at least 4 MiB and twice etcd.page_bytes")
        self._check_login()

    def _check_login(self) -> None:
        if bool(self.user) != bool(self.password):
            raise ConfigError("etcd.user and etcd.password go together: give both or neither")
        if self.user and self.tls is None and not all(_is_loopback(e) for e in self.endpoints):
            raise ConfigError("etcd.password: not sent without etcd.tls, except to this machine")


def _is_loopback(endpoint: str) -> bool:
    host, _ = split_address(endpoint, field="etcd.endpoints")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
