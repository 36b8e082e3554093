"""PRFAAS_CONFIG: what one SGLang worker needs to know to export or import KV.

The variable holds JSON, or `@/path/to/file.json`; SGLang's child processes inherit it. Unset means that the
plugin does nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from cache_service.core.addresses import split_address
from cache_service.core.errors import ConfigError
from cache_service.core.ids import parse_name

ENVIRONMENT_VARIABLE = "PRFAAS_CONFIG"

_ADDRESS = re.compile(r"tcp://[^:/\s]+:\d{1,5}|tcp://\[[0-9A-Fa-f:]+\]:\d{1,5}|ipc://\S+")


class TlsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """PEM files: authority of the peers, own certificate chain, own key. Never logged."""

    ca: str
    cert: str
    key: str


class StateEventsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a worker says what its cache holds (docs/kv-events.md); needs SGLang's --kv-events-config.

    Attributes:
        endpoint: address that the event stream is bound to, such as tcp://*:5559.
        replay_endpoint: address that replays and full dumps are asked from.
        ring_batches: batches kept for replay; who misses more asks for a dump.
    """

    endpoint: str
    replay_endpoint: str
    ring_batches: int = 10_000

    def check(self, field: str) -> None:
        """Raise ConfigError naming the first field below `field` that is wrong."""
        for name in ("endpoint", "replay_endpoint"):
            value = getattr(self, name)
            if not _ADDRESS.fullmatch(value):
                raise ConfigError(
                    f"{field}.{name}: {value!r} is not an address to bind, such as tcp://*:5559 or ipc:///path"
                )
        if self.endpoint == self.replay_endpoint:
            raise ConfigError(f"{field}.replay_endpoint: {self.endpoint!r} is also `endpoint`")
        if not 1 <= self.ring_batches <= 1_000_000:
            raise ConfigError(f"{field}.ring_batches: {self.ring_batches} is not in 1..1000000")


class WorkerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Configuration of one worker's transfer backend.

    Attributes:
        worker_id: name of this worker, unique in the fleet.
        site: datacenter it stands in.
        listen_host: address on which a prefill worker accepts decode workers; the port is SGLang's own
            --disaggregation-bootstrap-port (plus the tensor-parallel rank).
        telemetry_listen: host:port for GET /metrics and /transfers, "" for none. Rank 0 only.
        frame_bytes: bytes of KV per frame, 4 KiB to 4 MiB.
        staging_bytes: host memory in which a prefill worker keeps KV that is computed and not yet delivered,
            so that its pages and its answer wait for neither the decode worker nor the link; 0 for none.
            Taken from the system as it is used.
        layerwise: a prefill worker sends a layer's KV while the later layers of the same chunk are computed
            (needs staging memory).
        connections: TCP connections that a decode worker opens to each prefill rank, 1 to 64.
        tls: mutual TLS on the data connections.
        insecure: True sends KV over plain TCP instead, readable and writable by anyone on the way. Exactly
            one of `tls` and `insecure` is given, so that plain TCP is nobody's accident.
        peer_sites: sites whose workers this one exchanges KV with; empty for any. With `tls` the peer's
            certificate proves its site, without it the peer's word is taken.
        compression: what may be done to KV on the wire, on both sides: "lossless" compresses while that is
            faster than the link, "fp8" also rounds KV to 8 bits (not the linear state), "none" does nothing.
        state_events: the stream for a cache service that knows states and windows; None for no such stream.
    """

    worker_id: str
    site: str
    listen_host: str = "0.0.0.0"
    telemetry_listen: str = ""
    frame_bytes: int = 256 << 10
    staging_bytes: int = 1 << 30
    layerwise: bool = False
    connections: int = 2
    tls: TlsConfig | None = None
    insecure: bool = False
    peer_sites: tuple[str, ...] = ()
    compression: Literal["none", "lossless", "fp8"] = "lossless"
    state_events: StateEventsConfig | None = None

    def check(self) -> None:
        """Raise ConfigError naming the first field that is wrong."""
        parse_name(self.worker_id, field=f"{ENVIRONMENT_VARIABLE}.worker_id")
        parse_name(self.site, field=f"{ENVIRONMENT_VARIABLE}.site")
        if self.telemetry_listen:
            split_address(self.telemetry_listen, field=f"{ENVIRONMENT_VARIABLE}.telemetry_listen")
        if not 4 << 10 <= self.frame_bytes <= 4 << 20:
            raise ConfigError(
                f"{ENVIRONMENT_VARIABLE}.frame_bytes: {self.frame_bytes} is not in 4096..4194304"
            )
        if not 0 <= self.staging_bytes <= 1 << 42:
            raise ConfigError(
                f"{ENVIRONMENT_VARIABLE}.staging_bytes: {self.staging_bytes} is not in 0..{1 << 42}"
            )
        if self.layerwise and not self.staging_bytes:
            raise ConfigError(f"{ENVIRONMENT_VARIABLE}.layerwise: needs staging_bytes above 0")
        if not 1 <= self.connections <= 64:
            raise ConfigError(f"{ENVIRONMENT_VARIABLE}.connections: {self.connections} is not in 1..64")
        for site in self.peer_sites:
            parse_name(site, field=f"{ENVIRONMENT_VARIABLE}.peer_sites")
        if self.state_events is not None:
            self.state_events.check(f"{ENVIRONMENT_VARIABLE}.state_events")
        check_encryption(
            ENVIRONMENT_VARIABLE, "{ca, cert, key}", tls=self.tls is not None, insecure=self.insecure
        )


def check_encryption(field: str, tls_values: str, *, tls: bool, insecure: bool) -> None:
    """Raise ConfigError unless exactly one of `tls` and `insecure` is given."""
    if tls == insecure:
        found = "both are" if tls else "neither is"
        raise ConfigError(
            f"{field}: give either tls: {tls_values}, which encrypts KV and authenticates both sides, or "
            f"insecure: true, which sends it over plain TCP; {found} given"
        )


def load(environment: Mapping[str, str] = os.environ) -> WorkerConfig | None:
    """Return the configuration, None when the variable is unset or empty.

    Raises ConfigError naming the field and what is accepted.
    """
    text = environment.get(ENVIRONMENT_VARIABLE, "").strip()
    if not text:
        return None
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{ENVIRONMENT_VARIABLE}: cannot read {text[1:]}: {error.strerror}") from error
    try:
        config = msgspec.json.decode(text.encode(), type=WorkerConfig)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{ENVIRONMENT_VARIABLE}: {error}") from error
    config.check()
    return config
