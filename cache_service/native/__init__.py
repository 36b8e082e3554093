"""Which core keeps the prefix index: C++ where it was compiled, else Python. Both answer the same.

`PRFAAS_INDEX=python|native|auto` chooses; auto, the default, takes what there is. Batches of KV events go
into the native core as C++ decodes them; one that it cannot take whole is decoded in Python, which says why.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial

from cache_service.core.errors import ConfigError
from cache_service.core.events import Event
from cache_service.core.ids import SourceId
from cache_service.core.index import PrefixIndex
from cache_service.core.index_protocol import BlockIndex
from cache_service.core.index_types import Applied
from cache_service.native import index as native
from cache_service.native.index import DecodedBatch, NativeFormat, NativeIndex
from cache_service.wire import kv_events, worker_events
from cache_service.wire.worker_events import DumpPage

VARIABLE = "PRFAAS_INDEX"
_CHOICES = ("python", "native", "auto")

__all__ = [
    "AnyBatch",
    "DecodedBatch",
    "NativeFormat",
    "apply_batch",
    "core_name",
    "decode_batch",
    "decode_page",
    "make_index",
]

AnyBatch = kv_events.Batch[Event] | DecodedBatch


def core_name() -> str:
    """Return which core `make_index` makes: native or python.

    Raises ConfigError for another choice, or when native is asked for and was not compiled.
    """
    choice = os.environ.get(VARIABLE, "") or "auto"
    if choice not in _CHOICES:
        raise ConfigError(f"{VARIABLE}: {choice!r} is not one of {', '.join(_CHOICES)}")
    if choice == "auto":
        return "python" if native.missing else "native"
    if choice == "native" and native.missing:
        raise ConfigError(f"{VARIABLE}: native, but it is not compiled here: {native.missing}")
    return choice


def make_index(*, budget_bytes: int = 0) -> BlockIndex:
    """Return an empty index of the chosen core. Raises ConfigError as `core_name` does."""
    if core_name() == "native":
        return NativeIndex(budget_bytes=budget_bytes)
    return PrefixIndex(budget_bytes=budget_bytes)


def decode_batch(
    index: BlockIndex, payload: bytes, *, page_size: int, dp_rank: int, format: NativeFormat = "sglang"
) -> AnyBatch:
    """Decode one batch of the source with `dp_rank`, for `apply_batch` of the same index.

    Raises RemoteProtocolError when the payload is no batch, or one of another data-parallel rank.
    """
    if isinstance(index, NativeIndex):
        plain = native.decode_batch(payload, page_size=page_size, dp_rank=dp_rank, format=format)
        if plain is not None:
            return plain
    if format == "prfaas":
        return worker_events.decode_batch(payload, page_size=page_size, dp_rank=dp_rank)
    return kv_events.decode_batch(payload, page_size=page_size, dp_rank=dp_rank)


def decode_page(index: BlockIndex, payload: bytes, *, page_size: int) -> DumpPage[AnyBatch]:
    """Decode a page of a plugin's dump, its batch for `apply_batch` of the same index.

    Raises RemoteProtocolError when the payload is no page.
    """
    if isinstance(index, NativeIndex):
        plain = native.decode_page(payload, page_size=page_size)
        if plain is not None:
            return plain
    return worker_events.decode_page(payload, page_size=page_size)


def apply_batch(
    index: BlockIndex, source: SourceId, batch: AnyBatch
) -> Iterator[tuple[Applied, Callable[[], Event]]]:
    """Apply the usable events of a batch in order; yield what each changed, and how to get it as a value."""
    if isinstance(batch, DecodedBatch):
        assert isinstance(index, NativeIndex), "the batch was decoded for another index"
        for position, applied in enumerate(index.apply_decoded(source, batch)):
            yield applied, partial(batch.event, position)
        return
    for event in batch.events:
        yield index.apply(source, event), lambda event=event: event  # type: ignore[misc]
