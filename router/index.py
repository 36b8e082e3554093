"""Ask the prefix index what is cached where; an index that does not answer means no match, not an error.

Decides nothing: it turns the cache service's answer into the policy's `Match`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cache_service.core.errors import PrfaasError
from cache_service.core.ids import BlockHash, Namespace, SiteId, WorkerId
from router.core.match import Holder, Match


class HolderClaim(Protocol):
    """One worker rank's claim, as the cache service's client returns it."""

    @property
    def worker_id(self) -> str: ...
    @property
    def site(self) -> str: ...
    @property
    def matched_tokens(self) -> int: ...
    @property
    def usable_tokens(self) -> int: ...


class IndexAnswer(Protocol):
    """An answer of the index; `available` is False, with a reason, when there is none."""

    @property
    def available(self) -> bool: ...
    @property
    def reason(self) -> str: ...
    @property
    def holders(self) -> Sequence[HolderClaim]: ...


class PrefixIndex(Protocol):
    """What the router needs of `cache_service.client.IndexClient`."""

    async def match(
        self, namespace: Namespace, hashes: Sequence[BlockHash], total_tokens: int
    ) -> IndexAnswer: ...

    async def close(self) -> None: ...


async def lookup(
    index: PrefixIndex | None, namespace: Namespace, hashes: Sequence[BlockHash], total_tokens: int
) -> Match:
    """Return the claims for a prompt; empty when there is no index, no full page, or no answer."""
    if index is None:
        return Match(available=False, reason="not_configured")
    if not hashes:
        return Match()
    try:
        answer = await index.match(namespace, hashes, total_tokens)
    except PrfaasError as error:
        return Match(available=False, reason=error.reason)
    holders = tuple(
        Holder(WorkerId(h.worker_id), SiteId(h.site), h.matched_tokens, h.usable_tokens)
        for h in answer.holders
    )
    return Match(holders, available=answer.available, reason=answer.reason)
