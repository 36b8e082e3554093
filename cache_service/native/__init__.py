"""Which core keeps the prefix index: C++ where it was compiled, else Python. Both answer the same.

`PRFAAS_INDEX=python|native|auto` chooses; auto, the default, takes what there is.
"""

from __future__ import annotations

import os

from cache_service.core.errors import ConfigError
from cache_service.core.index import PrefixIndex
from cache_service.core.index_protocol import BlockIndex

try:
    from cache_service.native.index import NativeIndex, decode_batch
except ImportError as _error:
    #: Why the native core cannot run here; None when it can.
    missing: str | None = str(_error)
else:
    missing = None

VARIABLE = "PRFAAS_INDEX"
_CHOICES = ("python", "native", "auto")


def core_name() -> str:
    """Return which core `make_index` makes: native or python.

    Raises ConfigError for another choice, or when native is asked for and was not compiled.
    """
    choice = os.environ.get(VARIABLE, "") or "auto"
    if choice not in _CHOICES:
        raise ConfigError(f"{VARIABLE}: {choice!r} is not one of {', '.join(_CHOICES)}")
    if choice == "auto":
        return "python" if missing else "native"
    if choice == "native" and missing:
        raise ConfigError(f"{VARIABLE}: native, but it is not compiled here: {missing}")
    return choice


def make_index(*, budget_bytes: int = 0) -> BlockIndex:
    """Return an empty index of the chosen core. Raises ConfigError as `core_name` does."""
    if core_name() == "native":
        return NativeIndex(budget_bytes=budget_bytes)
    return PrefixIndex(budget_bytes=budget_bytes)


__all__ = ["VARIABLE", "NativeIndex", "core_name", "decode_batch", "make_index", "missing"]
