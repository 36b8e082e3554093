"""host:port, parsed in one place."""

from __future__ import annotations

import re

from cache_service.core.errors import ConfigError

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")


def split_address(text: str, *, field: str) -> tuple[str, int]:
    """Return host and port of "host:port" or "[v6]:port". Raises ConfigError naming `field`."""
    found = _ADDRESS.fullmatch(text)
    if not found or int(found[2]) > 65535:
        raise ConfigError(f"{field}: {text!r} is not host:port, such as 127.0.0.1:8000 or [::1]:8000")
    return found[1].strip("[]"), int(found[2])
