"""Device pools against host pools: the same bytes, whatever the rows, their order, and who else is at it.

The row operations are torch's, on CPU tensors; streams are threads, so that what is queued happens later.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_service.core.errors import ConfigError, LocalProtocolError, TransferError
from prfaas_sglang.core.layout import Component, Layout
from prfaas_sglang.engine.cuda import PIECE_BYTES, anonymous, early_event, early_send, pieces, pool_of
from prfaas_sglang.transfer import device as subject
from prfaas_sglang.transfer.device import DeviceMemory, Pool
from prfaas_sglang.transfer.memory import RowCopy, RowMemory
from tests.thread_device import WAIT_S, ThreadDevice, ThreadEvent

ROWS = 64
ROW_BYTES = (1, 6, 12, 64, 4096)
LAYOUT = Layout("test", "tiny", 64, "uint8", 1, (Component("kv", ROW_BYTES), Component("aux", (24,))))
SHORT = LAYOUT.components[0].row_bytes.index(64)


class Twins:
    """The same pools twice: in host memory, and behind a device (aux in host memory there as well)."""

    def __init__(self, seed: int = 0) -> None:
        rng = random.Random(seed)
        data = [[rng.randbytes(size * ROWS) for size in c.row_bytes] for c in LAYOUT.components]
        self.plain = [[bytearray(d) for d in tensors] for tensors in data]
        self.tensors = [torch.frombuffer(bytearray(d), dtype=torch.uint8) for d in data[0]]
        self.aux = bytearray(data[1][0])
        self.host = RowMemory(LAYOUT, [[memoryview(d) for d in tensors] for tensors in self.plain])
        self.device = ThreadDevice()
        self.pools: list[list[Pool | memoryview]] = [
            [pool_of(t, size) for t, size in zip(self.tensors, ROW_BYTES, strict=True)],
            [memoryview(self.aux)],
        ]
        self.memory = DeviceMemory(LAYOUT, self.pools, self.device)

    def close(self) -> None:
        self.device.close()

    def bytes_of(self, component: int, tensor: int) -> bytes:
        if component == 1:
            return bytes(self.aux)
        return self.tensors[tensor].numpy().tobytes()

    def assert_equal(self) -> None:
        for component, tensors in enumerate(self.plain):
            for tensor, wanted in enumerate(tensors):
                assert self.bytes_of(component, tensor) == wanted


@pytest.fixture
def twins() -> Iterator[Twins]:
    with closing(Twins()) as value:
        yield value


@pytest.fixture(autouse=True, params=["gathered", "in runs"])
def small_steps(request: pytest.FixtureRequest) -> Iterator[None]:
    """Exercise both ways for rows, and cut copies to staging memory into several, with these small pools."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "FEW_RUNS", 0 if request.param == "gathered" else 4)
        patch.setattr(subject, "LONG_RUN_BYTES", 1 << 30 if request.param == "gathered" else 256)
        patch.setattr(subject, "COPY_BYTES", 1024)
        yield


def tensors() -> st.SearchStrategy[tuple[int, int]]:
    return st.sampled_from(
        [(c, t) for c, comp in enumerate(LAYOUT.components) for t in range(len(comp.row_bytes))]
    )


def rows(*, unique: bool = False) -> st.SearchStrategy[list[int]]:
    """Scattered rows in any order, and runs of neighbours."""
    scattered = st.lists(st.integers(0, ROWS - 1), max_size=ROWS, unique=unique)
    run = st.tuples(st.integers(0, ROWS - 1), st.integers(1, ROWS)).map(
        lambda run: list(range(run[0], min(ROWS, sum(run))))
    )
    return scattered | run


def size_of(component: int, tensor: int) -> int:
    return LAYOUT.components[component].row_bytes[tensor]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(tensors(), rows()), max_size=5))
def test_reading_gives_the_bytes_that_host_pools_give(jobs: list[tuple[tuple[int, int], list[int]]]) -> None:
    """In order, repeated rows as well; and so does `copy_out`, of all of them together."""
    with closing(Twins(1)) as twins:
        wanted = []
        for (component, tensor), numbers in jobs:
            with twins.host.reading(None, component, tensor, numbers) as views:
                wanted.append(b"".join(views))
            with twins.memory.reading(twins.memory.mark(), component, tensor, numbers) as views:
                assert b"".join(views) == wanted[-1]
        out = twins.memory.host_memory(1 + sum(len(w) for w in wanted))
        copies, at = [], 0
        for ((component, tensor), numbers), w in zip(jobs, wanted, strict=True):
            copies.append(RowCopy(component, tensor, numbers, out[at : at + len(w)]))
            at += len(w)
        twins.memory.copy_out(twins.memory.mark(), copies)
        assert bytes(out[:at]) == b"".join(wanted)
        twins.memory.settle()
        assert twins.memory.ring.used_bytes == 0


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(tensors(), rows(unique=True), st.sampled_from(["land", "drop", "lose"])), max_size=6)
)
def test_landing_writes_what_host_pools_get(jobs: list[tuple[tuple[int, int], list[int], str]]) -> None:
    """What lands is there after `settle`; what is dropped or forgotten leaves no byte and no slot behind."""
    with closing(Twins(2)) as twins:
        rng = random.Random(3)
        for (component, tensor), numbers, end in jobs:
            if component == 1 and end != "land":
                continue  # host rows are received where they stay
            data = rng.randbytes(size_of(component, tensor) * len(numbers))
            for memory in [twins.host, twins.memory] if end == "land" else [twins.memory]:
                landing, left = memory.landing(component, tensor, numbers), data
                for view in landing.views:
                    view[:] = left[: len(view)]
                    left = left[len(view) :]
                assert not left
                if end != "lose":
                    getattr(landing, end)()
            del landing
        twins.memory.settle()
        twins.assert_equal()
        assert twins.memory.ring.used_bytes == 0


