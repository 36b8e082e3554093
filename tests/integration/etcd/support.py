"""What several of these tests need: taking items from a watch with a deadline, filling etcd."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TypeVar

from cache_service.etcd.client import EtcdClient
from cache_service.etcd.core import txn as t
from cache_service.etcd.core.model import Changes, Event

T = TypeVar("T")


async def take_until(
    items: AsyncGenerator[T, None], enough: Callable[[list[T]], bool], *, timeout_s: float = 30.0
) -> list[T]:
    """Return the items up to the one that is enough, and close the generator."""
    taken: list[T] = []
    async with asyncio.timeout(timeout_s), aclosing(items):
        async for item in items:
            taken.append(item)
            if enough(taken):
                return taken
    raise AssertionError("the generator ended")


def events_of(items: list[T]) -> list[Event]:
    """Return all events of a list of changes and other items."""
    return [event for item in items if isinstance(item, Changes) for event in item.events]


async def fill(client: EtcdClient, prefix: bytes, count: int, *, value: bytes = b"v", lease: int = 0) -> int:
    """Put `count` numbered keys, 128 a revision; return the last revision."""
    ops = [t.Put(prefix + b"%08d" % i, value, lease) for i in range(count)]
    return (await client.apply(ops))[-1].revision
