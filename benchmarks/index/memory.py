"""One index in a process of its own: what its content takes.

Prints resident bytes per holder-block and, where the index says so, what it takes by itself, else nan.
"""

from __future__ import annotations

import ctypes
import gc
import math
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
    """Arguments: subject class, blocks, holders of each block, blocks of each event."""
    kind, (blocks, holders, together) = sys.argv[1], map(int, sys.argv[2:])
    subject: subjects.Subject = getattr(subjects, kind)()
    subject.clear(WORKERS)
    # warm: allocators, code
    subject.feed(0, subject.stored(range(1 << 40, (1 << 40) + RUN)))
    before = resident_bytes()
    for number, first in enumerate(range(0, blocks, RUN)):
        for start in range(first, first + RUN, together):
            payload = subject.stored(range(start, start + together), None if start == first else start - 1)
            for i in range(holders):
                subject.feed((number * 7 + i) % WORKERS, payload)
    probe = subject.match(subject.query(range(RUN)))
    assert len(subject.depths(probe)) == holders, "the content is not there"
    said: float = getattr(subject, "bytes_estimate", math.nan)
    print(*(taken / (blocks * holders) for taken in (resident_bytes() - before, said)))


if __name__ == "__main__":
    main()
