"""What every prefix index does, whichever core keeps it; core/index.py says what it means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from cache_service.core.events import BlocksStored, Event, GroupStored
from cache_service.core.ids import BlockHash, SourceId
from cache_service.core.index_types import Applied, IndexCounts, Match


class BlockIndex(Protocol):
    """Blocks of one namespace and who holds them."""

    @property
    def revision(self) -> int:
        """Grows with every change that a `match` could see."""

    @property
    def evicted_blocks(self) -> int:
        """Blocks forgotten to keep the budget, ever."""

    @property
    def bytes_estimate(self) -> int:
        """What the content takes, about; the budget is held against this."""

    def sources(self) -> tuple[SourceId, ...]:
        """Return the registered holders, by slot."""

    def add(self, source: SourceId) -> None:
        """Register a holder that holds nothing yet; no effect when it is registered."""

    def declare(self, source: SourceId, needs_state: bool, swa_window_blocks: int) -> None:
        """Say what a holder's model needs beside full-attention blocks; until then, nothing."""

    def drop(self, source: SourceId) -> int:
        """Forget a holder and what it holds; return how many entries went."""

    def quarantine(self, source: SourceId) -> None:
        """Leave a holder out of every answer, and keep what it holds."""

    def restore(self, source: SourceId) -> None:
        """Undo `quarantine`."""

    def match(self, hashes: Sequence[BlockHash], limit_blocks: int | None = None) -> list[Match]:
        """Return every holder of a non-empty prefix of `hashes`, deepest first, then by name."""

    def apply(self, source: SourceId, event: Event) -> Applied:
        """Change the index by one event of a registered holder."""

    def clear(self, source: SourceId) -> int:
        """Remove all that a holder holds; return how many entries went."""

    def held_blocks(self, source: SourceId) -> int:
        """Return how many (block, tier) entries a holder has."""

    def counts(self) -> IndexCounts:
        """Return the sizes; O(holders)."""

    def nodes(self) -> int:
        """Return how many radix nodes (maximal runs of equal holders) the blocks make; O(blocks)."""

    def copy(self) -> BlockIndex:
        """Return an index of its own with the same content."""

    def dump(self) -> Iterator[tuple[SourceId, BlocksStored | GroupStored]]:
        """Yield events that rebuild the content in an empty index."""

    def check(self) -> None:
        """Raise AssertionError unless every invariant holds."""
