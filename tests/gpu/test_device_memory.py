"""CUDA pools: one GPU pool through gather, pinned memory, TCP and scatter into another, bit by bit.

Skipped where there is no CUDA device. Everything that needs none is in tests/unit and tests/integration, on
the same row operations.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch

from cache_service.core.errors import UnsupportedEngine
from prfaas_sglang.core.layout import Layout
from prfaas_sglang.engine import cuda, pools
from prfaas_sglang.transfer.device import DeviceMemory
from prfaas_sglang.transfer.memory import RowCopy
from tests.device_pair import PAGE, PAGES, WAIT_S, DevicePair, DeviceSide

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here, or torch without CUDA"),
]

STAGING = 32 << 20
#: Clock cycles of a kernel that is long: about half a second.
LONG = 1 << 30


def on_cuda(args: SimpleNamespace, layout: Layout) -> DeviceMemory:
    memory = pools.pool_memory(args, layout, device="cuda")
    assert isinstance(memory, DeviceMemory)
    return memory


@pytest.fixture(scope="module")
def sides() -> Iterator[tuple[DeviceSide, DeviceSide]]:
    made = DeviceSide(1, "cuda:0", on_cuda), DeviceSide(2, "cuda:0", on_cuda)
    torch.cuda.synchronize()
    yield made
    for side in made:
        device = side.memory._device
        assert isinstance(device, cuda.CudaDevice)
        device.close()
    gc.collect()


@pytest.fixture
def side(sides: tuple[DeviceSide, DeviceSide]) -> DeviceSide:
    return sides[0]


@pytest.mark.parametrize("staging_bytes", [0, STAGING], ids=["from the pool", "staged"])
def test_pools_of_sglangs_shapes_move_bit_by_bit(
    sides: tuple[DeviceSide, DeviceSide], staging_bytes: int
) -> None:
    """Scattered pages and runs, conv and SSM states, metadata: equal to what torch copies directly."""
    with closing(DevicePair(*sides, staging_bytes=staging_bytes)) as pair:
        for number in range(1, 9):
            pair.move(staging_bytes + number, seed=number)
        for side in sides:
            side.memory.settle()
            assert side.memory.ring.used_bytes == 0


def read(side: DeviceSide, mark: object, pages: list[int]) -> bytes:
    with side.memory.reading(mark, 0, 0, pages) as views:
        return b"".join(views)


def copy(side: DeviceSide, mark: object, pages: list[int]) -> bytes:
    out = side.memory.host_memory(len(pages) * side.args.kv_item_lens[0])
    side.memory.copy_out(mark, [RowCopy(0, 0, pages, out)])
    return bytes(out)


def value(side: DeviceSide, number: float, count: int) -> bytes:
    one = torch.full((1,), number, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    return one * (count * side.args.kv_item_lens[0] // 2)


@pytest.mark.parametrize("way", [read, copy])
@pytest.mark.parametrize("pages", [list(range(1, 40)), list(range(1, 80, 2))], ids=["run", "scattered"])
def test_rows_are_read_after_the_engines_work(
    side: DeviceSide, way: Callable[[DeviceSide, object, list[int]], bytes], pages: list[int]
) -> None:
    """A long kernel, a write, then the mark: the bytes are the later ones, and marking waits for nothing."""
    side.kv[0].fill_(1.0)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        side.kv[0].fill_(2.0)
        mark = side.memory.mark()
    assert not mark.passed()
    assert way(side, mark, pages) == value(side, 2.0, len(pages))
    assert mark.passed()


def test_an_early_send_waits_for_the_stream_that_writes(side: DeviceSide) -> None:
    """SGLang's overlap scheduler hands an event over: the mark, taken on another stream, includes it."""
    pages = [3, 1, 2]
    side.kv[0].fill_(1.0)
    torch.cuda.synchronize()
    forward, event = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(forward):
        torch.cuda._sleep(LONG)
        side.kv[0].fill_(3.0)
        event.record(forward)
    with cuda.early_send(SimpleNamespace(_early_send_wait_event=event)):
        mark = side.memory.mark()
    assert not mark.passed()
    torch.cuda.current_stream().synchronize()  # the mark has not made this stream wait
    assert not event.query()
    assert read(side, mark, pages) == value(side, 3.0, 3)
    assert event.query()


def test_the_engines_stream_is_neither_waited_for_nor_delayed(side: DeviceSide) -> None:
    """While the engine computes, rows that were final before are read and rows land."""
    pages = list(range(PAGES, 0, -3))
    side.kv[0].fill_(1.0)
    mark = side.memory.mark()
    found = side.pages(1, pages) == 5.0  # what is used below is loaded: loading a kernel may synchronise
    assert not bool(found.all())
    assert read(side, mark, pages) == value(side, 1.0, len(pages))
    torch.cuda.synchronize()
    engine, event = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(engine):
        torch.cuda._sleep(LONG)
        event.record(engine)
    assert read(side, mark, pages) == value(side, 1.0, len(pages))
    landing = side.memory.landing(0, 1, pages)
    landing.views[0][:] = value(side, 5.0, len(pages))
    landing.land()
    side.memory.settle()
    assert not event.query(), "the engine's kernel ended first: it must be longer for this test"
    assert bool((side.pages(1, pages) == 5.0).all())
    event.synchronize()


def test_threads_share_the_ring(side: DeviceSide) -> None:
    """Landings and reads of eight threads at once, more than the ring holds at a time."""

    def work(thread: int) -> None:
        pages = list(range(1 + thread, PAGES + 1, 8))
        for turn in range(20):
            wanted = value(side, thread + turn, len(pages))
            landing = side.memory.landing(0, 2, pages)
            landing.views[0][:] = wanted
            landing.land()
            side.memory.settle()
            with side.memory.reading(side.memory.mark(), 0, 2, pages) as views:
                assert bytes(views[0]) == wanted

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, thread) for thread in range(8)]:
            future.result(WAIT_S)
    assert side.memory.ring.used_bytes == 0


def test_copies_may_cross_pieces_of_registered_memory(
    side: DeviceSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Staging memory is registered in pieces; a row may lie across a seam."""
    monkeypatch.setattr(cuda, "PIECE_BYTES", 1 << 20)
    size = side.args.kv_item_lens[0]
    device = cuda.CudaDevice(0)
    memory = DeviceMemory(
        side.layout,
        [
            [cuda.pool_of(cuda.cuda_span(p, n, 0), r) for p, n, r in zip(*spans, strict=True)]
            for spans in (
                (side.args.kv_data_ptrs, side.args.kv_data_lens, side.args.kv_item_lens),
                (side.args.state_data_ptrs[0], side.args.state_data_lens[0], side.args.state_item_lens[0]),
            )
        ]
        + [[memoryview(bytearray(64)) for _ in side.aux]],
        device,
    )
    side.kv[0].normal_()
    out = memory.host_memory(5 << 20)
    for pages in (list(range(1, 121)), list(range(1, 128, 2))):
        at = (1 << 20) - size // 2
        memory.copy_out(memory.mark(), [RowCopy(0, 0, pages, out[at : at + size * len(pages)])])
        wanted = side.pages(0, pages).cpu().view(torch.uint8).numpy().tobytes()
        assert bytes(out[at : at + size * len(pages)]) == wanted
    device.close()


def test_host_memory_is_no_cuda_pool() -> None:
    """A pointer that CUDA does not know is refused at start."""
    host = torch.zeros(64 * PAGE, dtype=torch.uint8)
    with pytest.raises(UnsupportedEngine, match="CUDA"):
        cuda.cuda_span(host.data_ptr(), host.nbytes, 0)
