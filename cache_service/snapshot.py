"""Work on everything as it is at one instant, in a child process, so that nothing here waits for it.

Decides how that instant is had: fork(2). The child has all memory as of then, shared until one of both writes
to it, so it may read, and change, a whole index while this process goes on; what that costs here is the copy
of the page tables (some 2 ms for 2 M blocks) and of the pages written meanwhile.

What the child may do: compute on what it has, and write to its one pipe. Every other file is closed in it,
signals but SIGKILL are blocked, and it ends by _exit: threads, locks, sockets and the event loop of this
process are not its own. gRPC must not have handlers of its own for fork, which would end the child: set
GRPC_ENABLE_FORK_SUPPORT=0 before it is loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import os
import signal
import struct
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import NoReturn

_HEAD = struct.Struct("<BI")
_PIECE, _END, _FAILED = range(3)
#: Matches are answered first where processors are scarce.
_NICE = 5


class SnapshotFailed(Exception):
    """The work raised an exception, or its process died: a bug of ours."""


async def on_snapshot(
    work: Callable[[], Iterator[bytes]], *, timeout_s: float
) -> AsyncGenerator[bytes, None]:
    """Yield what `work` yields, which runs on a snapshot of this process as of the first `anext`.

    Raises OSError when no process can be made, TimeoutError when the end is not had within `timeout_s`, and
    SnapshotFailed. A reader that waits holds the work back; one that ends early ends it.
    """
    loop = asyncio.get_running_loop()
    pipe, pid = _fork(work)
    ends_s = loop.time() + timeout_s
    # Also when nobody reads: what it holds is given back.
    timer = loop.call_later(timeout_s, os.kill, pid, signal.SIGKILL)
    try:
        reader = asyncio.StreamReader()
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    except BaseException:
        pipe.close()
        timer.cancel()
        _end(pid)
        raise
    try:
        while True:
            try:
                kind, size = _HEAD.unpack(await reader.readexactly(_HEAD.size))
                piece = await reader.readexactly(size)
            except asyncio.IncompleteReadError as error:
                if loop.time() >= ends_s:
                    raise TimeoutError(f"not had within {timeout_s:g} s") from error
                raise SnapshotFailed("the process ended before its work") from error
            if kind == _END:
                return
            if kind == _FAILED:
                raise SnapshotFailed(piece.decode(errors="replace"))
            yield piece
    finally:
        transport.close()
        timer.cancel()
        _end(pid)


def _fork(work: Callable[[], Iterator[bytes]]) -> tuple[io.FileIO, int]:
    reading, writing = os.pipe()
    # No signal may reach the child before it has cut itself off: handlers write to this process's sockets.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            _child(work, writing)
    except OSError:
        os.close(reading)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.close(writing)
    return io.FileIO(reading), pid


def _child(work: Callable[[], Iterator[bytes]], writing: int) -> NoReturn:
    try:
        gc.disable()  # what a collection would find belongs to the parent
        os.closerange(0, writing)
        os.closerange(writing + 1, os.sysconf("SC_OPEN_MAX"))
        os.nice(_NICE)
        for piece in work():
            _write(writing, _PIECE, piece)
        _write(writing, _END, b"")
    except Exception as error:  # noqa: BLE001 - the parent raises it
        with contextlib.suppress(OSError):
            _write(writing, _FAILED, repr(error).encode()[:1000])
    finally:
        os._exit(0)


def _write(writing: int, kind: int, piece: bytes) -> None:
    left = memoryview(_HEAD.pack(kind, len(piece)) + piece)
    while left:
        left = left[os.write(writing, left) :]


def _end(pid: int) -> None:
    """Kill the child, which may have ended, and reap it elsewhere: it has much memory to give back."""
    os.kill(pid, signal.SIGKILL)
    asyncio.get_running_loop().run_in_executor(None, os.waitpid, pid, 0)
