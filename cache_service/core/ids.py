"""Names of things, as distinct types, parsed in one place.

A site is a datacenter; a worker is one SGLang server; a (worker, dp rank) publishes one event stream.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NewType

from cache_service.core.errors import ConfigError

SiteId = NewType("SiteId", str)
WorkerId = NewType("WorkerId", str)

#: Signed 64-bit prefix of SGLang's chained page hash, as its KV events carry it.
BlockHash = NewType("BlockHash", int)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def parse_name(text: str, *, field: str) -> str:
    """Return `text` if it can name a site or a worker (it becomes a metric label and a file name).

    Raises ConfigError naming `field` otherwise.
    """
    if not isinstance(text, str) or not _NAME.fullmatch(text):
        raise ConfigError(
            f"{field}: {text!r} is not a name; use 1-63 letters, digits, '.', '_' or '-', "
            "starting with a letter or digit"
        )
    return text


@dataclass(frozen=True, slots=True, order=True)
class SourceId:
    """One publisher of KV events: a worker's data-parallel rank."""

    worker_id: WorkerId
    dp_rank: int = 0


@dataclass(frozen=True, slots=True)
class Namespace:
    """Only equal namespaces may share KV.

    Attributes:
        model: served model name.
        revision: checkpoint revision, "" when not versioned.
        page_size: tokens per page (= per block).
        kv_dtype: KV cache dtype as the engine names it, "" for the model's own.
        layout: fingerprint of the engine's pool layout, "" when not known.
        lora: adapter name, "" for none.
        salt: tenant cache salt, "" for none.
    """

    model: str
    page_size: int
    revision: str = ""
    kv_dtype: str = ""
    layout: str = ""
    lora: str = ""
    salt: str = ""

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("namespace.model: is empty; give the served model name")
        if not 1 <= self.page_size <= 65536:
            raise ConfigError(f"namespace.page_size: {self.page_size} is not in 1..65536")
