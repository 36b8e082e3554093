"""Names of blocks: SGLang's own page hash, so that its KV events need no re-hashing.

Decides which 64-bit name a page-aligned run of tokens has. Must not invent a scheme of its own: a name in the
index is the name that the engine's events carry and, with the full digest, the HiCache storage key.

The outside facts, from SGLang 0.5.21:
* `srt/mem_cache/cpp_utils/hash_binding.cpp`: digest_i = SHA256(digest_{i-1} || page_i as little-endian
  u32), the first page hashed alone, or behind the 32-byte namespace seed.
* `srt/mem_cache/utils.py`, hash_str_to_int64: an event carries the first 8 bytes, big-endian, as signed
  int64.
* `storage_namespace_seed` there seeds storage keys by extra_key and cache_salt;
  `compute_node_event_hash_values` seeds *events* by the salt alone, in another way, and leaves extra_key
  (LoRA, tenant key) out. So an event of a request with an extra_key has the name of the same tokens without
  one.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator, Sequence
from hashlib import sha256

from cache_service.core.errors import ConfigError
from cache_service.core.ids import BlockHash

DIGEST_BYTES = 32
_TOKEN_BYTES = 4


def block_digests(token_ids: Sequence[int], page_size: int, *, seed: bytes | None = None) -> Iterator[bytes]:
    """Yield the chained 32-byte SHA-256 of every full page of `token_ids`; the tail short of a page has none.

    `seed` is the namespace's, from `storage_namespace_seed` or `event_namespace_seed`; None for none.
    Raises ConfigError for a page size below 1, a seed of another length, or a token id outside 0..2^32-1.
    """
    if page_size < 1:
        raise ConfigError(f"page_size: {page_size} is not a positive number of tokens")
    if seed is not None and len(seed) != DIGEST_BYTES:
        raise ConfigError(f"seed: {len(seed)} bytes; give the {DIGEST_BYTES}-byte digest or None")
    full_tokens = len(token_ids) // page_size * page_size
    data = memoryview(_little_endian_u32(token_ids[:full_tokens])).cast("B")
    page_bytes = page_size * _TOKEN_BYTES
    digest = seed or b""
    for start in range(0, len(data), page_bytes):
        hasher = sha256(digest)
        hasher.update(data[start : start + page_bytes])
        digest = hasher.digest()
        yield digest


def block_hashes(token_ids: Sequence[int], page_size: int, *, seed: bytes | None = None) -> list[BlockHash]:
    """Return the block hash of every full page, in order: 0.5 ms for 8,192 tokens at page 64.

    Raises ConfigError as `block_digests` does.
    """
    return [event_hash(digest) for digest in block_digests(token_ids, page_size, seed=seed)]


def event_hash(digest: bytes) -> BlockHash:
    """Return the signed 64-bit name that a KV event carries for a page with this SHA-256."""
    return BlockHash(int.from_bytes(digest[:8], "big", signed=True))


def storage_namespace_seed(extra_key: str | None, cache_salt: str | None) -> bytes | None:
    """Return the seed of HiCache storage keys, None for the plain chain (SGLang's function of this name)."""
    if extra_key is None and cache_salt is None:
        return None
    digest = sha256(b"sglang-cache-namespace-v1")
    for part in (extra_key, cache_salt):
        if part is None:
            digest.update(b"\x00")
            continue
        encoded = part.encode("utf-8")
        digest.update(b"\x01" + len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


def event_namespace_seed(cache_salt: str | None) -> bytes | None:
    """Return the seed of the hashes in KV events, which know the salt but not the extra_key."""
    if cache_salt is None:
        return None
    return sha256(b"sglang-cache-salt-v1\0" + cache_salt.encode("utf-8")).digest()


def usable_tokens(matched_tokens: int, total_tokens: int, page_size: int) -> int:
    """Return how many matched tokens a request can reuse: whole pages, and never its last token.

    The engine must compute at least one token to have logits, so a full match gives up its last page.
    """
    return max(0, min(matched_tokens, total_tokens - 1)) // page_size * page_size


def _little_endian_u32(token_ids: Sequence[int]) -> array[int]:
    try:
        tokens = array("I", token_ids)
    except (OverflowError, TypeError) as error:
        raise ConfigError(f"token_ids: {error}; every token id is an integer in 0..4294967295") from error
    if tokens.itemsize != _TOKEN_BYTES:
        raise ConfigError(f"this platform's unsigned int has {tokens.itemsize} bytes, not {_TOKEN_BYTES}")
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens
