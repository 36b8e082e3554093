"""What the streams of the three formats cost: batches of each, decoded and applied as the service does it."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import msgspec

from benchmarks.index.subjects import BUDGET_BYTES, PAGE_TOKENS, block_hash
from cache_service import native
from cache_service.core.events import BlocksRemoved, BlocksStored
from cache_service.core.ids import BlockHash, SourceId, WorkerId
from cache_service.core.index import PrefixIndex
from cache_service.core.index_protocol import BlockIndex
from cache_service.native.index import NativeIndex
from cache_service.wire import formats, worker_events

RUN = 512
FORMATS: tuple[formats.Format, ...] = ("prfaas", "sglang", "vllm")
CORES: dict[str, Callable[[], BlockIndex]] = {
    "native": lambda: NativeIndex(budget_bytes=BUDGET_BYTES),
    "python": lambda: PrefixIndex(budget_bytes=BUDGET_BYTES),
}
_WORKER = SourceId(WorkerId("worker"))


def payloads(format: formats.Format, first: int) -> tuple[bytes, bytes]:
    """Return batches that store a run of `RUN` blocks, and remove it from its end."""
    run = tuple(BlockHash(block_hash(n)) for n in range(first, first + RUN))
    if format == "prfaas":
        events = (BlocksStored(run, None), BlocksRemoved(run[::-1]))
        return worker_events.encode_batch(1.5, 0, events[:1]), worker_events.encode_batch(1.5, 0, events[1:])
    tokens = [block_hash(n) % 150_000 for n in range(first, first + RUN) for _ in range(PAGE_TOKENS)]
    stored = {
        "type": "BlockStored",
        "block_hashes": run,
        "parent_block_hash": None,
        "token_ids": tokens,
        "block_size": PAGE_TOKENS,
        "medium": "GPU",
    }
    removed = {"type": "BlockRemoved", "block_hashes": run[::-1], "medium": "GPU"}
    encode = msgspec.msgpack.encode
    return encode([1.5, [stored], 0]), encode([1.5, [removed], 0])


def blocks_per_s(format: formats.Format, core: str, runs: int, rounds: int) -> tuple[float, float]:
    """Return how many blocks a second are stored, and removed; medians."""
    batches = [payloads(format, number * 1000) for number in range(runs)]
    rates: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        index = CORES[core]()
        index.add(_WORKER)
        reader = formats.reader(format, page_size=PAGE_TOKENS, dp_rank=0)
        for kind in (0, 1):
            begun = time.perf_counter()
            for pair in batches:
                _take(index, reader, format, pair[kind])
            rates[kind].append(runs * RUN / (time.perf_counter() - begun))
            held = index.held_blocks(_WORKER)
            assert held == (0 if kind else runs * RUN), "the events did not arrive"
    return median(rates[0]), median(rates[1])


def _take(index: BlockIndex, reader: formats.Reader | None, format: formats.Format, payload: bytes) -> None:
    if reader is None:
        kind = "prfaas" if format == "prfaas" else "sglang"
        batch = native.decode_batch(index, payload, page_size=PAGE_TOKENS, dp_rank=0, format=kind)
        for _ in native.apply_batch(index, _WORKER, batch):
            pass
        return
    events, refused = reader.core_events(reader.decode(payload))
    assert not refused, refused
    for event in events:
        index.apply(_WORKER, event)
