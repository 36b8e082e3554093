"""A device without a device: tensors in host memory, streams that are threads.

Its row operations are those for CUDA (engine/cuda.py), and its streams are as late as real ones: what is
queued is done by another thread, later, or not before the test says so (`pause`).
"""

from __future__ import annotations

import mmap
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from cache_service.core.errors import TransferError
from prfaas_sglang.engine.cuda import TensorLane

WAIT_S = 20


class ThreadEvent:
    """An event that a thread sets (see ring.Event)."""

    def __init__(self, device: ThreadDevice) -> None:
        self._device, self._event = device, threading.Event()

    def set(self) -> None:
        self._event.set()

    def wait(self) -> None:
        assert self._event.wait(WAIT_S)
        self._device.check()

    def passed(self) -> bool:
        self._device.check()
        return self._event.is_set()


class ThreadLane(TensorLane):
    """A stream that is a thread."""

    def __init__(self, device: ThreadDevice) -> None:
        super().__init__(device.scratch)
        self._device = device
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        while (work := self._work.get()) is not None:
            self._device.running.wait(WAIT_S)
            try:
                with torch.inference_mode():
                    work()
            except RuntimeError as error:
                self._device.error = error

    def queue(self, work: Callable[[], None]) -> None:
        self._device.check()
        self._work.put(work)

    def event(self) -> ThreadEvent:
        event = ThreadEvent(self._device)
        self._work.put(event.set)
        return event

    def stop(self) -> None:
        self._work.put(None)
        self._thread.join(WAIT_S)


class ThreadDevice:
    """Lanes, marks and memory (see transfer.device.Device). There is no engine: a mark has passed."""

    def __init__(self) -> None:
        self.scratch = torch.empty(0, dtype=torch.uint8)
        self.lanes: list[ThreadLane] = []
        self.running = threading.Event()
        self.running.set()
        self.error: RuntimeError | None = None

    def check(self) -> None:
        if self.error is not None:
            raise TransferError(f"device: {self.error}", reason="device")

    def mark(self) -> ThreadEvent:
        event = ThreadEvent(self)
        event.set()
        return event

    def lane(self) -> ThreadLane:
        self.lanes.append(ThreadLane(self))
        return self.lanes[-1]

    def ring(self, size: int) -> memoryview:
        self.scratch = torch.full((size,), 0xEE, dtype=torch.uint8)
        return self.pinned(size)

    def pinned(self, size: int) -> memoryview:
        return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Let nothing that is queued be done meanwhile."""
        self.running.clear()
        try:
            yield
        finally:
            self.running.set()

    def close(self) -> None:
        self.running.set()
        for lane in self.lanes:
            lane.stop()
