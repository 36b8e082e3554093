"""What the prefix index claims about one prompt, arranged so that a decision can read it without a search.

Decides nothing. A claim is only a claim: the engine alone says what was hit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cache_service.core.ids import SiteId, WorkerId


@dataclass(frozen=True, slots=True)
class Holder:
    """What the index claims that one worker holds of this prompt.

    Attributes:
        matched_tokens: leading tokens whose blocks it holds.
        usable_tokens: how many of them the engine could reuse; at most the prompt less one token.
    """

    worker_id: WorkerId
    site: SiteId
    matched_tokens: int
    usable_tokens: int


@dataclass(frozen=True, slots=True)
class Match:
    """The index's answer; no holders when it was not asked or did not answer.

    `usable` and `by_site` are made once, when the answer arrives, and not while a decision is timed.
    """

    holders: tuple[Holder, ...] = ()
    available: bool = True
    reason: str = ""
    #: Best usable tokens of each worker (over its ranks), only where above 0.
    usable: Mapping[WorkerId, int] = field(init=False, repr=False, compare=False)
    #: The best usable tokens of all.
    longest_tokens: int = field(init=False, repr=False, compare=False)
    #: Workers of each site, longest usable prefix first, then by name.
    by_site: Mapping[SiteId, Sequence[WorkerId]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        usable: dict[WorkerId, int] = {}
        site_of: dict[WorkerId, SiteId] = {}
        for holder in self.holders:
            if holder.usable_tokens > usable.get(holder.worker_id, 0):
                usable[holder.worker_id] = holder.usable_tokens
                site_of[holder.worker_id] = holder.site
        by_site: dict[SiteId, list[WorkerId]] = {}
        for worker_id in sorted(usable, key=lambda w: (-usable[w], w)):
            by_site.setdefault(site_of[worker_id], []).append(worker_id)
        object.__setattr__(self, "usable", usable)
        object.__setattr__(self, "longest_tokens", max(usable.values(), default=0))
        object.__setattr__(self, "by_site", by_site)

    def usable_tokens(self, worker_id: WorkerId) -> int:
        """Return the reusable tokens claimed for `worker_id` (its best rank), 0 if none."""
        return self.usable.get(worker_id, 0)
