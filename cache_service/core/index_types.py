"""What the prefix index answers, as values; `core/index.py` is the index."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from cache_service.core.ids import SiteId, SourceId


class Match(NamedTuple):
    """What one holder has of a query. A named tuple, because an answer may have hundreds of them.

    Attributes:
        source: the holder.
        matched: blocks of its longest contiguous prefix of the query.
        usable: blocks that a request can reuse: the deepest boundary up to `matched` and the query's limit at
            which the holder also has what its model needs beside the full-attention blocks.
    """

    source: SourceId
    matched: int
    usable: int


@dataclass(frozen=True, slots=True)
class Applied:
    """What an event changed, in (block, tier) entries of one holder; a group's entries count likewise.

    Attributes:
        stored: entries that are new.
        removed: entries that are gone.
        unchanged: stored again or removed though absent: a duplicate, or an event was lost.
        conflicts: blocks refused because the index knows them under another parent.
    """

    stored: int = 0
    removed: int = 0
    unchanged: int = 0
    conflicts: int = 0


@dataclass(frozen=True, slots=True)
class IndexCounts:
    """Sizes of an index.

    Attributes:
        blocks: distinct blocks.
        entries: (block, holder, tier).
        holders: registered.
        orphans: (block, holder) whose holder lacks the block's parent.
        group_entries: (block, holder, tier) of states and windows.
    """

    blocks: int
    entries: int
    holders: int
    orphans: int
    group_entries: int = 0


@dataclass(frozen=True, slots=True)
class Needs:
    """What a holder's model needs at a boundary beside the full-attention blocks.

    Attributes:
        state: a linear-state snapshot at the boundary.
        window_blocks: sliding-window KV of that many blocks before it; 0 for none.
    """

    state: bool = False
    window_blocks: int = 0


def best_per_site(matches: Iterable[Match], sites: Mapping[SourceId, SiteId]) -> dict[SiteId, Match]:
    """Return each site's holder with the most usable, then the most matched blocks, then by name."""
    best: dict[SiteId, Match] = {}
    for match in matches:
        site = sites[match.source]
        known = best.get(site)
        if known is None or _rank(match) < _rank(known):
            best[site] = match
    return best


def _rank(match: Match) -> tuple[int, int, SourceId]:
    return -match.usable, -match.matched, match.source
