"""Block hashes are SGLang's: the golden values are its own C++'s (hash_binding.cpp of 0.5.21), not ours."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_service.core import blocks
from cache_service.core.errors import ConfigError

TOKENS = [(i * 7919 + 13) % 151936 for i in range(200)]
#: seed arguments -> digests of the three full pages of 64 that SGLang's get_native_hash returned for TOKENS.
GOLDEN = {
    "plain": [
        "cce582cbf93afa0e7c396d796fde77c3287d25ac17ecbe3b10b849f61f40823b",
        "e4fe1c7900303e537eef1a2eb43a2c9c9d5b80cb2d064ecb450198f48f02ec52",
        "318d23468447e3b70fe08e7bea138d59d92554c1ef082191a25513594a774569",
    ],
    "event-salt": [
        "55800cb411c5b5743a1ce7e4ca3658ab60cefd5abcd41ad67ba87fb19b393748",
        "bd39d35e822c768af40520ddccb6b2f935be40bad17efc09cac5532f9b7e8595",
        "673a3cc11570abdfa1b1225cd73495f45c0820683ee48108e2e89cbcb6dd72eb",
    ],
    "storage": [
        "21a5e2b35f35cfead713ca11def36a0c6bae144590953f093b7ab6afbc002b35",
        "cf1beec1a8d18abbcc12eb293f41a70717240daece5e9293641cb69141a704ea",
        "535d78a810b1a03e0a8a38edac039c442e4a66f928ef27a816a0d4275b5f294f",
    ],
}
SEEDS = {
    "plain": None,
    "event-salt": blocks.event_namespace_seed("tenant-1"),
    "storage": blocks.storage_namespace_seed("lora-7", "tenant-1"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    """Every seed gives SGLang's digests, and the tail short of a page gives none."""
    digests = [digest.hex() for digest in blocks.block_digests(TOKENS, 64, seed=SEEDS[name])]
    assert digests == GOLDEN[name]


def test_golden_event_hashes() -> None:
    """An event carries the first 8 bytes, signed."""
    assert blocks.block_hashes(TOKENS, 64) == [
        -3682393307734148594,
        -1946086682957693357,
        3570548865348658103,
    ]


def test_largest_token_id() -> None:
    """Ids fill 32 bits unsigned (values from SGLang's C++)."""
    assert blocks.block_hashes([4294967295, 0, 1, 2], 2) == [8261002723200350851, -5030001268076642999]


@given(st.lists(st.integers(0, 2**32 - 1), max_size=60), st.integers(1, 9))
def test_against_the_definition(tokens: list[int], page_size: int) -> None:
    """The chain equals the definition written out naively."""
    prior, expected = b"", []
    for start in range(0, len(tokens) - page_size + 1, page_size):
        page = b"".join(t.to_bytes(4, "little") for t in tokens[start : start + page_size])
        prior = sha256(prior + page).digest()
        expected.append(int.from_bytes(prior[:8], "big", signed=True))
    assert blocks.block_hashes(tokens, page_size) == expected


def test_seeds_separate() -> None:
    """Absent, empty and differently joined parts are different namespaces; none is no seed."""
    seed = blocks.storage_namespace_seed
    assert seed(None, None) is None
    assert blocks.event_namespace_seed(None) is None
    assert blocks.event_namespace_seed("") is not None
    variants = [seed("", None), seed(None, ""), seed("ab", ""), seed("a", "b"), seed("", "ab")]
    assert len(set(variants)) == len(variants)


@pytest.mark.parametrize("bad", [[-1], [2**32], [1.5], ["a"]])
def test_bad_tokens(bad: list[object]) -> None:
    """A token id that is no u32 is named."""
    with pytest.raises(ConfigError, match="token_ids"):
        blocks.block_hashes(bad, 1)  # type: ignore[arg-type]


def test_bad_arguments() -> None:
    """Page size and seed are checked."""
    with pytest.raises(ConfigError, match="page_size"):
        blocks.block_hashes([1], 0)
    with pytest.raises(ConfigError, match="seed"):
        blocks.block_hashes([1], 1, seed=b"short")


@pytest.mark.parametrize(
    ("matched", "total", "usable"),
    [(0, 100, 0), (64, 65, 64), (64, 64, 0), (128, 128, 64), (192, 128, 64), (128, 129, 128), (64, 0, 0)],
)
def test_usable_leaves_one_token(matched: int, total: int, usable: int) -> None:
    """A full match gives up its last page; whole pages only."""
    assert blocks.usable_tokens(matched, total, 64) == usable
