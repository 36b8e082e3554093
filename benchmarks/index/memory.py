"""One index in a process of its own: what its content takes. Prints resident bytes per holder-block."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

from benchmarks.index import subjects

RUN = 100
WORKERS = 128


def resident_bytes() -> int:
    """Return what the process has in memory, freed heap given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    """Arguments: subject class, blocks, holders of each block."""
    kind, blocks, holders = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    subject: subjects.Subject = getattr(subjects, kind)()
    subject.clear(WORKERS)
    # warm: allocators, code
    subject.feed(0, subject.stored(range(1 << 40, (1 << 40) + RUN)))
    before = resident_bytes()
    for number, first in enumerate(range(0, blocks, RUN)):
        payload = subject.stored(range(first, first + RUN))
        for i in range(holders):
            subject.feed((number * 7 + i) % WORKERS, payload)
    probe = subject.match(subject.query(range(RUN)))
    assert len(subject.depths(probe)) == holders, "the content is not there"
    print((resident_bytes() - before) / (blocks * holders))


if __name__ == "__main__":
    main()
