"""The event streams that a service reads, behind one face: who wrote a batch decides how it is read.

SGLang's batches and our plugin's the index decodes itself (cache_service/native). Others are decoded when
they arrive and turned into core events when they are applied: vLLM's blocks have our names only in the order
of its stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from cache_service.core.errors import RemoteProtocolError
from cache_service.core.events import Event
from cache_service.wire import vllm_events
from cache_service.wire.kv_events import Batch

#: sglang: SGLang's own KV events. prfaas: our plugin's stream, with states, windows and dumps. vllm: vLLM's.
Format = Literal["sglang", "prfaas", "vllm"]


class Reader(Protocol):
    """Reads the batches of one stream."""

    def decode(self, payload: bytes) -> Batch[Any]:
        """Decode a batch, whatever its place in the order. Raises RemoteProtocolError."""

    def core_events(self, batch: Batch[Any]) -> tuple[Sequence[Event], Sequence[RemoteProtocolError]]:
        """Return the events of the batch that is next in order, and what was wrong with others."""

    def forget(self) -> None:
        """Start over: the worker's blocks were dropped."""


def reader(format: Format, *, page_size: int, dp_rank: int) -> Reader | None:
    """Return a reader of one stream; None for those whose batches the index decodes itself."""
    return _Vllm(page_size, dp_rank) if format == "vllm" else None


class _Vllm:
    def __init__(self, page_size: int, dp_rank: int) -> None:
        self._dp_rank = dp_rank
        self._blocks = vllm_events.VllmBlocks(page_size)

    def decode(self, payload: bytes) -> Batch[Any]:
        return vllm_events.decode_batch(payload, dp_rank=self._dp_rank)

    def core_events(self, batch: Batch[Any]) -> tuple[Sequence[Event], Sequence[RemoteProtocolError]]:
        usable, refused = self._blocks.translate(batch.events)
        return usable, (*batch.refused, *refused)

    def forget(self) -> None:
        self._blocks.forget()
