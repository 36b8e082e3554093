"""SIGINT and SIGTERM end a wait wherever it stands, so that what was started can be stopped in order."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class StopRequested(KeyboardInterrupt):
    """The operator asked the launcher to stop.

    A KeyboardInterrupt, because asyncio keeps any other exception of a signal handler to itself when it comes
    while a callback runs.
    """


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Raise StopRequested in the main thread on the first SIGINT or SIGTERM, KeyboardInterrupt on later ones.

    Yields an event that is set from the first one on.
    """
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        raise StopRequested(signal.Signals(number).name)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
