"""A watch across cut connections: which revision to resume at, what to hand on, when to list again.

The facts this rests on (etcd 3.4 to 3.6, measured on 3.5.16):
* Events come in order of revision. A response's header carries the store's current revision, not that of its
  events: only an event's own revision, or a progress notification, may move the place to resume at.
* With `fragment` a response may end in the middle of a revision, and says so. The rest follows on the same
  stream. What is handed on is whole revisions; an unfinished one is kept back, and dropped when the stream is
  cut.
* A watch from a compacted revision is answered by `created`, then by `canceled` with `compact_revision`; the
  stream stays open and silent.
* A refusal (permissions, login) is `canceled` with a reason, in the `created` answer.

    OPENING --created--> OPEN --cut--> OPENING ...
       |                  |
       +--- canceled -----+--> ENDED (Compacted or refused)
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from cache_service.core.errors import LocalProtocolError, RemoteProtocolError
from cache_service.etcd.core.errors import Compacted, EtcdUnavailable, TokenRejected, canceled
from cache_service.etcd.core.model import Changes, Event, Progress


@dataclass(frozen=True, slots=True)
class Answer:
    """A watch response, decoded."""

    revision: int
    watch_id: int
    created: bool
    canceled: bool
    compact_revision: int
    reason: str
    fragment: bool
    events: tuple[Event, ...]


class State(Enum):
    """Where a watch is."""

    OPENING = "opening"
    OPEN = "open"
    ENDED = "ended"


class WatchState:
    """The state machine of one watch; its stream carries no other."""

    def __init__(self, start_revision: int, *, max_held_events: int = 1_000_000) -> None:
        if start_revision < 1:
            raise LocalProtocolError(f"watch: start revision {start_revision} is not above 0")
        self._next = start_revision
        self._held: list[Event] = []
        self._max_held = max_held_events
        self.state = State.OPENING
        #: Events that came twice and were not handed on: 0 with every etcd known.
        self.duplicates = 0
        #: By how many revisions the store was ahead when the stream was opened.
        self.behind = 0
        #: The member's newest revision when the stream was opened.
        self.newest = 0

    @property
    def next_revision(self) -> int:
        """The revision to open the watch at: everything below has been handed on."""
        return self._next

    def cut(self) -> None:
        """Note that the stream is gone: what is held back will come again."""
        self._held.clear()
        if self.state is State.OPEN:
            self.state = State.OPENING

    def reopen(self) -> None:
        """Open once more after a refusal that may not stand."""
        self._held.clear()
        self.state = State.OPENING

    def take(self, answer: Answer, *, progress_sound: bool) -> Changes | Progress | None:
        """Take an answer in and return what to hand on.

        `progress_sound` says that answers to progress requests may be believed (retry.progress_is_sound).
        Raises Compacted, PermissionDenied, AuthFailed or RemoteProtocolError, which end the watch, and
        TokenRejected or EtcdUnavailable, after which it is to be opened again.
        """
        if self.state is State.ENDED:
            raise LocalProtocolError("watch: it has ended")
        if answer.canceled:
            error = self._cancellation(answer)
            cured = isinstance(error, TokenRejected | EtcdUnavailable)
            self.state = State.OPENING if cured else State.ENDED
            raise error
        if answer.created:
            self.state = State.OPEN
            self.newest = answer.revision
            self.behind = max(answer.revision + 1 - self._next, 0)
            return None
        if self.state is State.OPENING:
            self.state = State.ENDED
            raise RemoteProtocolError("etcd watch: an answer before the watch was created")
        if answer.events:
            return self._events(answer)
        if self._held or answer.fragment:
            return None  # in the middle of a revision nothing can be concluded
        # A negative id answers a request for progress, the watch's own id is the server's own notification.
        if (answer.watch_id >= 0 or progress_sound) and answer.revision >= self._next - 1:
            self._next = answer.revision + 1
            return Progress(answer.revision)
        return None

    def _events(self, answer: Answer) -> Changes | None:
        held = self._held
        last = held[-1].kv.mod_revision if held else 0
        for event in answer.events:
            revision = event.kv.mod_revision
            if revision < last:
                self.state = State.ENDED
                raise RemoteProtocolError(f"etcd watch: revision {revision} after {last}")
            last = revision
            if revision < self._next:
                self.duplicates += 1
            else:
                held.append(event)
        if len(held) > self._max_held:
            self.state = State.ENDED
            raise RemoteProtocolError(f"etcd watch: one revision holds more than {self._max_held} events")
        whole = len(held)
        if answer.fragment:
            while whole and held[whole - 1].kv.mod_revision == last:
                whole -= 1
        if not whole:
            return None
        events, self._held = tuple(held[:whole]), held[whole:]
        revision = events[-1].kv.mod_revision
        self._next = revision + 1
        return Changes(revision, events)

    def _cancellation(self, answer: Answer) -> Exception:
        if answer.compact_revision:
            return Compacted(
                f"etcd watch: revision {self._next} is compacted, the oldest is {answer.compact_revision}",
                compact_revision=answer.compact_revision,
            )
        return canceled(answer.reason, what="watch")
