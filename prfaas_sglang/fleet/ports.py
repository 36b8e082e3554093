"""Ports of a fleet: fixed ones are checked before anything starts, the others chosen among the free ones."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass, field

import psutil

from cache_service.core.errors import ConfigError


@dataclass(slots=True)
class PortPlan:
    """Hands out ports and keeps them bound until `release`, so that no two processes get the same one."""

    _held: list[socket.socket] = field(default_factory=list)

    def claim(self, name: str, host: str, port: int) -> int:
        """Return `port`, or a free one when it is 0; `name` is the fleet file's field.

        Raises ConfigError when the port is taken (naming the process, where the system tells) or the host is
        not an address of this machine.
        """
        try:
            info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            held = socket.socket(info[0], socket.SOCK_STREAM)
        except OSError as error:
            raise ConfigError(f"{name}: cannot resolve host {host!r}: {error}") from error
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind(info[4])
            if port:
                held.listen(1)  # with SO_REUSEADDR a bind alone may succeed beside a listener
        except OSError as error:
            held.close()
            owner = owner_of(port) if port else ""
            raise ConfigError(f"{name}: cannot listen on {host}:{port}: {error.strerror}{owner}") from error
        self._held.append(held)
        return int(held.getsockname()[1])

    def release(self) -> None:
        """Free every held port for the processes that are to listen on them."""
        for held in self._held:
            held.close()
        self._held.clear()


def owner_of(port: int) -> str:
    """Return " (used by NAME, pid N)" for a local listening port, "" when the system does not tell."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                if connection.pid is None:
                    return ""
                return f" (used by {psutil.Process(connection.pid).name()}, pid {connection.pid})"
    return ""
