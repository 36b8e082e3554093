"""The cases of bench_device run through, on CPU tensors; without CUDA the command says so."""

from __future__ import annotations

from benchmarks import bench_device
from tests.thread_device import ThreadDevice


def test_every_case_gives_its_row() -> None:
    """With both figures."""
    made: list[ThreadDevice] = []

    def make() -> ThreadDevice:
        made.append(ThreadDevice())
        return made[-1]

    rows = bench_device.cases(bench_device.Bed("cpu", make, lambda: None, 16), 1)
    for device in made:
        device.close()
    assert [row.name for row in rows] == list(bench_device.NAMES)
    assert all(row.ours and row.peer for row in rows)
