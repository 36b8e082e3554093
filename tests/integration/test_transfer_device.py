"""Device pools over real sockets: from SGLang's pointers through a ring and TCP into other pools.

Streams are threads here (tests/thread_device.py); tests/gpu has the same with a CUDA device.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from cache_service.core.errors import UnsupportedEngine
from prfaas_sglang.core.framing import FrameType
from prfaas_sglang.core.layout import Layout
from prfaas_sglang.engine import pools
from prfaas_sglang.engine.cuda import pool_of
from prfaas_sglang.transfer.device import DeviceMemory, Pool
from prfaas_sglang.transfer.memory import RowMemory
from tests.device_pair import DevicePair, DeviceSide
from tests.thread_device import WAIT_S, ThreadDevice

STAGING = 32 << 20


def buffer(pointer: int, length: int) -> memoryview:
    return memoryview((ctypes.c_char * length).from_address(pointer)).cast("B")


def on_threads(device: ThreadDevice, args: SimpleNamespace, layout: Layout) -> DeviceMemory:
    """Return the pools behind `args` as a device's, metadata as the host's."""
    pointers, lengths = [args.kv_data_ptrs, *args.state_data_ptrs], [args.kv_data_lens, *args.state_data_lens]
    found: list[list[Pool | memoryview]] = [
        [
            pool_of(torch.frombuffer(buffer(*span), dtype=torch.uint8), size)
            for *span, size in zip(p, n, component.row_bytes, strict=True)
        ]
        for p, n, component in zip(pointers, lengths, layout.components[:-1], strict=True)
    ]
    aux = [buffer(*span) for span in zip(args.aux_data_ptrs, args.aux_data_lens, strict=True)]
    return DeviceMemory(layout, [*found, aux], device, ring_bytes=1)


@pytest.fixture
def devices() -> Iterator[list[ThreadDevice]]:
    found = [ThreadDevice(), ThreadDevice()]
    yield found
    for device in found:
        device.close()


def both(devices: list[ThreadDevice]) -> list[DeviceSide]:
    return [DeviceSide(seed, "cpu", partial(on_threads, device)) for seed, device in enumerate(devices)]


@pytest.mark.parametrize("staging_bytes", [0, STAGING], ids=["from the pool", "staged"])
def test_pools_of_sglangs_shapes_move_bit_by_bit(devices: list[ThreadDevice], staging_bytes: int) -> None:
    """Several requests, scattered and in runs: every byte of the decode pools is as it must be."""
    sides = both(devices)
    with closing(DevicePair(*sides, staging_bytes=staging_bytes)) as pair:
        for room in range(1, 7):
            pair.move(room, seed=room)
        for side in sides:
            side.memory.settle()
            assert side.memory.ring.used_bytes == 0


def test_nothing_is_done_before_it_is_in_the_pool(devices: list[ThreadDevice]) -> None:
    """While decode's device has not written the rows, neither side hears that it is done."""
    sides = both(devices)
    with closing(DevicePair(*sides)) as pair:
        with devices[1].pause():
            pair.begin(1, [1, 9, 5], state=0, aux=0)
            pair.prefill.wait(1, "grant")
            assert pair.exporter.open(1, 3)
            pair.exporter.send(1, [4, 5, 6], states=[[1]], aux_row=1, last=True)
            pair.decode.wait(1, "progress")
            assert not torch.equal(pair.decode.pages(0, [1, 9, 5]), pair.prefill.pages(0, [4, 5, 6]))
            with pytest.raises(AssertionError):
                pair.decode.wait(1, "done", timeout_s=0.3)
        pair.decode.wait(1, "done")
        assert torch.equal(pair.decode.pages(0, [1, 9, 5]), pair.prefill.pages(0, [4, 5, 6]))


