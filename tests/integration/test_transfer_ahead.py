"""Layers ahead of their chunk over real sockets: early, exact, and safe when the engine replaces pages."""

from __future__ import annotations

from contextlib import closing

import pytest

from cache_service.core.errors import LocalProtocolError, TransferError
from tests.integration.transfer_support import LAYOUT, Pair, assert_moved

STAGING = 8 << 20
PAGE_BYTES = LAYOUT.components[0].row_bytes[0]


def test_a_layer_arrives_before_its_chunk_is_offered() -> None:
    """Decode has the first tensor's bytes while prefill has not offered the chunk."""
    with closing(Pair(staging_bytes=STAGING)) as pair:
        source, target = list(range(100, 140)), list(range(40))
        pair.exporter.open(1, 40)
        pair.begin(1, target, state=0, aux=0)
        pair.prefill.wait(1, "grant")
        assert pair.exporter.send_ahead(1, source, [0])
        pair.decode.wait(1, "progress")
        pair.exporter.send(1, source, states=[[1]], aux_row=1, last=True)
        pair.decode.wait(1, "done")
        record = pair.prefill.ended(1)
        assert record.ahead_bytes == 40 * PAGE_BYTES
        assert record.early_bytes > 0
        assert_moved(pair, [source, [1], [1]], [target, [0], [0]])


def test_pages_that_the_engine_replaced_and_reuses_at_once() -> None:
    """Its cache had equal pages: after `send` the first ones may be overwritten; none of that leaves."""
    with closing(Pair(staging_bytes=STAGING)) as pair:
        old, new, target = list(range(100, 300)), list(range(300, 500)), list(range(200))
        for tensor in pair.prefill.buffers[0]:
            tensor[300 * PAGE_BYTES : 500 * PAGE_BYTES] = tensor[100 * PAGE_BYTES : 300 * PAGE_BYTES]
        pair.exporter.open(1, 200)
        assert pair.exporter.send_ahead(1, old, [1])
        pair.exporter.send(1, new, states=[[1]], aux_row=1, last=True)
        for tensor in pair.prefill.buffers[0]:
            tensor[100 * PAGE_BYTES : 300 * PAGE_BYTES] = bytes(200 * PAGE_BYTES)
        pair.begin(1, target, state=0, aux=0)
        pair.decode.wait(1, "done")
        assert_moved(pair, [new, [1], [1]], [target, [0], [0]])


def test_nothing_goes_ahead_without_staging_memory() -> None:
    """The pages would have to stay as they are until decode has them; the chunk carries all of it."""
    with closing(Pair(staging_bytes=0)) as pair:
        pair.begin(1, [1, 2], state=0, aux=0)
        pair.prefill.wait(1, "grant")
        pair.exporter.open(1, 2)
        assert not pair.exporter.send_ahead(1, [7, 8], [0])
        pair.exporter.send(1, [7, 8], states=[[1]], aux_row=1, last=True)
        pair.decode.wait(1, "done")
        assert pair.prefill.ended(1).ahead_bytes == 0
        assert_moved(pair, [[7, 8], [1], [1]], [[1, 2], [0], [0]])


def test_decode_holds_a_prefix_of_what_goes_ahead() -> None:
    """Only pages that it lacks travel, whichever way."""
    with closing(Pair(staging_bytes=STAGING)) as pair:
        source, target = list(range(100, 140)), list(range(27))
        pair.exporter.open(1, 40)
        pair.exporter.send(1, source[:5])
        assert pair.exporter.send_ahead(1, source[5:30], [1])
        pair.begin(1, target, state=0, aux=0, prefix_pages=13)
        pair.prefill.wait(1, "grant")
        assert pair.exporter.send_ahead(1, source[5:30], [0])
        pair.exporter.send(1, source[5:], states=[[1]], aux_row=1, last=True)
        pair.decode.wait(1, "done")
        assert pair.prefill.ended(1).bytes == 27 * 2 * PAGE_BYTES + 50_000 + 72
        assert_moved(pair, [source[13:], [1], [1]], [target, [0], [0]])


def test_a_layer_twice_and_an_aborted_room_are_refused() -> None:
    """A recomputed layer fails; after an abort nothing is taken any more."""
    with closing(Pair(staging_bytes=STAGING)) as pair:
        pair.exporter.open(1, 4)
        assert pair.exporter.send_ahead(1, [1, 2], [0])
        with pytest.raises(LocalProtocolError, match="twice"):
            pair.exporter.send_ahead(1, [1, 2], [0])
        pair.exporter.abort(1, "computed again")
        with pytest.raises(TransferError):
            pair.exporter.send_ahead(1, [1, 2], [1])
        assert pair.prefill.ended(1).outcome == "failed"
