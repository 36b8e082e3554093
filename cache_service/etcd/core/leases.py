"""When a lease is to be renewed, and when its holder must no longer count on it.

The holder's clock starts when a renewal is *sent* and ends TTL later; the server's starts when it arrives. So
the holder gives up no later than the server does.
"""

from __future__ import annotations


class LeaseClock:
    """One lease's times, in the caller's monotonic seconds."""

    def __init__(self, ttl_s: float, sent_at_s: float) -> None:
        self.ttl_s = ttl_s
        self._confirmed_at_s = sent_at_s
        self._asked_at_s: float | None = None

    @property
    def valid_until_s(self) -> float:
        """Until when the lease is certain."""
        return self._confirmed_at_s + self.ttl_s

    @property
    def due_at_s(self) -> float:
        """When to ask next: a third of the TTL after the last confirmation, then every sixth."""
        if self._asked_at_s is None or self._asked_at_s <= self._confirmed_at_s:
            return self._confirmed_at_s + self.ttl_s / 3
        return self._asked_at_s + self.ttl_s / 6

    def asked(self, now_s: float) -> None:
        """Note that a renewal is sent now."""
        self._asked_at_s = now_s

    def cut(self) -> None:
        """Note that the answer to the last question will not come."""
        self._asked_at_s = None

    def confirmed(self, sent_at_s: float, ttl_s: float) -> None:
        """Note a renewal for `ttl_s`, asked for at `sent_at_s`; an older answer changes nothing."""
        if sent_at_s >= self._confirmed_at_s:
            self._confirmed_at_s, self.ttl_s = sent_at_s, ttl_s

    def expired(self, now_s: float) -> bool:
        """Say whether the lease is no longer certain."""
        return now_s >= self.valid_until_s
