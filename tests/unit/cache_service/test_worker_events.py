"""The plugin's stream: what is encoded is what is decoded, and nothing else does any harm."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_service.core.errors import RemoteProtocolError
from cache_service.core.events import (
    AllCleared,
    BlocksRemoved,
    BlocksStored,
    Group,
    GroupRemoved,
    GroupStored,
    Tier,
)
from cache_service.core.ids import BlockHash
from cache_service.core.index_types import Needs
from cache_service.wire import worker_events
from cache_service.wire.worker_events import Declaration, decode_batch, decode_page, encode_batch, encode_dump

INT64 = st.integers(-(2**63), 2**63 - 1)
HASHES = st.lists(INT64, min_size=1, max_size=5, unique=True).map(lambda h: tuple(map(BlockHash, h)))
TIERS = st.sampled_from(Tier)
EVENTS = st.one_of(
    st.builds(BlocksStored, HASHES, st.none(), TIERS),
    st.builds(BlocksRemoved, HASHES, TIERS),
    st.builds(GroupStored, st.sampled_from(Group), HASHES, TIERS),
    st.builds(GroupRemoved, st.sampled_from(Group), HASHES, TIERS),
    st.just(AllCleared()),
)


@given(st.lists(EVENTS, max_size=8), st.integers(0, 9))
def test_round_trip(events: list[object], rank: int) -> None:
    """Batches and dumps carry every event unchanged, in order."""
    batch = decode_batch(encode_batch(12.5, rank, events), page_size=16, dp_rank=rank)  # type: ignore[arg-type]
    assert (batch.sent_unix_s, batch.events, batch.refused, batch.needs) == (12.5, tuple(events), (), None)
    (page,) = encode_dump(5, 77, b"anchor", events)  # type: ignore[arg-type]
    found = decode_page(page, page_size=16)
    assert (found.dump, found.page, found.pages, found.seq, found.anchor) == (5, 0, 1, 77, b"anchor")
    assert found.batch.events == tuple(events)


def test_declaration() -> None:
    """The needs of a model travel in front; a worker with pages of another size is refused whole."""
    payload = encode_batch(1.0, 0, [Declaration(16, Needs(True, 3)), AllCleared()])
    batch = decode_batch(payload, page_size=16, dp_rank=0)
    assert (batch.needs, batch.events) == (Needs(True, 3), (AllCleared(),))
    with pytest.raises(RemoteProtocolError, match=r"declared\.page_size: 16 tokens, but .* pages of 64"):
        decode_batch(payload, page_size=64, dp_rank=0)


def test_long_dumps_are_paged() -> None:
    """Pages stay near their bound and come back in order."""
    runs = [BlocksStored(tuple(BlockHash(n * 1000 + k) for k in range(1000)), None) for n in range(100)]
    pages = encode_dump(9, 3, b"", runs)
    assert 6 <= len(pages) <= 8
    assert max(map(len, pages)) < worker_events.PAGE_BYTES + 20_000
    found = [decode_page(page, page_size=16) for page in pages]
    assert [page.page for page in found] == list(range(len(pages)))
    assert [event for page in found for event in page.batch.events] == runs
    assert decode_page(worker_events.gone(4), page_size=16).pages == 0


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ([1, b"1234567", None, 0], "hashes: 7 bytes are not a number of 8-byte hashes"),
        ([1, b"", None, 0], r"stored\.hashes: is empty"),
        ([1, b"12345678", None, 9], r"tier: 9 is not in 0\.\.3"),
        ([3, "kv", b"12345678", 0], "group: 'kv' is not one of state, swa"),
        ([2, b"12345678" * 2, 0], r"removed\.hashes: a block appears twice"),
    ],
)
def test_impossible_events_are_refused_alone(event: list[object], message: str) -> None:
    """The others of the batch are used."""
    payload = msgspec.msgpack.encode([1, 2.0, 0, [event, [5]]])
    batch = decode_batch(payload, page_size=16, dp_rank=0)
    assert batch.events == (AllCleared(),)
    (problem,) = batch.refused
    with pytest.raises(RemoteProtocolError, match=message):
        raise problem


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"\xc1", "not a batch of worker events"),
        (msgspec.msgpack.encode([2, 1.0, 0, []]), "version: 2, this service reads 1"),
        (msgspec.msgpack.encode([1, 1.0, 3, []]), "dp_rank: 3, but this stream is configured as rank 0"),
        (
            msgspec.msgpack.encode([1, 1.0, 0, [[0, 16, True, -1]]]),
            r"declared\.window_blocks: -1 is negative",
        ),
    ],
)
def test_no_batch_is_refused_whole(payload: bytes, message: str) -> None:
    """The error says what was found."""
    with pytest.raises(RemoteProtocolError, match=message):
        decode_batch(payload, page_size=16, dp_rank=0)


@given(st.binary(max_size=60))
def test_garbage_raises_nothing_else(payload: bytes) -> None:
    """Whatever arrives, the answer is a batch or a RemoteProtocolError."""
    for decode in (
        lambda: decode_batch(payload, page_size=16, dp_rank=0),
        lambda: decode_page(payload, page_size=16),
    ):
        try:
            decode()
        except RemoteProtocolError:
            continue
