"""The indexes that are compared, behind one face: event bytes in, {worker: depth} out.

Ours take the batches that SGLang publishes, token ids included; the RadixTree of ai-dynamo-runtime takes its
own JSON events, which carry none. A query is what each is asked with by its router: chained block hashes, or
the blocks' local hashes. Dynamo's package is installed on first use below .cache/peers, itself alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from benchmarks.transfer.peers import HOME, Missing, command
from cache_service.config import CacheConfig
from cache_service.core.ids import SourceId, WorkerId
from cache_service.core.index import PrefixIndex
from cache_service.native.index import NativeIndex, missing
from cache_service.native.index import decode_batch as decode_native
from cache_service.wire.kv_events import decode_batch

PAGE_TOKENS = 16
#: Ours keep the budget that the service has by default.
BUDGET_BYTES: int = next(
    field.default for field in msgspec.structs.fields(CacheConfig) if field.name == "index_budget_bytes"
)
PACKAGE = "ai-dynamo-runtime==1.6.1"
_MASK = (1 << 64) - 1


def block_hash(number: int) -> int:
    """Return a hash that looks like SGLang's: signed 64-bit, no pattern."""
    mixed = (number + 1) * 0x9E3779B97F4A7C15 & _MASK
    mixed = (mixed ^ mixed >> 31) * 0xBF58476D1CE4E5B9 & _MASK
    mixed ^= mixed >> 29
    return mixed - (1 << 64) if mixed >> 63 else mixed


class Subject(Protocol):
    """One index. A run is consecutive block numbers, below block `parent`, or nothing."""

    name: str

    def clear(self, workers: int) -> None:
        """Start with an empty index of so many workers."""

    def stored(self, run: Sequence[int], parent: int | None = None) -> bytes:
        """Return the event that stores a run."""

    def removed(self, run: Sequence[int]) -> bytes:
        """Return the event that removes a run, its last block first."""

    def feed(self, worker: int, payload: bytes) -> None:
        """Apply an event."""

    def query(self, run: Sequence[int]) -> Sequence[int]:
        """Return the query for a run."""

    def match(self, query: Sequence[int]) -> Any:
        """Return the answer as Python values, as the subject gives it."""

    def depths(self, answer: Any) -> dict[int, int]:
        """Return an answer as {worker: depth}."""


class _Ours:
    name: str
    _index: Any

    def __init__(self) -> None:
        self._workers: list[SourceId] = []
        self._number: dict[SourceId, int] = {}

    @property
    def bytes_estimate(self) -> int:
        """What the index says that it takes."""
        return self._index.bytes_estimate

    def _register(self, index: Any, workers: int) -> None:
        self._workers = [SourceId(WorkerId(f"worker-{i:03}")) for i in range(workers)]
        self._number = {source: i for i, source in enumerate(self._workers)}
        for source in self._workers:
            index.add(source)

    def stored(self, run: Sequence[int], parent: int | None = None) -> bytes:
        event = {
            "type": "BlockStored",
            "block_hashes": [block_hash(n) for n in run],
            "parent_block_hash": None if parent is None else block_hash(parent),
            "token_ids": [block_hash(n) % 150_000 for n in run for _ in range(PAGE_TOKENS)],
            "block_size": PAGE_TOKENS,
            "lora_id": None,
            "medium": "GPU",
        }
        return msgspec.msgpack.encode([1.5, [event], 0])

    def removed(self, run: Sequence[int]) -> bytes:
        hashes = [block_hash(n) for n in reversed(run)]
        return msgspec.msgpack.encode([1.5, [{"type": "BlockRemoved", "block_hashes": hashes}], 0])

    def query(self, run: Sequence[int]) -> Sequence[int]:
        return tuple(block_hash(n) for n in run)

    def depths(self, answer: Any) -> dict[int, int]:
        return {self._number[match.source]: match.matched for match in answer}


class Python(_Ours):
    """The Python core with the Python decoder."""

    name = "python"

    def clear(self, workers: int) -> None:
        self._index = PrefixIndex(budget_bytes=BUDGET_BYTES)
        self._register(self._index, workers)
        self.match: Any = self._index.match

    def feed(self, worker: int, payload: bytes) -> None:
        for event in decode_batch(payload, page_size=PAGE_TOKENS, dp_rank=0).events:
            self._index.apply(self._workers[worker], event)


class Native(_Ours):
    """The C++ core with its decoder."""

    name = "native"

    def __init__(self) -> None:
        if missing:
            raise Missing(f"the native index is not compiled: {missing}")
        super().__init__()

    def clear(self, workers: int) -> None:
        self._index = NativeIndex(budget_bytes=BUDGET_BYTES)
        self._register(self._index, workers)
        self.match: Any = self._index.match

    def feed(self, worker: int, payload: bytes) -> None:
        batch = decode_native(payload, page_size=PAGE_TOKENS, dp_rank=0)
        assert batch is not None, "not plain"
        self._index.apply_decoded(self._workers[worker], batch)


class Dynamo:
    """RadixTree through its Python binding. `match` reads the scores too, or they stay in Rust."""

    name = "RadixTree (Dynamo)"

    def __init__(self) -> None:
        folder = HOME / "dynamo-binding"
        stamp = folder / "installed"
        if not stamp.exists() or stamp.read_text() != PACKAGE:
            pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
            command(*pip, "--no-deps", "--upgrade", "--target", str(folder), PACKAGE)
            stamp.write_text(PACKAGE)
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
        try:
            from dynamo._core import RadixTree
        except ImportError as error:
            raise Missing(f"{PACKAGE}: {error}") from error
        self._make: Any = RadixTree

    def clear(self, workers: int) -> None:
        self._tree = self._make()

    def stored(self, run: Sequence[int], parent: int | None = None) -> bytes:
        blocks = [{"block_hash": block_hash(n) & _MASK, "tokens_hash": block_hash(~n) & _MASK} for n in run]
        above = None if parent is None else block_hash(parent) & _MASK
        return self._event({"stored": {"parent_hash": above, "blocks": blocks}})

    def removed(self, run: Sequence[int]) -> bytes:
        return self._event({"removed": {"block_hashes": [block_hash(n) & _MASK for n in reversed(run)]}})

    def feed(self, worker: int, payload: bytes) -> None:
        self._tree.apply_event(worker, payload)

    def query(self, run: Sequence[int]) -> Sequence[int]:
        return [block_hash(~n) & _MASK for n in run]

    def match(self, query: Sequence[int]) -> Any:
        return self._tree.find_matches(query).scores

    def find(self, query: Sequence[int]) -> Any:
        """Match without reading the scores."""
        return self._tree.find_matches(query)

    def depths(self, answer: Any) -> dict[int, int]:
        return {worker: depth for (worker, _rank), depth in answer.items()}

    def _event(self, data: object) -> bytes:
        return json.dumps({"event_id": 0, "data": data, "dp_rank": 0}).encode()
