"""Why a holder has matched and usable blocks as it has: a report for a person.

Decides how the index's content is read for one query. It reads a dump, so it is right for every kind of
index and costs O(entries); the answer itself is `PrefixIndex.match`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cache_service.core.events import BlocksStored, Group, GroupStored, Tier
from cache_service.core.ids import BlockHash, SourceId


@dataclass(frozen=True, slots=True)
class GroupReport:
    """What one holder has of one group (None: full-attention blocks) for a query.

    Attributes:
        present: blocks of the query, anywhere in it.
        deepest: boundary, in blocks, behind the deepest of them within the matched prefix; 0 for none.
        tiers: blocks of the query by tier.
    """

    group: Group | None
    present: int
    deepest: int
    tiers: Mapping[Tier, int]


@dataclass(frozen=True, slots=True)
class HolderReport:
    """One holder's part: the answer in blocks, what it stands on, and why it ends there."""

    source: SourceId
    matched: int
    usable: int
    groups: tuple[GroupReport, ...]
    missing: str


Presence = dict[SourceId, dict[Group | None, dict[Tier, set[int]]]]


def presence(
    hashes: Sequence[BlockHash], dump: Iterable[tuple[SourceId, BlocksStored | GroupStored]]
) -> Presence:
    """Return, by holder, group and tier, which positions of the query a dump has."""
    position = {block: at for at, block in enumerate(hashes)}
    found: Presence = {}
    for source, event in dump:
        here = {position[block] for block in event.hashes if block in position}
        if here:
            group = event.group if isinstance(event, GroupStored) else None
            tiers = found.setdefault(source, {}).setdefault(group, {})
            tiers.setdefault(event.tier, set()).update(here)
    return found


def report(
    source: SourceId, matched: int, usable: int, limit: int, blocks: int, held: Presence
) -> HolderReport:
    """Explain one holder's `matched` and `usable` blocks of a query of `blocks`, `limit` of them usable."""
    groups = held.get(source, {})
    everywhere = {group: set().union(*tiers.values()) for group, tiers in groups.items()}
    reports = []
    for group in (None, *Group):
        here = everywhere.get(group)
        if here is None:
            continue
        deepest = max((at + 1 for at in here if at < matched), default=0)
        tiers = {tier: len(at) for tier, at in sorted(groups[group].items())}
        reports.append(GroupReport(group, len(here), deepest, tiers))
    return HolderReport(
        source, matched, usable, tuple(reports), _missing(matched, usable, limit, blocks, everywhere)
    )


def _missing(
    matched: int, usable: int, limit: int, blocks: int, held: Mapping[Group | None, set[int]]
) -> str:
    said = []
    if matched < blocks:
        later = sum(1 for at in held.get(None, ()) if at > matched)
        behind = f", though {later} blocks behind it are: an inner block is missing" if later else ""
        said.append(f"block {matched} of {blocks} is not held{behind}")
    most = min(matched, limit)
    if usable < most:
        wanted = range(usable, most)
        states = [at + 1 for at in sorted(held.get(Group.STATE, ())) if at in wanted]
        windows = [at + 1 for at in sorted(held.get(Group.SWA, ())) if at in wanted]
        if states:
            said.append(
                f"a state snapshot is at boundary {states[-1]}, but not the sliding-window KV before it"
            )
        elif windows:
            said.append(
                f"no boundary from {usable + 1} to {most} has both its whole sliding window and, where the "
                "model needs one, a state snapshot"
            )
        else:
            said.append(
                f"no state snapshot or whole sliding window is at a boundary from {usable + 1} to {most}"
            )
    elif limit < matched:
        said.append("the request's last token is computed, so its last page is not reused")
    return "; ".join(said)
