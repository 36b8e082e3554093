"""The watch state machine against a model of etcd: any history, any fragments, any cuts."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_service.core.errors import LocalProtocolError, RemoteProtocolError
from cache_service.etcd.core.errors import AuthFailed, Compacted, PermissionDenied, TokenRejected
from cache_service.etcd.core.model import Changes, Event, EventKind, KeyValue, Progress
from cache_service.etcd.core.watching import Answer, State, WatchState


def event(revision: int, index: int) -> Event:
    return Event(EventKind.PUT, KeyValue(b"%d" % index, b"", revision, revision, 1, 0))


def answer(
    revision: int,
    *,
    events: tuple[Event, ...] = (),
    watch_id: int = 0,
    created: bool = False,
    canceled: bool = False,
    compact_revision: int = 0,
    reason: str = "",
    fragment: bool = False,
) -> Answer:
    return Answer(revision, watch_id, created, canceled, compact_revision, reason, fragment, events)


@dataclass
class ModelServer:
    """etcd's side of one stream: batches of whole revisions, cut into fragments, the newest in headers."""

    history: dict[int, list[Event]]
    newest: int
    place: int  # the next revision to send

    def responses(self, batch_revisions: int, fragment_events: int) -> list[Answer]:
        due = [r for r in sorted(self.history) if r >= self.place][:batch_revisions]
        events = [e for r in due for e in self.history[r]]
        if not events:
            self.place = self.newest + 1
            return [answer(self.newest)]  # synced: progress
        self.place = due[-1] + 1
        pieces = [tuple(events[i : i + fragment_events]) for i in range(0, len(events), fragment_events)]
        return [
            answer(self.newest, events=piece, fragment=i + 1 < len(pieces)) for i, piece in enumerate(pieces)
        ]


@given(
    revisions=st.dictionaries(st.integers(2, 60), st.integers(1, 6), max_size=25),
    steps=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 5), st.integers(0, 12)), max_size=30),
    unsound=st.booleans(),
)
def test_every_event_once_in_order(
    revisions: dict[int, int], steps: list[tuple[int, int, int]], unsound: bool
) -> None:
    """Whatever is cut and wherever, what is handed on is the history, whole revisions at a time."""
    history = {r: [event(r, i) for i in range(count)] for r, count in revisions.items()}
    newest = 61
    state = WatchState(2)
    got: list[Event] = []
    # The last step sends everything uncut.
    for batch, pieces, survive in [*steps, (1000, 1000, 1000), (1000, 1000, 1000)]:
        server = ModelServer(history, newest, state.next_revision)
        state.take(answer(newest, created=True), progress_sound=not unsound)
        sent = [*server.responses(batch, pieces), *server.responses(batch, pieces)]
        if unsound:  # an answer to a progress request that runs ahead of what is still to be sent
            sent.insert(1, answer(newest, watch_id=-1))
        for response in sent[:survive]:
            before = state.next_revision
            found = state.take(response, progress_sound=not unsound)
            if isinstance(found, Changes):
                assert found.events[0].kv.mod_revision >= before
                for revision in {e.kv.mod_revision for e in found.events}:
                    assert [e for e in found.events if e.kv.mod_revision == revision] == history[revision]
                assert found.revision == found.events[-1].kv.mod_revision == state.next_revision - 1
                got += found.events
        state.cut()
        assert state.state is State.OPENING
    assert got == [e for r in sorted(history) for e in history[r]]
    assert state.duplicates == 0
    assert state.next_revision == newest + 1


def opened(start: int = 5, newest: int = 9) -> WatchState:
    state = WatchState(start)
    assert state.take(answer(newest, created=True), progress_sound=True) is None
    return state


def test_created_says_how_far_behind() -> None:
    """The distance to the store's newest revision, none for a watch from the future."""
    assert opened(5, 9).behind == 5
    assert opened(20, 9).behind == 0


def test_progress_moves_the_place_only_when_sound() -> None:
    """The server's own notification counts always, an answer to our question only from a sound release."""
    state = opened()
    assert state.take(answer(9, watch_id=-1), progress_sound=False) is None
    assert state.next_revision == 5
    assert state.take(answer(9, watch_id=-1), progress_sound=True) == Progress(9)
    assert state.take(answer(12), progress_sound=False) == Progress(12)
    assert state.next_revision == 13
    # From a member that lags behind the one before.
    assert state.take(answer(10), progress_sound=True) is None
    assert state.next_revision == 13


def test_no_progress_in_the_middle_of_a_revision() -> None:
    """While a revision is unfinished nothing is concluded from a response without events."""
    state = opened()
    assert state.take(answer(9, events=(event(6, 0),), fragment=True), progress_sound=True) is None
    assert state.take(answer(9, watch_id=-1), progress_sound=True) is None
    found = state.take(answer(9, events=(event(6, 1),)), progress_sound=True)
    assert found == Changes(6, (event(6, 0), event(6, 1)))


def test_what_comes_twice_is_dropped() -> None:
    """Events below the place to resume at are not handed on again."""
    state = opened()
    state.take(answer(9, events=(event(6, 0),)), progress_sound=True)
    found = state.take(answer(9, events=(event(6, 0), event(7, 0))), progress_sound=True)
    assert found == Changes(7, (event(7, 0),))
    assert state.duplicates == 1


@pytest.mark.parametrize(
    ("canceled", "error", "after"),
    [
        (answer(9, canceled=True, compact_revision=7), Compacted, State.ENDED),
        (
            answer(9, created=True, canceled=True, reason="etcdserver: permission denied"),
            PermissionDenied,
            State.ENDED,
        ),
        (
            answer(9, canceled=True, reason="rpc error: code = X desc = etcdserver: invalid auth token"),
            TokenRejected,
            State.OPENING,
        ),
        (answer(9, canceled=True, reason="etcdserver: user name is empty"), AuthFailed, State.ENDED),
        (answer(9, canceled=True), RemoteProtocolError, State.ENDED),
    ],
)
def test_cancellations(canceled: Answer, error: type[Exception], after: State) -> None:
    """Each kind of cancellation is its own error."""
    state = WatchState(5)
    with pytest.raises(error):
        state.take(canceled, progress_sound=True)
    assert state.state is after


def test_a_server_out_of_order_is_caught() -> None:
    """Events before creation, revisions backwards, a revision without end: errors, not silence."""
    with pytest.raises(RemoteProtocolError, match="before the watch was created"):
        WatchState(5).take(answer(9, events=(event(6, 0),)), progress_sound=True)
    state = opened()
    with pytest.raises(RemoteProtocolError, match="revision 6 after 7"):
        state.take(answer(9, events=(event(7, 0), event(6, 0))), progress_sound=True)
    with pytest.raises(LocalProtocolError, match="has ended"):
        state.take(answer(9), progress_sound=True)
    state = WatchState(5, max_held_events=3)
    state.take(answer(9, created=True), progress_sound=True)
    with pytest.raises(RemoteProtocolError, match="more than 3 events"):
        state.take(answer(9, events=tuple(event(6, i) for i in range(4)), fragment=True), progress_sound=True)
    with pytest.raises(LocalProtocolError, match="not above 0"):
        WatchState(0)
