"""vLLM's batches, arrays and maps, become our names; what cannot be named is not claimed."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from cache_service.core.blocks import block_hashes
from cache_service.core.errors import RemoteProtocolError
from cache_service.core.events import AllCleared, BlocksRemoved, BlocksStored, Tier
from cache_service.core.ids import SourceId, WorkerId
from cache_service.core.index import PrefixIndex
from cache_service.wire.vllm_events import VllmBlocks, decode_batch

PAGE = 4


class Stored(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, tag="BlockStored"):
    """As `vllm/distributed/kv_events.py` declares it, in its order of fields."""

    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None = None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None


class Removed(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, tag="BlockRemoved"):
    block_hashes: list[int | bytes]
    medium: str | None
    group_idx: int | None = None


class Cleared(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, tag="AllBlocksCleared"):
    pass


class VllmBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list[Any]
    data_parallel_rank: int | None = None


def as_map(event: Any) -> dict[str, Any]:
    """The same event as newer releases write it."""
    named = {name: getattr(event, name) for name in event.__struct_fields__}
    return {"type": type(event).__struct_config__.tag, **named}


def encode(*events: Any, rank: int | None = 0, maps: bool = False) -> bytes:
    return msgspec.msgpack.encode(VllmBatch(3.5, [as_map(e) if maps else e for e in events], rank))


def translated(blocks: VllmBlocks, *events: Any, maps: bool = False) -> list[Any]:
    usable, refused = blocks.translate(decode_batch(encode(*events, maps=maps), dp_rank=0).events)
    assert not refused, refused
    return usable


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("name", [lambda n: n + 2**63, lambda n: n.to_bytes(32, "big")])
def test_names_are_ours(maps: bool, name: Any) -> None:
    """A chain told in two events, by integers or bytes, has the hashes of its tokens; so have removals."""
    tokens = list(range(100, 100 + 5 * PAGE))
    ours = block_hashes(tokens, PAGE)
    blocks = VllmBlocks(PAGE)
    first = Stored([name(1), name(2)], None, tokens[: 2 * PAGE], PAGE, None, "GPU")
    rest = Stored([name(3), name(4), name(5)], name(2), tokens[2 * PAGE :], PAGE, None, "GPU")
    assert translated(blocks, first, rest, maps=maps) == [
        BlocksStored(tuple(ours[:2]), None),
        BlocksStored(tuple(ours[2:]), ours[1]),
    ]
    assert translated(blocks, Stored([name(5)], name(4), tokens[-PAGE:], PAGE, None, "CPU"), maps=maps) == [
        BlocksStored((ours[4],), ours[3], Tier.HOST)
    ]
    gone = Removed([name(5), name(4), name(77)], "GPU")
    assert translated(blocks, gone, maps=maps) == [BlocksRemoved((ours[4], ours[3]))]
    assert translated(blocks, Removed([name(5)], "CPU"), maps=maps) == [BlocksRemoved((ours[4],), Tier.HOST)]
    assert len(blocks) == 3
    assert translated(blocks, Cleared(), maps=maps) == [AllCleared()]
    assert len(blocks) == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora_id": 3}, "stored.lora"),
        ({"lora_name": "x"}, "stored.lora"),
        ({"extra_keys": [("salt",)]}, "stored.extra_keys"),
        ({"kv_cache_spec_kind": "mamba", "group_idx": 1}, "is not full attention"),
        ({"parent_block_hash": 99}, "not a known block"),
        ({"block_size": 8}, "8 tokens, but this namespace has pages of 4"),
        ({"token_ids": [1, 2, 3]}, "3 for 1 blocks of 4"),
        ({"token_ids": [1, 2, 3, -4]}, "stored.token_ids"),
        ({"medium": "TAPE"}, "medium"),
    ],
)
def test_what_cannot_be_named_is_refused(changed: dict[str, Any], message: str) -> None:
    """With its children: their parent is not known. The rest of the batch is used."""
    event = {"block_hashes": [1], "parent_block_hash": None, "token_ids": [1, 2, 3, 4], "block_size": PAGE}
    event |= {"lora_id": None, "medium": None, **changed}
    child = Stored([2], 1, [5, 6, 7, 8], PAGE, None, None)
    blocks = VllmBlocks(PAGE)
    batch = decode_batch(encode(Stored(**event), child, Cleared()), dp_rank=0)
    usable, refused = blocks.translate(batch.events)
    assert usable == [AllCleared()]
    assert message in str(refused[0])
    assert "not a known block" in str(refused[1])


def test_no_batch_is_refused_whole() -> None:
    """Another rank, and what is no batch."""
    with pytest.raises(RemoteProtocolError, match="data_parallel_rank: 2"):
        decode_batch(encode(rank=2), dp_rank=0)
    with pytest.raises(RemoteProtocolError, match="not a KV event batch"):
        decode_batch(b"\xc1", dp_rank=0)
    batch = decode_batch(msgspec.msgpack.encode([1.0, [["Other", 1], 7, {"type": "x"}], None]), dp_rank=0)
    assert (batch.events, len(batch.refused)) == ((), 3)


def test_an_overflowing_table_claims_no_more_than_it_can_take_back() -> None:
    """The index holds exactly the blocks of the table, whatever a long random life brings."""
    source, index, chance = SourceId(WorkerId("v")), PrefixIndex(), random.Random(3)
    index.add(source)
    blocks = VllmBlocks(PAGE, max_blocks=40)
    names: list[int] = []
    for step in range(600):
        if names and chance.random() < 0.3:
            event: Any = Removed([names.pop(chance.randrange(len(names)))], "GPU")
        else:
            parent = chance.choice(names) if names and chance.random() < 0.7 else None
            tokens = [chance.randrange(1000) for _ in range(2 * PAGE)]
            event = Stored([2 * step, 2 * step + 1], parent, tokens, PAGE, None, "GPU")
            names += event.block_hashes
        usable, _ = blocks.translate(decode_batch(encode(event), dp_rank=0).events)
        for one in usable:
            index.apply(source, one)
        index.check()
        assert index.held_blocks(source) == len(blocks) <= 40
