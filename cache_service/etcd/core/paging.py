"""Reading a large range in pages of about equal bytes.

A range has no limit in bytes, only in keys, and a client has a limit on a message. So the plan learns the
mean size from the pages it has seen, and halves when a page was refused as too large.
"""

from __future__ import annotations

from cache_service.etcd.core.errors import TooLarge
from cache_service.etcd.core.model import KeyRange

_FIRST_KEYS = 256
_GROWTH = 4


class PagePlan:
    """What to ask next: `rest` (None when done) and `limit`. All pages are read at one revision.

    After each page call `took`, after a refusal `refused`. Pages aim at `page_bytes`, with at most
    `page_keys`.
    """

    def __init__(self, keys: KeyRange, *, page_bytes: int, page_keys: int) -> None:
        self._page_bytes = page_bytes
        self._page_keys = page_keys
        self.rest: KeyRange | None = keys
        self.limit = min(_FIRST_KEYS, page_keys)

    def took(self, last_key: bytes | None, *, count: int, size_bytes: int, more: bool) -> None:
        """Note a page of `count` keys ending with `last_key` (None: empty page), and plan the next."""
        if last_key is None or not more or self.rest is None:
            self.rest = None
            return
        self.rest = self.rest.after(last_key)
        fits = max(self._page_bytes * count // max(size_bytes, 1), 1)
        self.limit = min(fits, self._page_keys, max(count, 1) * _GROWTH)

    def refused(self) -> None:
        """Note that the page was too large for a message. Raises TooLarge when it was a single key."""
        if self.limit == 1:
            raise TooLarge("etcd range: one key is larger than max_message_bytes")
        self.limit //= 2
