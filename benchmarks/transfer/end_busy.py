"""A prefill worker's process whose main thread is busy as a scheduler's is (see end.py).

The data plane is in this process's threads, or in a process of its own over shared memory (memfd). The loop
does what is stated and nothing of SGLang's; what counts is how much slower it becomes, and the goodput.
"""

from __future__ import annotations

import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.transfer.ours import Prefill
from benchmarks.transfer.peers import ROOT
from benchmarks.transfer.workload import Workload, new_pool


def bookkeeping(requests: dict[int, dict[str, Any]]) -> int:
    """About a millisecond of what a scheduler does in Python: dicts, lists, sorting, small objects."""
    batch = []
    for rid, request in requests.items():
        request["seen"] += 1
        request["tokens"].append(rid)
        if len(request["tokens"]) > 64:
            request["tokens"] = request["tokens"][-32:]
        batch.append((request["seen"] % 7, rid, len(request["tokens"])))
    batch.sort()
    return sum(size for _, _, size in batch)


class Scheduler:
    """The main thread's loop.

    Args:
        kind: "python" holds the GIL all the time (the CPU side of a GPU worker); "mixed" spends about two
            thirds in torch, which releases it (a CPU worker's forward pass).
    """

    def __init__(self, kind: str) -> None:
        torch.set_num_threads(1)
        self._mixed = kind == "mixed"
        self._requests: dict[int, dict[str, Any]] = {i: {"seen": i, "tokens": [i] * 32} for i in range(3000)}
        self._a, self._b = torch.rand(320, 512), torch.rand(512, 512)

    def step(self) -> None:
        """One iteration, one to three milliseconds."""
        bookkeeping(self._requests)
        if self._mixed:
            for _ in range(2):
                torch.nn.functional.silu(self._a @ self._b).sum().item()

    def run(self, over: Callable[[], bool]) -> dict[str, float]:
        """Loop until `over`; return steps per second and the step's percentiles in milliseconds."""
        steps: list[float] = []
        began = before = time.perf_counter()
        while not over():
            self.step()
            now = time.perf_counter()
            steps.append(now - before)
            before = now
        cuts = statistics.quantiles(steps, n=100) if len(steps) > 1 else steps * 99
        return {
            "steps_per_s": len(steps) / (before - began),
            "p50_ms": cuts[49] * 1e3,
            "p99_ms": cuts[98] * 1e3,
            "max_ms": max(steps) * 1e3,
        }


class _Child:
    """The data plane in a process of its own; its pool is ours."""

    def __init__(self, host: str, workload: Workload, fd: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.transfer.end", "ours"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[fd],
            cwd=ROOT,
        )
        self.post(op="open", role="send", host=host, workload=workload.to_json(), fd=fd)
        self.opened = self.result()

    def post(self, **command: Any) -> None:
        """Send a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()

    def ready(self) -> bool:
        """Whether an answer is there."""
        assert self._process.stdout is not None
        return bool(select.select([self._process.stdout], [], [], 0)[0])

    def result(self) -> Any:
        """Return the answer; ends with this process, for it reads our pipe."""
        assert self._process.stdout is not None
        answer = json.loads(self._process.stdout.readline() or '{"error": "ended"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["ok"]


class End:
    """Operations of the sending end."""

    def op_open(
        self,
        role: str,
        host: str,
        workload: dict[str, Any],
        plane: str = "threads",
        scheduler: str = "mixed",
        switch_s: float = 0.005,
    ) -> dict[str, Any]:
        """Open; plane is "threads" or "process", switch_s the interpreter's switch interval."""
        sys.setswitchinterval(switch_s)
        self.workload = Workload(**workload)
        self.scheduler = Scheduler(scheduler)
        self.child: _Child | None = None
        fd = os.memfd_create("pool")
        os.ftruncate(fd, self.workload.bytes)
        self.pool = new_pool(self.workload, filled=True, fd=fd)
        if plane == "process":
            self.child = _Child(host, self.workload, fd)
            opened: dict[str, Any] = self.child.opened
            return opened
        self.prefill = Prefill(self.workload, self.pool, host)
        return {"address": list(self.prefill.address)}

    def op_join(self, peer: dict[str, Any]) -> None:
        """Decode dials."""

    def op_alone(self, seconds: float) -> dict[str, float]:
        """Run the loop and nothing else."""
        until = time.monotonic() + seconds
        return self.scheduler.run(lambda: time.monotonic() > until)

    def op_send(self, room: int) -> dict[str, float]:
        """Send the pool and run the loop until it has arrived."""
        source = self.workload.source()
        if self.child is not None:
            child = self.child
            child.post(op="send", room=room)
            loop = self.scheduler.run(child.ready)
            sent: dict[str, float] = child.result()
            return {**sent, **loop}
        self.prefill.ready(room, len(source))
        heard, started_s = self.prefill.heard, time.monotonic()
        self.prefill.send(room, source)
        loop = self.scheduler.run(lambda: heard.has(room, "done"))
        return {"started_s": started_s, "done_s": heard.wait(room, "done"), "cpu_s": 0.0, **loop}
