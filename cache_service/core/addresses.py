"""host:port, parsed in one place, and the rule for where plain TCP may go."""

from __future__ import annotations

import ipaddress
import re

from cache_service.core.errors import ConfigError

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")


def split_address(text: str, *, field: str) -> tuple[str, int]:
    """Return host and port of "host:port" or "[v6]:port". Raises ConfigError naming `field`."""
    found = _ADDRESS.fullmatch(text)
    if not found or int(found[2]) > 65535:
        raise ConfigError(f"{field}: {text!r} is not host:port, such as 127.0.0.1:8000 or [::1]:8000")
    return found[1].strip("[]"), int(found[2])


def check_plain(field: str, address: str, *, tls: bool, insecure: bool) -> None:
    """Raise ConfigError unless `address` is loopback, or exactly one of `tls` and `insecure` is given."""
    if tls and insecure:
        raise ConfigError(f"{field}: both tls and insecure: true are given; give one")
    host, _ = split_address(address, field=field)
    if not tls and not insecure and not is_loopback(host):
        raise ConfigError(
            f"{field}: {address} is not loopback: give tls {{ca, cert, key}}, or insecure: true, which lets "
            "anyone on the way read and answer"
        )


def is_loopback(host: str) -> bool:
    """Say whether a host is this machine's loopback, by its form alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
