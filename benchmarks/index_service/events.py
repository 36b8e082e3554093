"""Workers that publish SGLang's KV events, the same bytes for every service."""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass

import msgspec
import xxhash
import zmq

from cache_service.core.blocks import block_hashes

PAGE = 16
MODEL = "bench"
#: Dynamo names a block by XXH3 of its own token ids with this seed (its crate kv-router, protocols).
_LOCAL_SEED = 1337


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as both services know it: SGLang's chained hashes, and Dynamo's hash of each block."""

    tokens: list[int]
    hashes: list[int]
    local: list[int]


def prompt(number: int, blocks: int) -> Prompt:
    """Return prompt `number`: like no other from its first block on."""
    tokens = [(number * 7919 + at) % 150_000 for at in range(blocks * PAGE)]
    tokens[0] = number
    pages = (tokens[at : at + PAGE] for at in range(0, len(tokens), PAGE))
    digests = (xxhash.xxh3_64_digest(struct.pack(f"<{PAGE}I", *page), _LOCAL_SEED) for page in pages)
    local = [int.from_bytes(digest, "big", signed=True) for digest in digests]
    return Prompt(tokens, list(block_hashes(tokens, PAGE)), local)


def batch(what: Prompt) -> bytes:
    """Return one batch with one event, as SGLang encodes it."""
    event = {
        "type": "BlockStored",
        "block_hashes": what.hashes,
        "parent_block_hash": None,
        "token_ids": what.tokens,
        "block_size": PAGE,
        "lora_id": None,
        "medium": "GPU",
    }
    return msgspec.msgpack.encode([time.time(), [event], 0])


class Publisher:
    """One worker's PUB socket; nothing is dropped at the sender."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], port: int) -> None:
        self.address = f"tcp://127.0.0.1:{port}"
        self._socket = context.socket(zmq.PUB)
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.bind(self.address)
        self._seq = 0

    def publish(self, payload: bytes) -> None:
        """Send one batch."""
        self._socket.send_multipart([b"kv", self._seq.to_bytes(8, "big"), payload])
        self._seq += 1

    def close(self) -> None:
        """Close the socket."""
        self._socket.close(linger=0)
