"""Our block hashes are those of the installed SGLang, computed by SGLang."""

from __future__ import annotations

import random

import pytest

from cache_service.core import blocks

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize(("extra_key", "salt"), [(None, None), ("lora-7", None), (None, "t"), ("", "")])
def test_against_sglang(page_size: int, extra_key: str | None, salt: str | None) -> None:
    """Digests, event hashes and namespace seeds agree on random tokens."""
    from sglang.srt.mem_cache.utils import get_hash_str, hash_str_to_int64, storage_namespace_seed

    rng = random.Random(page_size)
    tokens = [rng.randrange(2**32) for _ in range(page_size * 5)]
    theirs_seed = storage_namespace_seed(extra_key, salt)
    ours_seed = blocks.storage_namespace_seed(extra_key, salt)
    assert theirs_seed == (None if ours_seed is None else ours_seed.hex())
    theirs = get_hash_str(tokens, theirs_seed, page_size=page_size)
    ours = list(blocks.block_digests(tokens, page_size, seed=ours_seed))
    assert [digest.hex() for digest in ours] == theirs
    assert blocks.block_hashes(tokens, page_size, seed=ours_seed) == [
        hash_str_to_int64(text) for text in theirs
    ]


def test_salt_of_events() -> None:
    """The seed of salted events is the one that SGLang's recorder uses for a node with a cache salt."""
    from types import SimpleNamespace

    from sglang.srt.mem_cache.utils import compute_node_event_hash_values

    class Key(list):
        extra_key, cache_salt = None, "tenant-1"

    tokens = list(range(100, 108))
    root = SimpleNamespace(key=None, parent=None, event_hash_value=None)
    node = SimpleNamespace(key=Key(tokens), parent=root, event_hash_value=None)
    theirs = compute_node_event_hash_values(node, 4)
    seed = blocks.event_namespace_seed("tenant-1")
    assert [digest.hex() for digest in blocks.block_digests(tokens, 4, seed=seed)] == theirs