@pytest.mark.parametrize("row", [-1, ROWS])
def test_a_row_outside_a_pool_is_refused(twins: Twins, row: int) -> None:
    """Before anything is queued, for every way in and out, on the device and on the host."""
    for component, tensor in ((0, SHORT), (1, 0)):
        with pytest.raises(LocalProtocolError, match=f"row {row} outside a pool of {ROWS}"):
            twins.memory.reading(None, component, tensor, [0, row]).__enter__()
        with pytest.raises(LocalProtocolError, match=f"row {row} outside"):
            twins.memory.landing(component, tensor, [row, 0])
        out = memoryview(bytearray(2 * size_of(component, tensor)))
        with pytest.raises(LocalProtocolError, match=f"row {row} outside"):
            twins.memory.copy_out(None, [RowCopy(component, tensor, [0, row], out)])
    assert twins.memory.ring.used_bytes == 0


def test_copy_out_wants_the_right_size(twins: Twins) -> None:
    """A destination that does not fit the rows is our own bug."""
    with pytest.raises(LocalProtocolError, match="63 bytes for 1 rows of 64"):
        twins.memory.copy_out(None, [RowCopy(0, SHORT, [0], memoryview(bytearray(63)))])


def test_pools_must_fit_the_layout(twins: Twins) -> None:
    """Row sizes, the number of tensors, the number of components."""
    wrong = [[pool_of(t, 1) for t in twins.tensors], twins.pools[1]]
    for pools in (wrong, twins.pools[:1], [twins.pools[0][:2], twins.pools[1]]):
        with pytest.raises(LocalProtocolError):
            DeviceMemory(LAYOUT, pools, ThreadDevice())


def read(twins: Twins, mark: object, numbers: list[int]) -> bytes:
    with twins.memory.reading(mark, 0, SHORT, numbers) as views:
        return b"".join(views)


def copy(twins: Twins, mark: object, numbers: list[int]) -> bytes:
    out = memoryview(bytearray(len(numbers) * 64))
    twins.memory.copy_out(mark, [RowCopy(0, SHORT, numbers, out)])
    return bytes(out)


@pytest.mark.parametrize("way", [read, copy])
def test_rows_are_read_after_the_mark_and_not_before(
    twins: Twins, way: Callable[[Twins, object, list[int]], bytes]
) -> None:
    """What the engine writes before its mark passes is what is read."""
    mark = ThreadEvent(twins.device)
    numbers = list(range(0, ROWS, 3))
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(way, twins, mark, numbers)
        assert not reading.done()
        assert twins.memory.ring.used_bytes == 0  # nothing is held while the engine computes
        twins.tensors[SHORT].fill_(0x5A)
        mark.set()
        assert reading.result(WAIT_S) == b"\x5a" * 64 * len(numbers)


def test_settle_waits_until_what_landed_is_in_the_pool(twins: Twins) -> None:
    """`land` returns while the device has not begun; nothing may be called done before `settle` returns."""
    before = twins.bytes_of(0, SHORT)
    numbers = list(range(1, ROWS, 2))
    with ThreadPoolExecutor() as pool:
        with twins.device.pause():
            landing = twins.memory.landing(0, SHORT, numbers)
            for view in landing.views:
                view[:] = b"\x77" * len(view)
            landing.land()
            assert twins.bytes_of(0, SHORT) == before
            settling = pool.submit(twins.memory.settle)
            assert not settling.done()
            assert twins.memory.ring.used_bytes > 0  # the slot belongs to the device still
        settling.result(WAIT_S)
    after = twins.bytes_of(0, SHORT)
    for row in range(ROWS):
        wanted = b"\x77" * 64 if row % 2 else before[row * 64 : row * 64 + 64]
        assert after[row * 64 : row * 64 + 64] == wanted
    assert twins.memory.ring.used_bytes == 0


