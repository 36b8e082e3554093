"""Peer streams with mutual TLS: two sites' services as processes, and peers that must not be followed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cache_service import config
from cache_service.channels import Encryption
from cache_service.replication.over_peers import PeerReplication
from cache_service.server import CacheServer
from prfaas_sglang.transfer.tls import TlsFiles
from tests.integration.authority import Authority
from tests.integration.cache_support import NAMESPACE, PAGE, CacheProcess, Worker, free_port, stored
from tests.integration.replication.support import EVERYTHING, until

CHAIN = list(range(1, 41))


def tls(files: TlsFiles) -> dict[str, str]:
    return {"ca": files.ca, "cert": files.cert, "key": files.key}


async def test_two_sites(tmp_path: Path) -> None:
    """Each follows the other under its certificate, over a restart of the one that has the worker."""
    authority = Authority(tmp_path, "ours")
    ports = {"A": free_port(), "B": free_port()}
    worker = Worker()
    worker.start()
    made = {}
    for site, other in (("A", "B"), ("B", "A")):
        files = authority.files(site)
        made[site] = CacheProcess(
            tmp_path,
            [worker] if site == "A" else [],
            encryption=Encryption(files.ca, files.cert, files.key, site),
            port=ports[site],
            site=site,
            tls=tls(files),
            log_flush_s=0.05,
            replication={
                "peers": {other: f"127.0.0.1:{ports[other]}"},
                "live_lease_s": 2,
                "publish": EVERYTHING,
            },
        )
    a, b = made["A"], made["B"]
    try:
        await a.launch()
        await b.start()
        worker.publish(stored(CHAIN[:20]))
        await b.matches(CHAIN, {worker.worker_id: 20 * PAGE})
        await a.kill()
        await a.start()
        worker.publish(stored(CHAIN[20:], CHAIN[19]))
        await b.matches(CHAIN, {worker.worker_id: 40 * PAGE})
        assert (await b.client.stats()).behind == ()
    finally:
        await a.close()
        await b.close()
        worker.stop()


def server(site: str, port: int, files: TlsFiles | None, peers: dict[str, int]) -> CacheServer:
    text: dict[str, Any] = {
        "site": site,
        "listen": f"127.0.0.1:{port}",
        "namespace": {"model": NAMESPACE.model, "page_size": PAGE},
        "replication": {"peers": {name: f"127.0.0.1:{at}" for name, at in peers.items()}},
    }
    if files is not None:
        text["tls"] = tls(files)
    return CacheServer(config.parse(json.dumps(text)))


@pytest.mark.parametrize(
    ("followed", "follower", "said"),
    [
        (("ours", "C", "A"), ("ours", "ours"), "Hostname Verification"),  # its certificate has another name
        (("ours", "C", "C"), ("ours", "ours"), "Hostname Verification"),
        (("ours", "A", "C"), ("ours", "ours"), "says that it is of site C"),
        (("others", "A", "A"), ("ours", "ours"), "CERTIFICATE_VERIFY_FAILED"),
        (("ours", "A", "A"), ("ours", "others"), ""),  # the follower's certificate is of others
        (("ours", "A", "A"), None, ""),  # it comes in the clear
        (None, ("ours", "ours"), "WRONG_VERSION_NUMBER"),  # the followed is in the clear
    ],
    ids=["name", "other-site", "site", "authority", "follower", "plain-follower", "plain-followed"],
)
async def test_who_is_not_followed(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    followed: tuple[str, str, str] | None,
    follower: tuple[str, str] | None,
    said: str,
) -> None:
    """Both need a certificate of one authority, and the followed one the name that it is configured under."""
    authorities = {name: Authority(tmp_path, name) for name in ("ours", "others")}
    port = free_port()
    theirs = authorities[followed[0]].files(followed[1]) if followed else None
    there = server(followed[2] if followed else "A", port, theirs, {})
    ours = None
    if follower:
        files = authorities[follower[1]].files("B")
        ours = TlsFiles(str(authorities[follower[0]].ca), files.cert, files.key)
    here = server("B", free_port(), ours, {"A": port})
    await there.start()
    await here.start()
    try:
        replication = here.replication
        assert isinstance(replication, PeerReplication)
        (reader,) = replication._readers.values()
        await until(lambda: reader.resumes >= 2, "the peer to be refused")
        (site,) = replication.report()["sites"]
        assert (site["segments"], site["rebuilds"]) == (0, 0)
        assert here.health()["behind"] == ["site A"]
        lost = [record.fields for record in caplog.records if record.msg == "peer_stream_lost"]  # type: ignore[attr-defined]
        assert said in lost[0]["error"]
        assert lost[0]["site"] == "A"
    finally:
        await here.stop()
        await there.stop()
