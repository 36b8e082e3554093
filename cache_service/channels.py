"""gRPC channels and listening ports, encrypted or not: one rule for every side.

Decides what certificate a peer must have: one of the same authority, both ways. It must not know what is
asked over a channel, nor when plain TCP is allowed (core/addresses.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from cache_service.core.errors import ConfigError
from cache_service.wire.codec import MAX_MESSAGE_BYTES

_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # A peer that vanished without closing is noticed within these; the deadline covers each call meanwhile.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.enable_http_proxy", 0),
]


@dataclass(frozen=True, slots=True)
class Encryption:
    """PEM files of mutual TLS: the authority that the other side must have, our certificate and its key.

    `server_name` is the name expected in the service's certificate when it is not the address that is dialed.
    """

    ca: str
    cert: str
    key: str
    server_name: str = ""

    def server(self) -> grpc.ServerCredentials:
        """Return what listens: only clients with a certificate of `ca`. Raises ConfigError."""
        ca, cert, key = self._read()
        return grpc.ssl_server_credentials([(key, cert)], root_certificates=ca, require_client_auth=True)

    def client(self) -> grpc.ChannelCredentials:
        """Return what dials. Raises ConfigError."""
        ca, cert, key = self._read()
        return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)

    def _read(self) -> tuple[bytes, bytes, bytes]:
        found = []
        for field in ("ca", "cert", "key"):
            path = getattr(self, field)
            if not path:
                raise ConfigError(f"tls.{field}: is missing; mutual TLS needs ca, cert and key (PEM files)")
            try:
                data = Path(path).read_bytes()
            except OSError as error:
                raise ConfigError(f"tls.{field}: {path} cannot be read: {error.strerror}") from error
            if b"-----BEGIN " not in data:
                raise ConfigError(f"tls.{field}: {path} is not a PEM file")
            found.append(data)
        return found[0], found[1], found[2]


def open_channel(
    address: str, encryption: Encryption | None, *, name: str = "", most_bytes: int = MAX_MESSAGE_BYTES
) -> grpc.aio.Channel:
    """Dial `address` (in the background); `name` is what its certificate must have, by default its host.

    `most_bytes` bounds a message. Call it inside the running event loop. Raises ConfigError for files that
    cannot be used.
    """
    options = [
        ("grpc.max_receive_message_length", most_bytes),
        ("grpc.max_send_message_length", most_bytes),
        *_OPTIONS,
    ]
    if encryption is None:
        return grpc.aio.insecure_channel(address, options=options)
    if expected := encryption.server_name or name:
        options.append(("grpc.ssl_target_name_override", expected))
    return grpc.aio.secure_channel(address, encryption.client(), options=options)
