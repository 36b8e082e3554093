"""The transfer over an emulated link, without an engine."""

from __future__ import annotations

import time

import pytest

from prfaas_sglang.transfer import channel
from tests.integration.transfer_support import Pair, assert_moved
from tests.wan.fixtures import MakeWan, wan_fixture  # noqa: F401


def test_a_slow_link_is_not_taken_for_a_silent_peer(
    wan: MakeWan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Four frames of 64 KiB share 1 Mbit/s, so each takes 2 s, and PINGs wait behind them.

    Time is scaled down: 0.3 s instead of 5 s between PINGs.
    """
    monkeypatch.setattr(channel, "PING_S", 0.3)
    link = wan("metro", rate_bps=1e6, queue_bytes=30e3)
    pair = Pair()
    try:
        with link.entered("a"):
            pair.address = (link.address("a"), pair.exporter.listen(link.address("a"), 0))
        pages = list(range(40))
        with link.entered("b"):  # the dialing thread inherits the side
            pair.begin(1, pages, state=3, aux=2)
        pair.prefill.wait(1, "grant")
        pair.exporter.open(1, len(pages))
        pair.exporter.send(1, pages, states=[[5]], aux_row=1, last=True)
        assert pair.decode.ended(1).reason == ""
        assert "silent" not in caplog.text  # it would be made good, at the price of what was on its way
        assert_moved(pair, [pages, [5], [1]], [pages, [3], [2]])
    finally:
        pair.close()


def test_a_cut_of_three_seconds_is_over_as_soon_as_the_link_heals(
    wan: MakeWan, caplog: pytest.LogCaptureFixture
) -> None:
    """Decode knocks while nothing comes, and moves the transfer to new connections at the first answer."""
    caplog.set_level("INFO")
    link = wan("metro", rate_bps=2e6, queue_bytes=60e3)
    pair = Pair(connections=2)
    try:
        with link.entered("a"):
            pair.address = (link.address("a"), pair.exporter.listen(link.address("a"), 0))
        pages = list(range(40))
        with link.entered("b"):  # the dialing thread inherits the side
            pair.begin(1, pages, state=3, aux=2)
        pair.prefill.wait(1, "grant")
        pair.exporter.open(1, len(pages))
        pair.exporter.send(1, pages, states=[[5]], aux_row=1, last=True)
        pair.decode.wait(1, "progress")
        link.partition()
        time.sleep(3.0)
        assert "path_is_back" not in caplog.text
        link.heal()
        assert pair.decode.ended(1).reason == ""
        assert "path_is_back" in caplog.text
        assert "peer_refused" not in caplog.text
        assert_moved(pair, [pages, [5], [1]], [pages, [3], [2]])
    finally:
        pair.close()
