"""The native index against the Python one: the same operations and bytes, the same answers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import ANY

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from cache_service import native
from cache_service.core import index_evict
from cache_service.core.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from cache_service.core.events import BlocksRemoved, BlocksStored, Event, Group, GroupStored, Tier
from cache_service.core.ids import BlockHash, SourceId, WorkerId
from cache_service.core.index import PrefixIndex
from cache_service.core.index_types import Needs
from cache_service.native.index import DecodedBatch, NativeIndex, decode_page, missing
from cache_service.native.index import decode_batch as decode_plain
from cache_service.wire import worker_events
from cache_service.wire.kv_events import decode_batch
from tests.unit.cache_service.index_machine import SOURCES, BudgetMachine, IndexMachine, chain
from tests.unit.cache_service.test_kv_events import MSGPACK, RECORDED, STORED, encode
from tests.unit.cache_service.test_worker_events import EVENTS

pytestmark = pytest.mark.skipif(bool(missing), reason=f"no native core here: {missing}")

A, B = SOURCES[:2]


class BothMachine(IndexMachine):
    """Both cores against the model and each other; dumps of one rebuild the other."""

    factories = (PrefixIndex, NativeIndex, lambda: NativeIndex(sweep_blocks=1))


class NativeBudgetMachine(BudgetMachine):
    """The native core under a budget."""

    factories = (
        lambda: NativeIndex(budget_bytes=3000),
        lambda: NativeIndex(budget_bytes=3000, sweep_blocks=1),
    )


BOUNDED: tuple[Callable[[], PrefixIndex | NativeIndex], ...] = (
    lambda: PrefixIndex(budget_bytes=1 << 30),
    lambda: NativeIndex(budget_bytes=1 << 30),
    lambda: NativeIndex(budget_bytes=1 << 30, sweep_blocks=1),
)


class OrderMachine(IndexMachine):
    """What is evicted between other changes is the same in both cores, and nothing else goes with it."""

    factories = BOUNDED

    @rule(count=st.integers(1, 40))
    def evict(self, count: int) -> None:
        for _ in range(min(count, self.indexes[0].counts().blocks)):
            gone = {_evict_next(index) for index in self.indexes}
            assert len(gone) == 1
            assert None not in gone
            for holder in self.model.values():
                for held in holder.sets.values():
                    held.difference_update(gone)


def _evict_next(index: PrefixIndex | NativeIndex) -> int | None:
    if isinstance(index, NativeIndex):
        return index._core.evict_next()
    assert index._uses is not None
    return index_evict.evict_next(index, index._uses)


TestOrderMachine = OrderMachine.TestCase
TestOrderMachine.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestBothMachine = BothMachine.TestCase
TestBothMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestNativeBudgetMachine = NativeBudgetMachine.TestCase
TestNativeBudgetMachine.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize("make", BOUNDED)
@pytest.mark.parametrize(
    ("event", "order"),
    [
        (BlocksStored(chain(5), None), [2, 1, 0, 9, 5]),  # a leaf's place passes to its parent
        (BlocksStored(chain(5), BlockHash(9)), [2, 1, 0, 5, 9]),  # 9 gave its place up
        (BlocksRemoved(chain(2, 1)), [0, 9]),
        (BlocksRemoved(chain(1, 2)), [0, 9]),
        (BlocksRemoved(chain(1)), [2, 9, 0]),  # what went had no place: a use of 0
        (BlocksStored(chain(0), None), [2, 1, 9, 0]),  # its own place is later
    ],
)
def test_who_is_next(make: Callable[[], PrefixIndex | NativeIndex], event: Event, order: list[int]) -> None:
    """After 0, 1, 2 in a row, and 9 apart from them."""
    index = make()
    index.add(A)
    index.apply(A, BlocksStored(chain(0, 1, 2), None))
    index.apply(A, BlocksStored(chain(9), None))
    index.apply(A, event)
    assert [_evict_next(index) for _ in order] == order
    assert index.counts().blocks == 0


@pytest.mark.parametrize("seed", range(4))
def test_order_of_eviction(seed: int) -> None:
    """Few blocks and holders, many changes: every way in which a block comes by its place, or loses it."""
    rng = random.Random(seed)
    indexes = [make() for make in BOUNDED]
    parents = [None, *(rng.choice([number - 1, rng.randrange(number)]) for number in range(1, 14))]

    def path(block: int | None) -> list[int]:
        return [] if block is None else [*path(parents[block]), block]

    def act(index: PrefixIndex | NativeIndex, what: float, block: int, size: int) -> object:
        run = path(block)[-size:]
        above = parents[run[0]]
        if what < 0.4:
            return index.apply(source, BlocksStored(chain(*run), None if above is None else BlockHash(above)))
        if what < 0.6:
            return index.apply(source, BlocksRemoved(chain(*run)))
        if what < 0.7:
            return index.apply(source, BlocksRemoved(chain(*reversed(run))))
        if what < 0.9:
            return index.match(chain(*path(block)))
        return index.clear(source) if what < 0.95 else [_evict_next(index) for _ in range(left)]

    for _ in range(40_000):
        source, step = rng.choice([A, B]), (rng.random(), rng.randrange(len(parents)), rng.randint(1, 4))
        left = min(rng.choice([1, 2, 100]), indexes[0].counts().blocks)
        for index in indexes:
            index.add(source)
        said = [act(index, *step) for index in indexes]
        assert said[0] == said[1] == said[2]
    for index in indexes:
        index.check()


@pytest.mark.parametrize("holders", [3, 70, 300])
def test_many_holders_and_blocks(holders: int) -> None:
    """Sets wider than a word and than a set's inline room, growing tables, holders that come and go."""
    rng = random.Random(holders)
    both = (PrefixIndex(), NativeIndex(sweep_blocks=7))
    sources = [SourceId(WorkerId(f"w{rng.random()}"), i % 2) for i in range(holders)]
    chains = [chain(*range(c << 20, (c << 20) + 400)) for c in range(-4, 8)]
    for step in range(1500):
        source = sources[rng.randrange(1 + step * holders // 1500)]
        run = rng.choice(chains)
        first, last = sorted(rng.sample(range(len(run) + 1), 2))
        part, tier = run[first:last], rng.choice(list(Tier))
        event: Event = rng.choice(
            [
                BlocksStored(part, run[first - 1] if first else None, tier),
                BlocksStored(run[:last], None, tier),
                BlocksRemoved(run[first : first + 8], tier),
                GroupStored(rng.choice(list(Group)), part, tier),
            ]
        )
        for index in both:
            index.add(source)
            if step % 97 == 0:
                index.declare(source, step % 2 == 0, step % 5)
        answers = {index.apply(source, event) for index in both}
        assert len(answers) == 1
        if step % 50 == 0:
            for index in both:
                index.drop(source)
            both[1].check()
        query = (*run[: rng.randrange(len(run))], BlockHash(5 << 40))
        assert both[0].match(query, 300) == both[1].match(query, 300)
    assert both[0].counts() == both[1].counts()
    assert both[0].nodes() == both[1].nodes()
    said = [{(s, type(e), e.tier, b) for s, e in index.dump() for b in e.hashes} for index in both]
    assert said[0] == said[1]
    for index in (*both, both[1].copy()):
        index.check()
        for source in index.sources():
            index.drop(source)
        index.check()
    assert both[1].bytes_estimate == 0


def test_what_a_clear_leaves_is_swept() -> None:
    """Answers and sizes are right at once; the memory comes back with the changes that follow."""
    index = NativeIndex(sweep_blocks=100)
    for source in (A, B):
        index.add(source)
    for first in range(0, 20_000, 200):
        index.apply(A, BlocksStored(chain(*range(first, first + 200)), None))
        index.apply(B, BlocksStored(chain(*range(first, first + 10)), None))
    full = index.bytes_estimate
    assert index.clear(A) == 20_000
    assert (index.counts().blocks, index.counts().entries, index.nodes()) == (1000, 1000, 100)
    assert index.match(chain(*range(200))) == [(B, 10, 10)]
    assert index.bytes_estimate > 0.9 * full
    index.apply(A, BlocksStored(chain(*range(100, 120)), BlockHash(7)))  # elsewhere than before
    assert index.match(chain(*range(100, 120))) == [(A, 20, 20)]
    index.check()
    for _ in range(200):
        index.apply(B, BlocksStored(chain(0), None))
        index.apply(B, BlocksRemoved(chain(0)))
    index.check()
    assert index.bytes_estimate < 0.1 * full
    with pytest.raises(ConfigError, match="sweep_blocks: 0"):
        NativeIndex(sweep_blocks=0)


def test_cycle_of_lies() -> None:
    """Blocks that claim each other as parent are counted, evicted and cleared like others."""
    index, bounded = NativeIndex(), NativeIndex(budget_bytes=200)
    for one in (index, bounded):
        one.add(A)
        one.apply(A, BlocksStored(chain(1), BlockHash(2)))
        one.apply(A, BlocksStored(chain(2), BlockHash(1)))
        one.check()
    assert index.nodes() == 2
    assert sum(len(event.hashes) for _, event in index.dump()) == 2
    assert index.clear(A) == 2
    assert bounded.evicted_blocks == 0
    bounded.apply(A, GroupStored(Group.STATE, chain(3)))
    assert bounded.evicted_blocks > 0
    bounded.check()


def test_budget_evicts_the_leaf_used_longest_ago() -> None:
    """What was matched last stays; a chain goes from its end."""
    index = NativeIndex(budget_bytes=4000)
    index.add(A)
    for first in range(0, 60, 10):
        index.apply(A, BlocksStored(chain(*range(first, first + 10)), None))
    assert index.evicted_blocks == 0
    index.match(chain(*range(10)))
    index.apply(A, BlocksStored(chain(*range(100, 140)), None))
    assert 0 < index.evicted_blocks < 30
    assert index.match(chain(*range(10)))[0].matched == 10
    left = index.match(chain(*range(10, 20)))
    assert not left or left[0].matched < 10
    index.check()


def test_what_is_refused() -> None:
    """As by the Python core: by name."""
    index = NativeIndex()
    with pytest.raises(LocalProtocolError, match="not registered"):
        index.clear(A)
    index.add(A)
    with pytest.raises(ConfigError, match="swa_window_blocks"):
        index.declare(A, needs_state=True, swa_window_blocks=-1)
    with pytest.raises(ConfigError, match="budget_bytes"):
        NativeIndex(budget_bytes=-1)
    index.apply(A, BlocksStored(chain(1), None))
    index.declare(A, needs_state=False, swa_window_blocks=1 << 40)
    assert index.match((BlockHash(1), BlockHash(1 << 64))) == [(A, 1, 0)]


class TestBatches:
    """A batch that C++ takes is what Python would have decoded; what Python refuses, C++ leaves to it."""

    @staticmethod
    def same(payload: bytes) -> DecodedBatch | None:
        plain = decode_plain(payload, page_size=4, dp_rank=0)
        if plain is not None:
            expected = decode_batch(payload, page_size=4, dp_rank=0)
            assert expected.refused == ()
            assert plain.sent_unix_s == expected.sent_unix_s or plain.sent_unix_s != plain.sent_unix_s
            assert tuple(plain.event(i) for i in range(len(plain))) == expected.events
        return plain

    def test_all_kinds(self) -> None:
        """Whatever SGLang sends is plain."""
        odd = {**STORED, "block_hashes": [7], "parent_block_hash": -2, "token_ids": [[1, 2]] * 4}
        removed = [{"type": "BlockRemoved", "block_hashes": [3], "medium": m} for m in ("DISK", "CPU", None)]
        plain = self.same(encode(STORED, odd, *removed, {"type": "AllBlocksCleared"}))
        assert plain is not None
        assert len(plain) == 6
        assert self.same(msgspec.msgpack.encode([12.5, [STORED]])) is not None
        assert self.same(msgspec.msgpack.encode([12.5, [STORED], None])) is not None

    @pytest.mark.parametrize(
        "change",
        [
            {"block_size": 8},
            {"block_hashes": []},
            {"block_hashes": [1, 2, 1]},
            {"block_hashes": [*range(20), 7]},
            {"block_hashes": [2**63]},
            {"parent_block_hash": 1},
            {"medium": "TAPE"},
            {"type": "BlockMoved"},
            {"block_hashes": [1.5]},
        ],
    )
    def test_what_is_wrong_goes_to_python(self, change: dict[str, object]) -> None:
        """Each kind of event that Python refuses."""
        payload = encode(STORED, {**STORED, **change})
        assert self.same(payload) is None
        assert decode_batch(payload, page_size=4, dp_rank=0).refused

    def test_recorded(self) -> None:
        """Bytes of SGLang's own encoder; its event of an unknown medium goes to Python."""
        plain = decode_plain(RECORDED, page_size=4, dp_rank=0)
        refused = decode_batch(RECORDED, page_size=4, dp_rank=0).refused
        assert (plain is None) == bool(refused)

    @given(st.lists(st.dictionaries(st.sampled_from([*STORED, "x"]), MSGPACK), max_size=3), MSGPACK)
    def test_any_fields(self, changes: list[dict[str, object]], rank: object) -> None:
        """Events with wrong values anywhere."""
        self.same(encode(*({**STORED, **change} for change in changes)))
        self.same(encode(*({**STORED, **change} for change in changes), rank=rank))

    @given(st.data())
    def test_any_bytes(self, data: st.DataObject) -> None:
        """A batch cut short, or with bytes changed: never more than Python takes."""
        payload = bytearray(RECORDED if data.draw(st.booleans()) else encode(STORED, STORED))
        for _ in range(data.draw(st.integers(0, 3))):
            payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
        cut = data.draw(st.none() | st.integers(0, len(payload)))
        taken = bytes(payload[:cut])
        try:
            decode_batch(taken, page_size=4, dp_rank=0)
        except RemoteProtocolError:
            assert decode_plain(taken, page_size=4, dp_rank=0) is None
        else:
            self.same(taken)

    def test_apply(self) -> None:
        """Applied in order, event by event; another rank's batch is left to Python."""
        removed = {"type": "BlockRemoved", "block_hashes": [-2, 9]}
        payload = encode(STORED, removed, {"type": "AllBlocksCleared"})
        both = (PrefixIndex(), NativeIndex())
        for index in both:
            index.add(A)
        batch = decode_batch(payload, page_size=4, dp_rank=0)
        expected = [both[0].apply(A, event) for event in batch.events]
        plain = decode_plain(payload, page_size=4, dp_rank=0)
        assert plain is not None
        assert both[1].apply_decoded(A, plain) == expected
        assert both[1].revision == both[0].revision
        assert decode_plain(payload, page_size=4, dp_rank=1) is None
        with pytest.raises(LocalProtocolError, match="not registered"):
            both[1].apply_decoded(B, plain)


class TestWorkerBatches:
    """The plugin's batches and the pages of its dumps."""

    @staticmethod
    def same(payload: bytes) -> DecodedBatch | None:
        plain = decode_plain(payload, page_size=16, dp_rank=0, format="prfaas")
        if plain is not None:
            expected = worker_events.decode_batch(payload, page_size=16, dp_rank=0)
            assert (expected.refused, plain.needs) == ((), expected.needs)
            assert plain.sent_unix_s == expected.sent_unix_s or plain.sent_unix_s != plain.sent_unix_s
            assert tuple(plain.event(i) for i in range(len(plain))) == expected.events
        return plain

    @staticmethod
    def same_page(payload: bytes) -> None:
        plain = decode_page(payload, page_size=16)
        if plain is not None:
            expected = worker_events.decode_page(payload, page_size=16)
            events = tuple(plain.batch.event(i) for i in range(len(plain.batch)))
            assert (expected.batch.refused, plain.batch.needs) == ((), expected.batch.needs)
            assert replace(plain, batch=events) == replace(expected, batch=expected.batch.events)

    @given(st.lists(EVENTS, max_size=6), st.booleans(), st.integers(0, 1 << 40))
    def test_all_kinds(self, events: list[worker_events.Item], state: bool, window: int) -> None:
        """What the plugin encodes, batch or dump, is plain, and applied as Python applies it."""
        events.insert(len(events) // 2, worker_events.Declaration(16, Needs(state, window)))
        payload = worker_events.encode_batch(12.5, 0, events)
        plain = self.same(payload)
        assert plain is not None
        both = (PrefixIndex(), NativeIndex())
        for index in both:
            index.add(A)
        expected = [
            both[0].apply(A, e) for e in worker_events.decode_batch(payload, page_size=16, dp_rank=0).events
        ]
        assert both[1].apply_decoded(A, plain) == expected
        assert both[0].counts() == both[1].counts()
        both[1].check()
        for page in worker_events.encode_dump(5, 7, payload, events):
            found = decode_page(page, page_size=16)
            assert found is not None
            assert (found.dump, found.page, found.pages, found.seq, found.anchor) == (5, 0, 1, 7, payload)
            self.same_page(page)

    @pytest.mark.parametrize(
        "event",
        [
            [1, b"1234567", None, 0],
            [1, b"", None, 0],
            [1, b"12345678", None, 4],
            [1, b"12345678", 0x3837363534333231, 0],
            [1, b"12345678", 1 << 63, 0],
            [2, b"12345678" * 2, 0],
            [2, b"12345678", -1],
            [3, "kv", b"12345678", 0],
        ],
    )
    def test_what_is_wrong_goes_to_python(self, event: list[object]) -> None:
        """Each kind of event that Python refuses."""
        payload = msgspec.msgpack.encode([1, 1.0, 0, [[5], event]])
        assert self.same(payload) is None
        assert worker_events.decode_batch(payload, page_size=16, dp_rank=0).refused

    @pytest.mark.parametrize(
        "batch",
        [
            [2, 1.0, 0, []],
            [1, 1.0, 1, []],
            [1, 1.0, 0, [[0, 64, True, 0]]],
            [1, 1.0, 0, [[0, 16, True, -1]]],
            [1, 1.0, 0, [[6]]],
            [1, 1.0, 0, [[1, "12345678", None, 0]]],
        ],
    )
    def test_no_batch_goes_to_python(self, batch: list[object]) -> None:
        """Each reason to refuse a batch whole."""
        payload = msgspec.msgpack.encode(batch)
        assert self.same(payload) is None
        with pytest.raises(RemoteProtocolError):
            worker_events.decode_batch(payload, page_size=16, dp_rank=0)

    @pytest.mark.parametrize(("page", "pages"), [(1, 1), (-1, 2), (0, 4097), (1, 0)])
    def test_pages_that_cannot_be(self, page: int, pages: int) -> None:
        """A page beyond the last, or of too many; the answer for a dump that is gone is plain."""
        payload = msgspec.msgpack.encode([1, 5, page, pages, 7, b"", []])
        assert decode_page(payload, page_size=16) is None
        with pytest.raises(RemoteProtocolError, match="page: "):
            worker_events.decode_page(payload, page_size=16)
        assert decode_page(worker_events.gone(4), page_size=16) == replace(
            worker_events.decode_page(worker_events.gone(4), page_size=16), batch=ANY
        )

    @given(st.data())
    def test_any_bytes(self, data: st.DataObject) -> None:
        """A payload cut short, or with bytes changed: never more than Python takes."""
        events = [worker_events.Declaration(16, Needs(True, 3)), *data.draw(st.lists(EVENTS, max_size=3))]
        page = data.draw(st.booleans())
        whole = (
            worker_events.encode_dump(5, 7, b"a", events)[0]
            if page
            else worker_events.encode_batch(1.5, 0, events)
        )
        payload = bytearray(whole)
        for _ in range(data.draw(st.integers(0, 3))):
            payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
        taken = bytes(payload[: data.draw(st.none() | st.integers(0, len(payload)))])
        (self.same_page if page else self.same)(taken)  # raises what Python raises for what C++ took

    @given(st.lists(st.lists(MSGPACK, max_size=5), max_size=3))
    def test_any_events(self, events: list[list[object]]) -> None:
        """Events of any values."""
        self.same(msgspec.msgpack.encode([1, 1.0, 0, events]))


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable decides; another word is refused with those there are."""
    for choice, kind in (("", NativeIndex), ("auto", NativeIndex), ("python", PrefixIndex)):
        monkeypatch.setenv(native.VARIABLE, choice)
        assert type(native.make_index()) is kind
    monkeypatch.setenv(native.VARIABLE, "rust")
    with pytest.raises(ConfigError, match=r"PRFAAS_INDEX.*python, native, auto"):
        native.make_index()


def test_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto means Python then, and native says why not."""
    monkeypatch.setattr("cache_service.native.index.missing", "no module named _index")
    monkeypatch.setenv(native.VARIABLE, "auto")
    assert native.core_name() == "python"
    monkeypatch.setenv(native.VARIABLE, "native")
    with pytest.raises(ConfigError, match="not compiled here: no module"):
        native.core_name()