def test_views_stay_as_they_are_while_the_context_is_open(twins: Twins) -> None:
    """Whatever the pool and other readers do meanwhile; the slot comes back when the context ends."""
    numbers = [5, 3, 60]
    with twins.memory.reading(None, 0, SHORT, numbers) as views:
        wanted = b"".join(views)
        twins.tensors[SHORT].zero_()
        assert read(twins, None, numbers) == bytes(3 * 64)
        assert b"".join(views) == wanted
    with pytest.raises(ConnectionResetError), twins.memory.reading(None, 0, SHORT, numbers):
        raise ConnectionResetError
    assert twins.memory.ring.used_bytes == 0


def test_many_threads_and_a_full_ring(twins: Twins) -> None:
    """Landings, drops, reads and copies at once, more than the ring holds: every byte is right at the end."""
    size, count, threads = 1 << 20, 48, 8
    layout = Layout("test", "tiny", 64, "uint8", 1, (Component("kv", (size,)), Component("aux", (24,))))
    pool_bytes = torch.zeros(size * count, dtype=torch.uint8)
    with closing(ThreadDevice()) as device:
        memory = DeviceMemory(
            layout, [[pool_of(pool_bytes, size)], [memoryview(bytearray(24))]], device, ring_bytes=1
        )
        barrier = threading.Barrier(threads)

        def work(thread: int) -> None:
            rng = random.Random(thread)
            barrier.wait(WAIT_S)
            for turn in range(3):
                mine = list(range(thread, count, threads))  # each thread has rows of its own
                rng.shuffle(mine)
                for pair in (mine[:2], mine[2:4], mine[4:]):
                    lost = memory.landing(0, 0, pair)
                    lost.views[0][:8] = b"\xff" * 8
                    if turn == 1:
                        lost.drop()
                    del lost
                    landing = memory.landing(0, 0, pair)
                    for at, row in enumerate(pair):
                        landing.views[0][at * size : (at + 1) * size] = bytes([row + turn]) * size
                    landing.land()
                memory.settle()
                with memory.reading(memory.mark(), 0, 0, mine) as views:
                    assert bytes(views[0][::4096]) == b"".join(
                        bytes([row + turn]) * (size >> 12) for row in mine
                    )
                out = memoryview(bytearray(size * len(mine)))
                memory.copy_out(memory.mark(), [RowCopy(0, 0, mine, out)])
                assert bytes(out[::4096]) == b"".join(bytes([row + turn]) * (size >> 12) for row in mine)

        with ThreadPoolExecutor(threads) as workers:
            for future in [workers.submit(work, thread) for thread in range(threads)]:
                future.result(4 * WAIT_S)
        memory.settle()
        assert memory.ring.used_bytes == 0


def test_a_device_that_fails_is_an_error_everywhere(twins: Twins) -> None:
    """Nothing is reported as there; slots that the device may still use are not used again."""
    landing = twins.memory.landing(0, SHORT, [1, 3])
    twins.device.error = RuntimeError("an illegal memory access was encountered")
    for call in (
        lambda: read(twins, None, [1]),
        lambda: copy(twins, None, [1]),
        landing.land,
    ):
        with pytest.raises(TransferError, match="illegal memory access") as caught:
            call()
        assert caught.value.reason == "device"
    assert twins.memory.ring.used_bytes > 0
    twins.device.error = None


def test_neighbours_are_one_copy() -> None:
    """Runs of neighbours are found; few or long ones go without a kernel."""
    pool = Pool(None, 1000, 4096)
    assert subject.runs(subject.checked(pool, [])) == []
    assert subject.runs(subject.checked(pool, [4, 5, 6, 9, 8, 7, 1, 2])) == [
        (0, 3), (3, 4), (4, 5), (5, 6), (6, 8)
    ]  # fmt: skip


def test_copies_are_cut_where_registered_memory_has_its_seams() -> None:
    """A piece may begin, end or lie anywhere; the parts are all of it, in order."""
    base = 7 << 12
    for start, size in ((0, 1), (PIECE_BYTES - 1, 2), (PIECE_BYTES, 5), (3, 3 * PIECE_BYTES)):
        parts = pieces(base, base + start, base + start + size)
        assert parts[0][0] == base + start
        assert parts[-1][1] == base + start + size
        assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))
        assert all((a - base) // PIECE_BYTES == (b - 1 - base) // PIECE_BYTES for a, b in parts)
    assert len(pieces(base, base, base + 2 * PIECE_BYTES)) == 2


def test_memory_that_the_system_does_not_give_is_a_configuration_error() -> None:
    """The field and the size are named."""
    with pytest.raises(ConfigError, match=rf"staging_bytes: cannot pin {1 << 62} bytes"):
        anonymous(1 << 62)


def test_the_event_of_an_early_send_is_in_the_marks_of_that_send_only() -> None:
    """It is taken from the sender once, and gone from the thread afterwards, an error included."""
    event = object()
    sender = SimpleNamespace(_early_send_wait_event=event)

    def fail() -> None:
        with early_send(sender):
            assert early_event() is event
            with ThreadPoolExecutor() as pool:
                assert pool.submit(early_event).result(WAIT_S) is None
            raise TransferError("gone")

    with pytest.raises(TransferError):
        fail()
    assert early_event() is None
    with early_send(sender):
        assert early_event() is None
