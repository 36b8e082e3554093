"""Which connections of a bundle stand still with data on their way. Pure.

A middlebox may drop one flow of several and leave the others alone. TCP goes on trying for as long as it is
allowed to; a bundle notices earlier, ends itself, and its transfers are resumed over new connections.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: Longer than the partitions that TCP gets over by itself (it tries again at least once a second).
STALL_S = 6.0


@dataclass(slots=True)
class StallWatch:
    """Remembers when each connection last got something acknowledged."""

    _seen: dict[int, tuple[int, float]] = field(default_factory=dict)

    def update(self, now_s: float, flows: Mapping[int, tuple[int, int]]) -> list[int]:
        """Return the connections that have stood still for STALL_S.

        Args:
            now_s: monotonic time.
            flows: by connection: bytes delivered so far, segments on their way.
        """
        stalled = []
        for index, (delivered, on_the_way) in flows.items():
            before, since_s = self._seen.get(index, (-1, now_s))
            if delivered != before or not on_the_way:
                self._seen[index] = (delivered, now_s)
            elif now_s - since_s >= STALL_S:
                stalled.append(index)
        return stalled
