"""Ports of a fleet: fixed ones are checked before anything starts, the others chosen among the free ones.

Chosen ports lie outside the range from which the kernel takes the ports of outgoing connections and of
listeners on port 0 (ip_local_port_range, ip(7)), so that none sits on one before its process listens.
"""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Collection, Iterator
from pathlib import Path

import psutil

from cache_service.core.errors import ConfigError

LOWEST = 10240
ATTEMPTS = 200
_OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")


class PortPlan:
    """Hands out ports and keeps them bound until `release`, so that no two processes get the same one.

    Args:
        reserved: ports never to choose, because they will be claimed by number.
    """

    def __init__(self, reserved: Collection[int] = ()) -> None:
        self._reserved = frozenset(reserved)
        self._held: list[tuple[str, socket.socket]] = []

    def claim(self, name: str, host: str, port: int) -> int:
        """Return `port`, or a free one when it is 0; `name` is the fleet file's field.

        Raises ConfigError when the port is taken (naming the process, where the system tells) or the host is
        not an address of this machine.
        """
        try:
            family, _, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
        except OSError as error:
            raise ConfigError(f"{name}: cannot resolve host {host!r}: {error}") from error
        try:
            held = self._fixed(family, address[0], port) if port else self._free(family, address[0])
        except OSError as error:
            owner = owner_of(port) if port else ""
            raise ConfigError(f"{name}: cannot listen on {host}:{port}: {error.strerror}{owner}") from error
        self._held.append((name, held))
        return int(held.getsockname()[1])

    def release(self, prefix: str = "") -> None:
        """Free the held ports of the fields that start with `prefix`, just before their processes start."""
        for name, held in self._held:
            if name.startswith(prefix):
                held.close()
        self._held = [(name, held) for name, held in self._held if not name.startswith(prefix)]

    @staticmethod
    def _fixed(family: int, host: str | int, port: int) -> socket.socket:
        # As a server would: a listener that ended a moment ago is no obstacle, one that lives is.
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen(1)
        return _bound(family, host, port, reuse=True)

    def _free(self, family: int, host: str | int) -> socket.socket:
        for port in _candidates():
            if port not in self._reserved:
                with contextlib.suppress(OSError):
                    return _bound(family, host, port, reuse=False)
        return _bound(family, host, 0, reuse=False)


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port of `host` that was free a moment ago, and that the kernel gives to nobody meanwhile."""
    plan = PortPlan()
    try:
        return plan.claim("port", host, 0)
    finally:
        plan.release()


def _bound(family: int, host: str | int, port: int, *, reuse: bool) -> socket.socket:
    held = socket.socket(family, socket.SOCK_STREAM)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(reuse))
        held.bind((host, port))
    except OSError:
        held.close()
        raise
    return held


def _candidates() -> Iterator[int]:
    """Yield random ports below those of outgoing connections, none where that range starts too low."""
    try:
        highest = int(_OUTGOING.read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return
    if highest - LOWEST >= ATTEMPTS:
        yield from (random.randrange(LOWEST, highest) for _ in range(ATTEMPTS))


def owner_of(port: int) -> str:
    """Return " (used by NAME, pid N)" for a local listening port, "" when the system does not tell."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                if connection.pid is None:
                    return ""
                return f" (used by {psutil.Process(connection.pid).name()}, pid {connection.pid})"
    return ""
