"""A question to the index and its answer, as the router sees them.

Decides nothing; the usable-prefix rule is `core/blocks.usable_tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass

from cache_service.core.errors import RemoteProtocolError
from cache_service.core.ids import BlockHash, Namespace, SiteId, WorkerId

#: A million-token context has 16,384 blocks at page 64; this leaves room for pages of 8 tokens.
MAX_HASHES = 131_072
MAX_TOTAL_TOKENS = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Query:
    """One prompt: the namespace, the chained hashes of its full pages, and its length in tokens."""

    namespace: Namespace
    hashes: tuple[BlockHash, ...]
    total_tokens: int

    def __post_init__(self) -> None:
        if len(self.hashes) > MAX_HASHES:
            raise RemoteProtocolError(f"hashes: {len(self.hashes)} blocks, at most {MAX_HASHES} in a query")
        if not 1 <= self.total_tokens <= MAX_TOTAL_TOKENS:
            raise RemoteProtocolError(f"total_tokens: {self.total_tokens} is not in 1..{MAX_TOTAL_TOKENS}")
        full = self.total_tokens // self.namespace.page_size
        if len(self.hashes) > full:
            raise RemoteProtocolError(
                f"hashes: {len(self.hashes)} blocks, but total_tokens has {full} full pages of "
                f"{self.namespace.page_size}"
            )


@dataclass(frozen=True, slots=True)
class Holder:
    """What one worker's data-parallel rank claims to hold of a prompt, and what of it a request can reuse."""

    worker_id: WorkerId
    site: SiteId
    dp_rank: int
    matched_tokens: int
    usable_tokens: int


@dataclass(frozen=True, slots=True)
class MatchResult:
    """An answer, or the reason why there is none.

    Attributes:
        available: False means route without an index; then `holders` is empty.
        reason: "" when available, else one of client.REASONS.
        holders: deepest prefix first.
        revision: of the index, comparable within one life of the service.
        starting: the service has not caught up since its start, and no other one was there to ask.
    """

    available: bool
    reason: str
    holders: tuple[Holder, ...]
    revision: int
    starting: bool = False
