"""The outbox: every piece once, in deadline order, chunks of a transfer in their order."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from prfaas_sglang.core.framing import Data
from prfaas_sglang.core.outbox import Outbox, due_s
from prfaas_sglang.core.plan import Piece


def chunk(transfer: int, first: int, count: int) -> list[Piece]:
    return [Piece(Data(0, transfer, first + i, 1), (first + i,)) for i in range(count)]


def drain(outbox: Outbox) -> list[tuple[int, int]]:
    """Return (transfer, position) of everything, in order."""
    taken = []
    while (item := outbox.take()) is not None:
        taken.append((item[0], item[1].data.first))
    return taken


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=20),
    st.dictionaries(st.integers(0, 5), st.floats(0, 10), min_size=6, max_size=6),
)
def test_everything_comes_once_by_deadline(
    chunks: list[tuple[int, int]], deadlines: dict[int, float]
) -> None:
    """Against a brute-force model: sort by (deadline, transfer), chunks of a transfer as added."""
    outbox = Outbox()
    sent: dict[int, int] = {}
    model: list[tuple[float, int, int]] = []
    for transfer, count in chunks:
        first = sent.get(transfer, 0)
        sent[transfer] = first + count
        outbox.add(transfer, deadlines[transfer], iter(chunk(transfer, first, count)))
        model += [(deadlines[transfer], transfer, first + i) for i in range(count)]
    assert drain(outbox) == [(t, p) for _, t, p in sorted(model)]
    assert not outbox


@given(st.integers(0, 1 << 30))
def test_dropping_and_adding_between_takes(seed: int) -> None:
    """A dropped transfer gives nothing more, an added one overtakes when it is due earlier."""
    rng = random.Random(seed)
    outbox = Outbox()
    live: dict[int, list[int]] = {}
    for step in range(60):
        match rng.randrange(3):
            case 0:
                transfer = rng.randrange(6)
                first = step * 10
                outbox.add(transfer, float(transfer), iter(chunk(transfer, first, 3)))
                live.setdefault(transfer, []).extend(range(first, first + 3))
            case 1:
                transfer = rng.randrange(6)
                outbox.drop(transfer)
                live.pop(transfer, None)
            case _:
                item = outbox.take()
                waiting = sorted(t for t, positions in live.items() if positions)
                if not waiting:
                    assert item is None
                    continue
                assert item is not None
                assert item[0] == waiting[0]
                assert item[1].data.first == live[waiting[0]].pop(0)
                if not live[waiting[0]]:
                    del live[waiting[0]]


def test_a_small_transfer_overtakes_a_large_one_but_not_for_ever() -> None:
    """1 MiB granted a second after 256 MiB goes first; one granted a minute later does not."""
    large = due_s(0.0, 256 << 20)
    assert due_s(1.0, 1 << 20) < large < due_s(60.0, 1 << 20)