def half_sent(pair: DevicePair, room: int) -> None:
    """Send a part of a room; its first rows have landed, the rest of the part may be on its way."""
    pair.begin(room, list(range(1, 61)), state=0, aux=0)
    pair.prefill.wait(room, "grant")
    assert pair.exporter.open(room, 60)
    pair.exporter.send(room, list(range(20, 60)))
    pair.decode.wait(room, "progress")


def assert_nothing_comes_late(pair: DevicePair) -> None:
    """The rows are somebody else's from here on: what is written into them stays."""
    for tensor in pair.decode.kv:
        tensor.zero_()
    pair.move(2, seed=1)  # compares the whole pools
    pair.decode.memory.settle()
    assert pair.decode.memory.ring.used_bytes == 0


def test_abort_returns_when_the_device_writes_no_more(devices: list[ThreadDevice]) -> None:
    """Rows that landed before are on their way into the pool: `abort` waits until they are there."""
    sides = both(devices)
    with closing(DevicePair(*sides)) as pair, ThreadPoolExecutor() as pool:
        with devices[1].pause():
            half_sent(pair, 1)
            aborts = [pool.submit(pair.importer.abort, 1, "the client went away") for _ in range(2)]
            found = wait(aborts, 0.3)
            assert not found.done  # nor does the one that came second
        for abort in aborts:
            abort.result(WAIT_S)
        pair.prefill.wait(1, "failed")
        assert_nothing_comes_late(pair)


@pytest.mark.parametrize("how", ["prefill aborts", "prefill breaks the protocol"])
def test_a_failure_is_reported_when_the_device_writes_no_more(devices: list[ThreadDevice], how: str) -> None:
    """Whoever hears that a transfer failed frees its rows at once, so nothing of it may still come."""
    sides = both(devices)
    with closing(DevicePair(*sides)) as pair:
        with devices[1].pause():
            half_sent(pair, 1)
            if how == "prefill aborts":
                pair.exporter.abort(1, "out of memory")
            else:
                (export,) = pair.exporter._exports.values()
                assert export.channel is not None
                export.channel.post(FrameType.GRANT, 1)
            with pytest.raises(AssertionError):
                pair.decode.wait(1, "failed", timeout_s=0.3)
        pair.decode.wait(1, "failed")
        assert_nothing_comes_late(pair)


def test_a_device_that_failed_does_not_keep_a_request_from_failing(devices: list[ThreadDevice]) -> None:
    """Its writes cannot be waited for; the request ends all the same, and the log says so."""
    sides = both(devices)
    with closing(DevicePair(*sides)) as pair:
        half_sent(pair, 1)
        devices[1].error = RuntimeError("unspecified launch failure")
        pair.importer.abort(1, "the client went away")
        pair.prefill.wait(1, "failed")


def test_a_broken_connection_leaves_no_slot_behind(devices: list[ThreadDevice]) -> None:
    """Prefill goes away in the middle of frames: their slots come back, the transfer fails."""
    sides = both(devices)
    with closing(DevicePair(*sides)) as pair:
        pair.begin(1, list(range(1, 101)), state=0, aux=0)
        pair.prefill.wait(1, "grant")
        assert pair.exporter.open(1, 100)
        pair.exporter.send(1, list(range(1, 90)))
        pair.decode.wait(1, "progress")
        pair.exporter.close()
        pair.decode.wait(1, "failed")
    gc.collect()  # an error keeps the frame that it ended alive
    for side in sides:
        side.memory.settle()
        assert side.memory.ring.used_bytes == 0


def test_the_device_chooses_the_memory() -> None:
    """Host pools stay as they were; a device that is neither is refused with what is accepted."""
    side = DeviceSide(0, "cpu", partial(on_threads, ThreadDevice()))
    assert isinstance(pools.pool_memory(side.args, side.layout, device="cpu"), RowMemory)
    with pytest.raises(UnsupportedEngine, match=r"--device xpu: .* cpu and cuda"):
        pools.pool_memory(side.args, side.layout, device="xpu")
