"""One transfer as the decode side sees it, and the prefill workers that it comes from."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from prfaas_sglang.core.framing import Grant
from prfaas_sglang.core.session import ImportSession
from prfaas_sglang.transfer.channel import Channel

Address = tuple[str, int]


@dataclass(slots=True)
class Import:
    """One transfer being received, possibly by several connections' threads at once.

    `granted` says that a connection has carried its grant; when that breaks, the next one resumes it.
    `lock` guards the session and `alive`. A thread writes rows within `with item as alive` (False: it is
    over), for the time of one non-blocking read, so that ending a transfer waits microseconds, never for the
    network.
    """

    room: int
    transfer: int
    session: ImportSession
    grant: Grant
    since_s: float
    granted: bool = False
    alive: bool = True
    writing: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)
    _left: threading.Condition = field(init=False)

    def __post_init__(self) -> None:
        self._left = threading.Condition(self.lock)

    def __enter__(self) -> bool:
        with self.lock:
            self.writing += 1
            return self.alive

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.writing -= 1
            if not self.alive:
                self._left.notify_all()

    def end(self) -> bool:
        """End it once; True for the call that did. No thread writes its rows when any call returns."""
        with self.lock:
            first, self.alive = self.alive, False
            self._left.wait_for(lambda: not self.writing)
            return first


@dataclass(slots=True)
class Peer:
    """A prefill worker: its connections, and what waits for it.

    `channel` is the control connection. `resume_until_s` is set from a break until rows arrive again,
    `breaks` counts those between: a path that breaks every connection is given up then. A new bundle is
    dialed only when every reader of the old one has ended, so that no late frame of it can touch a row that
    was sent again.
    """

    address: Address
    channel: Channel | None = None
    channels: list[Channel] = field(default_factory=list)
    dialing: bool = False
    resume_until_s: float | None = None
    breaks: int = 0
    imports: dict[int, Import] = field(default_factory=dict)
    cancelled: list[int] = field(default_factory=list)

    def expecting(self, control: Channel) -> list[Channel]:
        """Return the connections beside `control` and it, when KV is to come over them, else none."""
        return list(self.channels) if self.imports and self.channel is control else []
