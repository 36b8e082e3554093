"""The sequencer against a publisher that loses, restarts and forgets."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from cache_service.core.sequencing import Sequencer, Step


class Publisher:
    """SGLang's publisher as a model: a ring, and a replay that answers from the oldest batch it has."""

    def __init__(self, ring: int) -> None:
        self.ring_size, self.epoch, self.clock = ring, 0, 0.0
        self.history: list[tuple[int, bytes, float]] = []

    def publish(self) -> tuple[int, bytes, float]:
        self.clock += 1
        seq = len(self.history)
        self.history.append((seq, f"{self.epoch}:{seq}".encode(), self.clock))
        return self.history[-1]

    def restart(self) -> None:
        self.epoch += 1
        self.history.clear()

    def replay(self, start: int) -> list[tuple[int, bytes, float]]:
        return [batch for batch in self.history[-self.ring_size :] if batch[0] >= start]


class Reader:
    """What the shell does with the steps; `applied` is what it knows since it last dropped everything."""

    def __init__(self, publisher: Publisher) -> None:
        self.publisher, self.sequencer = publisher, Sequencer()
        self.applied: list[bytes] = []

    def live(self, batch: tuple[int, bytes, float], drops: list[bool]) -> None:
        step = self.sequencer.live(*batch)
        if step is Step.REPLAY:
            self.synchronise(drops)
            step = self.sequencer.live(*batch)
        if step is Step.APPLY:
            self.applied.append(batch[1])

    def synchronise(self, drops: list[bool]) -> None:
        """Ask until done; `drops` says which messages of the answers are lost on the way."""
        for _ in range(len(drops) + len(self.publisher.history) + 5):
            if self._round(drops) is Step.DONE:
                return
        raise AssertionError("a replay that never ends")

    def _round(self, drops: list[bool]) -> Step:
        for batch in self.publisher.replay(self.sequencer.begin_replay()):
            if drops and drops.pop():
                continue
            step = self.sequencer.replayed(*batch)
            if step is Step.LOST:
                self.applied.clear()
            if step in (Step.APPLY, Step.LOST):
                self.applied.append(batch[1])
            elif step is Step.RESTART:
                self.applied.clear()
                return step
            elif step is Step.AGAIN:
                return step
        step = self.sequencer.replay_end()
        if step is Step.RESTART:
            self.applied.clear()
        return step


ACTION = st.one_of(
    st.just("publish"),
    st.just("publish"),
    st.just("lose"),
    st.just("lose"),
    st.just("restart"),
    st.just("late"),
    st.just("probe"),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(ACTION, max_size=60), st.integers(1, 12), st.lists(st.booleans(), max_size=20))
def test_converges_to_the_publisher(actions: list[str], ring: int, drops: list[bool]) -> None:
    """Whatever was lost, after a quiet probe the reader knows an unbroken end of this life's history.

    All of it, unless it says that the history is truncated; and nothing of an earlier life.
    """
    publisher = Publisher(ring)
    reader = Reader(publisher)
    for action in actions:
        if action == "publish":
            reader.live(publisher.publish(), drops)
        elif action == "lose":
            publisher.publish()
        elif action == "restart":
            publisher.restart()
            reader.synchronise(drops)
        elif action == "late" and publisher.history:
            reader.live(publisher.history[len(publisher.history) // 2], drops)
        elif action == "probe":
            reader.synchronise(drops)
    reader.synchronise([])
    history = [payload for _, payload, _ in publisher.history]
    known = reader.applied
    assert known == history[len(history) - len(known) :]
    assert known or not history
    if not reader.sequencer.truncated:
        assert known == history
    assert reader.sequencer.next_seq == len(history)


def test_duplicates_and_late_batches_are_skipped() -> None:
    """A batch seen before, or older than the last one, changes nothing."""
    sequencer = Sequencer()
    assert sequencer.live(0, b"a", 1.0) is Step.APPLY
    assert sequencer.live(1, b"b", 2.0) is Step.APPLY
    assert sequencer.live(1, b"b", 2.0) is Step.SKIP
    assert sequencer.live(0, b"a", 1.0) is Step.SKIP
    assert sequencer.live(0, b"?", None) is Step.SKIP
    assert sequencer.next_seq == 2


def test_lower_number_published_later_is_suspect() -> None:
    """Only a new life counts again from a lower number at a later time: ask, do not skip."""
    sequencer = Sequencer()
    sequencer.live(0, b"a", 1.0)
    assert sequencer.live(0, b"new life", 5.0) is Step.REPLAY


def test_new_life_with_as_many_batches() -> None:
    """A new life that has reached the same number is told by the payload under it."""
    sequencer = Sequencer()
    sequencer.live(0, b"a", 1.0)
    assert sequencer.begin_replay() == 0
    assert sequencer.replayed(0, b"other", 2.0) is Step.RESTART
    assert sequencer.begin_replay() == 0
    assert sequencer.replayed(0, b"other", 2.0) is Step.APPLY


def test_new_life_with_fewer_batches() -> None:
    """An answer without even the anchor comes from a new life."""
    sequencer = Sequencer()
    for seq in range(3):
        sequencer.live(seq, bytes([seq]), float(seq))
    assert sequencer.begin_replay() == 2
    assert sequencer.replay_end() is Step.RESTART
    assert sequencer.next_seq == 0


def test_nothing_published_yet() -> None:
    """The end mark alone, before anything was known, means that there is nothing to know."""
    sequencer = Sequencer()
    assert sequencer.begin_replay() == 0
    assert sequencer.replay_end() is Step.DONE
    assert sequencer.live(0, b"a", 1.0) is Step.APPLY


def test_without_a_replay() -> None:
    """A stream without replay goes on from any batch and says that its past is missing."""
    sequencer = Sequencer()
    assert sequencer.live(7, b"a", 1.0) is Step.REPLAY
    sequencer.skip_to(7, b"a", 1.0)
    assert sequencer.truncated
    assert sequencer.live(8, b"b", 2.0) is Step.APPLY
