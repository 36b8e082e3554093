"""Two ends of a transfer as processes, on this host or on the two sides of an emulated link.

`Pair.round` moves the whole pool once. Ends of a peer are stopped (SIGSTOP) while it is not their turn: NIXL
and Mooncake poll, and would take the processor from whoever is measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from benchmarks.transfer.peers import ROOT, Found
from benchmarks.transfer.workload import Workload
from tests.wan.link import Wan
from tests.wan.profiles import profile

CALL_S = 120.0


class Place(Protocol):
    """Where the two ends run."""

    def address(self, side: str) -> str:
        """Address of side a (sender) or b (receiver)."""

    def start(self, side: str, argv: list[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a process there."""


class Loopback:
    """Both ends on this host."""

    def address(self, side: str) -> str:
        """127.0.0.1."""
        return "127.0.0.1"

    def start(self, side: str, argv: list[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a process here."""
        return subprocess.Popen(argv, **options)


def link(*, rate_bps: float = 1e9, rtt_s: float = 0.040, loss: float = 0.0, queue_bytes: float = 5e6) -> Wan:
    """Return the benchmark's link with what differs."""
    shape = profile("continental")
    return Wan(shape.with_(rate_bps=rate_bps, delay_s=rtt_s / 2, loss=loss, queue_bytes=queue_bytes))


class EndFailed(RuntimeError):
    """An end answered with an error or ended."""


class End:
    """One end's process and its commands."""

    def __init__(self, place: Place, side: str, kind: str, found: Found) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._process = place.start(
            side,
            [*found.argv, "-m", "benchmarks.transfer.end", kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **found.env},
        )

    def post(self, op: str, **arguments: Any) -> None:
        """Send a command."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise EndFailed(self._why()) from error

    def result(self, timeout_s: float = CALL_S) -> Any:
        """Return the answer to the oldest command. Raises EndFailed, TimeoutError."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        if not ready:
            raise TimeoutError(f"no answer in {timeout_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise EndFailed(self._why())
        answer = json.loads(line)
        if "error" in answer:
            raise EndFailed(answer["error"])
        return answer["ok"]

    def call(self, op: str, timeout_s: float = CALL_S, **arguments: Any) -> Any:
        """Send a command and return its answer."""
        self.post(op, **arguments)
        return self.result(timeout_s)

    def signal(self, number: int) -> None:
        """Stop or continue the process."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait(10)
        for stream in (self._process.stdin, self._process.stdout, self._log):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()

    def _why(self) -> str:
        self._process.kill()
        self._process.wait(10)
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f"ended with {self._process.returncode}: {lines[-1][:200] if lines else 'no message'}"


@dataclass(frozen=True)
class Round:
    """One pool moved: seconds until the sender (and receiver, where it is told) knew; processor seconds."""

    bytes: int
    seconds: float
    send_cpu_s: float
    receive_cpu_s: float

    @property
    def bytes_per_s(self) -> float:
        """Goodput."""
        return self.bytes / self.seconds

    @property
    def cpu_s_per_gb(self) -> float:
        """Processor seconds of both ends per 10^9 bytes."""
        return (self.send_cpu_s + self.receive_cpu_s) / self.bytes * 1e9


class Pair:
    """A connected sender (side a) and receiver (side b) of one kind; a context manager.

    Args:
        place: where they run.
        kind: ours, mooncake, nixl, plain (modules end_*).
        workload: the pools.
        found: interpreter.
        send, receive: further arguments of op_open on either end.
    """

    def __init__(
        self,
        place: Place,
        kind: str,
        workload: Workload,
        found: Found,
        *,
        send: dict[str, Any] | None = None,
        receive: dict[str, Any] | None = None,
    ) -> None:
        self.workload = workload
        self._pausable = kind in ("mooncake", "nixl")
        self._room = 0
        self.sender = End(place, "a", kind, found)
        self.receiver = End(place, "b", kind, found)
        try:
            shape = workload.to_json()
            mine = self.sender.call(
                "open", role="send", host=place.address("a"), workload=shape, **(send or {})
            )
            theirs = self.receiver.call(
                "open", role="receive", host=place.address("b"), workload=shape, peer=mine, **(receive or {})
            )
            self.sender.call("join", peer=theirs)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Pair:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End both."""
        self.sender.close()
        self.receiver.close()

    def next_room(self) -> int:
        """Return a new room number."""
        self._room += 1
        return self._room

    def round(self, timeout_s: float = CALL_S) -> Round:
        """Move the pool once. Raises EndFailed, TimeoutError."""
        room = self.next_room()
        self.receiver.call("expect", room=room)
        sent = self.sender.call("send", timeout_s, room=room)
        received = self.receiver.call("finish", timeout_s, room=room)
        return Round(
            self.workload.bytes,
            max(sent["done_s"], received["done_s"]) - sent["started_s"],
            sent["cpu_s"],
            received["cpu_s"],
        )

    def verify(self) -> None:
        """Raise EndFailed unless every row arrived."""
        found = self.receiver.call("arrived")
        if found != self.workload.pages * self.workload.tensors:
            raise EndFailed(f"{found} of {self.workload.pages * self.workload.tensors} rows are right")

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Let a peer's processes run only for the block."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.pause()

    def pause(self) -> None:
        """Stop a peer's processes until its next turn."""
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        if self._pausable:
            self.sender.signal(number)
            self.receiver.signal(number)


def settle(seconds: float = 0.3) -> None:
    """Let queues and processes come to rest between measurements."""
    time.sleep(seconds)
