"""What senders say of links: summed by link, dropped when stale, never believed beyond its shape."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas_sglang.transfer import telemetry
from prfaas_sglang.transfer.telemetry import LinkSample, Telemetry
from router.config import WorkerConfig
from router.core.profile import KvShape
from router.links import STALE_S, LinkPoller, LinkTable

REPORT: dict[str, Any] = {
    "src_site": "A",
    "dst_site": "B",
    "srtt_s": 0.05,
    "min_rtt_s": 0.04,
    "goodput_bytes_per_s": 1e6,
    "cap_bytes_per_s": None,
    "sent_bytes": 10,
    "retransmitted_bytes": 1,
    "open_transfers": 2,
    "pending_bytes": 100,
}


def body(*reports: dict[str, Any]) -> bytes:
    return json.dumps({"links": [{**REPORT, **report} for report in reports]}).encode()


def test_reports_of_a_link_are_summed() -> None:
    """Two workers of a site, three bundles: rates and bytes add up, the worst round trip counts."""
    table = LinkTable()
    table.take("a0", "A", body({}, {"srtt_s": 0.09}, {"dst_site": "C"}), 100.0)
    table.take("a1", "A", body({"min_rtt_s": 0.03}), 101.0)
    b, c = table.links(102.0)
    assert (b.src_site, b.dst_site, c.dst_site) == ("A", "B", "C")
    assert (b.srtt_s, b.min_rtt_s, b.goodput_bytes_per_s) == (0.09, 0.03, 3e6)
    assert (b.open_transfers, b.pending_bytes, b.sent_bytes) == (6, 300, 30)
    assert [link.open_transfers for link in table.links(100.5 + STALE_S)] == [2]
    assert table.links(102.0 + STALE_S) == []


def test_a_worker_speaks_for_its_own_site_and_in_numbers() -> None:
    """Another site's links and negative figures are left out; no answer at all is refused."""
    table = LinkTable()
    table.take("a0", "A", body({"src_site": "X"}, {"pending_bytes": -1}, {"srtt_s": -0.1}, {}), 0.0)
    (link,) = table.links(0.0)
    assert link.open_transfers == 2
    for wrong in (b"", b"[]", b'{"links": 3}', b'{"links": [{}]}', body({"srtt_s": "x"})):
        with pytest.raises(msgspec.MsgspecError):
            table.take("a0", "A", wrong, 0.0)


@given(st.binary(max_size=200))
def test_garbage_is_refused_or_ignored(data: bytes) -> None:
    """Any bytes: an error that the poller handles, or an answer."""
    with suppress(msgspec.MsgspecError, ValueError):
        LinkTable().take("a0", "A", data, 0.0)


def test_the_poller_asks_a_real_worker_and_survives_a_silent_one(caplog: pytest.LogCaptureFixture) -> None:
    """A transfer worker's own endpoint is read, its pools too; nobody at the other address."""
    caplog.set_level(logging.INFO)
    source = Telemetry("A")
    source.sampled("B", "bundle", LinkSample(0.05, 0.04, 7e6, None, 10, 1, 3, 50))
    component = {"kind": "kv", "row_bytes": [4096, 4096]}
    layout = {"engine": "e", "model": "m", "page_size": 64, "kv_dtype": "bf16", "tp_size": 2}
    pools = {"layout": {**layout, "components": [component]}, "fingerprint": "f"}
    server = telemetry.serve(source, "127.0.0.1", 0, pools)
    other = Telemetry("A")
    other.sampled("C", "bundle", LinkSample(0.05, 0.04, 1e6, None, 10, 1, 0, 0))
    terse = telemetry.serve(other, "127.0.0.1", 0, None)  # 404 for /layout, as workers without pools say
    workers = [
        WorkerConfig(worker_id=name, site="A", role="prefill", url="http://x", telemetry_url=url)
        for name, url in (
            ("a0", f"http://127.0.0.1:{server.server_address[1]}"),
            ("a1", "http://127.0.0.1:1"),
            ("a2", ""),
            ("a3", f"http://127.0.0.1:{terse.server_address[1]}"),
        )
    ]

    async def run() -> None:
        table = LinkTable()
        shapes: dict[str, KvShape] = {}
        poller = LinkPoller(table, workers, shapes.__setitem__)
        poller.start()
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(10):
            while len(links := table.links(loop.time())) < 2 or not shapes or len(caplog.records) < 2:
                await asyncio.sleep(0.01)
        await poller.stop()
        told = [record.getMessage() for record in caplog.records]
        assert sorted(told) == ["layout_unknown", "telemetry_silent"]
        assert (list(shapes), shapes["a0"].bytes_per_token) == (["a0"], 2 * 8192 / 64)
        assert (links[0].goodput_bytes_per_s, links[0].open_transfers) == (7e6, 3)

    try:
        asyncio.run(run())
    finally:
        for each in (server, terse):
            each.shutdown()
            each.server_close()
