"""SGLang's msgpack batches become core events, and nothing else does any harm."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_service.core.errors import RemoteProtocolError
from cache_service.core.events import AllCleared, BlocksRemoved, BlocksStored, Tier
from cache_service.wire.kv_events import decode_batch

#: A batch as SGLang 0.5.21 wrote it: KVEventBatch with one event of each kind (bytes from its own encoder).
RECORDED = bytes.fromhex(
    "93cb41dac04a006000009388a474797065ab426c6f636b53746f726564ac626c6f636b5f68617368657392d3cce582cb"
    "f93afa0ed3e4fe1c7900303e53b1706172656e745f626c6f636b5f68617368c0a9746f6b656e5f696473980506070809"
    "0a0bce0002517faa626c6f636b5f73697a6504a76c6f72615f6964c0a66d656469756da3475055aa73657373696f6e5f"
    "6964a17383a474797065ac426c6f636b52656d6f766564ac626c6f636b5f68617368657391cf318d23468447e3b7a66d"
    "656469756daa4350555f50494e4e454481a474797065b0416c6c426c6f636b73436c656172656400"
)


def encode(*events: object, ts: object = 12.5, rank: object = 0) -> bytes:
    return msgspec.msgpack.encode([ts, list(events), rank])


LEAF = st.none() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=5) | st.floats()
MSGPACK = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner)
)
STORED = {
    "type": "BlockStored",
    "block_hashes": [1, -2],
    "parent_block_hash": None,
    "token_ids": list(range(8)),
    "block_size": 4,
    "lora_id": None,
    "medium": "GPU",
}


def test_text_that_is_not_utf8() -> None:
    """It spoils its event, or a batch of which it is no part of an event, and nothing more."""
    broken = encode(STORED, STORED).replace(b"GPU", b"G\x80U", 1)
    batch = decode_batch(broken, page_size=4, dp_rank=0)
    assert (len(batch.events), len(batch.refused)) == (1, 1)
    with pytest.raises(RemoteProtocolError, match="not a KV event batch"):
        decode_batch(b"\x93\xa1\x80\x90\x00", page_size=4, dp_rank=0)


def test_all_kinds() -> None:
    """Each kind of event is decoded; keys that we do not use, and left-out ones, do not matter."""
    batch = decode_batch(
        encode(
            STORED,
            {"type": "BlockStored", "block_hashes": [3], "parent_block_hash": -2, "token_ids": [[1, 2]] * 4,
             "block_size": 4, "lora_id": None, "medium": "CPU_PINNED", "cache_salt": "s", "session_id": "x"},
            {"type": "BlockRemoved", "block_hashes": [3], "medium": "DISK"},
            {"type": "BlockRemoved", "block_hashes": [1]},
            {"type": "AllBlocksCleared"},
        ),
        page_size=4,
        dp_rank=0,
    )  # fmt: skip
    assert batch.sent_unix_s == 12.5
    assert batch.refused == ()
    assert batch.events == (
        BlocksStored((1, -2), None),
        BlocksStored((3,), -2, Tier.HOST),
        BlocksRemoved((3,), Tier.DISK),
        BlocksRemoved((1,)),
        AllCleared(),
    )


def test_recorded_batch() -> None:
    """SGLang's own bytes decode."""
    batch = decode_batch(RECORDED, page_size=4, dp_rank=0)
    assert batch.sent_unix_s == 1795237889.5
    assert batch.events == (
        BlocksStored((-3682393307734148594, -1946086682957693357), None),
        BlocksRemoved((3570548865348658103,), Tier.HOST),
        AllCleared(),
    )


def test_bad_events_are_refused_alone() -> None:
    """An event that is unknown, mistyped or untrue leaves the others of its batch."""
    batch = decode_batch(
        encode({"type": "New"}, STORED, {**STORED, "block_hashes": "x"}, {**STORED, "block_size": 8}, 17),
        page_size=4,
        dp_rank=0,
    )
    assert batch.events == (BlocksStored((1, -2), None),)
    assert [error.reason for error in batch.refused] == ["unknown_event"] * 3 + ["block_size"]


def test_other_rank() -> None:
    """A batch of another data-parallel rank means that the addresses are mixed up."""
    with pytest.raises(RemoteProtocolError, match="rank 0"):
        decode_batch(encode(STORED, rank=1), page_size=4, dp_rank=0)
    assert decode_batch(encode(STORED, rank=None), page_size=4, dp_rank=0).events


@given(st.binary(max_size=80))
def test_any_bytes(payload: bytes) -> None:
    """Random bytes are a batch or a RemoteProtocolError."""
    try:
        batch = decode_batch(payload, page_size=4, dp_rank=0)
    except RemoteProtocolError:
        return
    assert isinstance(batch.sent_unix_s, float)


@given(MSGPACK)
def test_any_msgpack(value: object) -> None:
    """Well-formed msgpack of any shape is a batch or a RemoteProtocolError."""
    try:
        batch = decode_batch(msgspec.msgpack.encode(value), page_size=4, dp_rank=0)
    except RemoteProtocolError:
        return
    assert isinstance(batch.events, tuple)
