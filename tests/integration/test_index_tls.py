"""The gRPC port with mutual TLS: a router's client with a certificate gets answers, nobody else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cache_service import config
from cache_service.admin import IndexAdmin
from cache_service.channels import Encryption
from cache_service.client import IndexClient
from cache_service.core.errors import ConfigError, IndexUnavailable
from cache_service.server import CacheServer
from prfaas_sglang.fleet.ports import free_port
from tests.integration.authority import Authority
from tests.integration.cache_support import NAMESPACE, PAGE

PEERS = {"replication": {"peers": {"A": "a.example:7001"}}}


def encryption(authority: Authority, site: str) -> Encryption:
    files = authority.files(site)
    return Encryption(files.ca, files.cert, files.key, "B")


async def test_mutual_tls(tmp_path: Path) -> None:
    """A certificate of the authority is needed on both sides, and the service's must have the name."""
    ours, others = Authority(tmp_path, "ours"), Authority(tmp_path, "others")
    server_files = ours.files("B")
    port = free_port()
    text = {
        "site": "B",
        "listen": f"127.0.0.1:{port}",
        "namespace": {"model": NAMESPACE.model, "page_size": PAGE},
        "tls": {"ca": server_files.ca, "cert": server_files.cert, "key": server_files.key},
    }
    server = CacheServer(config.parse(json.dumps(text)))
    await server.start()
    try:
        good = encryption(ours, "A")
        client = IndexClient(f"127.0.0.1:{port}", timeout_s=5.0, encryption=good)
        answer = await client.match(NAMESPACE, [1], PAGE + 1)
        assert (answer.available, answer.holders) == (True, ())
        await client.close()
        wrong_name = Encryption(good.ca, good.cert, good.key, "C")
        mixed = encryption(others, "A")
        for refused in (None, mixed, Encryption(good.ca, mixed.cert, mixed.key, "B"), wrong_name):
            admin = IndexAdmin(f"127.0.0.1:{port}", timeout_s=5.0, encryption=refused)
            with pytest.raises(IndexUnavailable):
                await admin.stats()
            await admin.close()
    finally:
        await server.stop()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"listen": "0.0.0.0:7001"}, "listen: 0.0.0.0:7001 is not loopback"),
        ({"tls": {"ca": "c", "cert": "c", "key": "k"}, "insecure": True}, "both tls and insecure"),
        ({"tls": {"ca": "/nowhere", "cert": "c", "key": "k"}}, "tls.ca: /nowhere cannot be read"),
        ({"tls": {"ca": __file__, "cert": "c", "key": "k"}}, "is not a PEM file"),
        ({"tls": {"ca": "c"}}, "tls."),
        ({"tls": {"ca": __file__, "cert": "", "key": "k"}}, "tls.ca: .* is not a PEM file"),
        ({**PEERS, "tls": {"ca": "CA", "cert": "", "key": "k"}}, "tls.cert: is missing; mutual TLS needs ca"),
        ({**PEERS, "tls": {"ca": "CA", "cert": "CA", "key": "/nowhere"}}, "tls.key: /nowhere cannot be read"),
        ({**PEERS, "tls": {"ca": "CA", "cert": "CA", "key": "CA", "server_name": "A"}}, "tls.server_name: "),
        (
            {"replication": {"peers": {"A": "a.example:7001"}}},
            "replication.peers.A: a.example:7001 is not",
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, settings: dict[str, object], named: str) -> None:
    """Plain TCP beyond loopback must be said; files that cannot be used are named."""
    tls = settings.get("tls")
    if isinstance(tls, dict) and "CA" in tls.values():
        ca = str(Authority(tmp_path, "ours").ca)
        settings = {**settings, "tls": {field: ca if path == "CA" else path for field, path in tls.items()}}
    text = {"site": "B", "listen": "127.0.0.1:0", "namespace": {"model": "m", "page_size": PAGE}, **settings}
    with pytest.raises(ConfigError, match=named):
        config.parse(json.dumps(text))


def test_plain_beyond_loopback_when_said() -> None:
    """insecure: true is enough."""
    text = {
        "site": "B",
        "listen": "0.0.0.0:0",
        "namespace": {"model": "m", "page_size": PAGE},
        "insecure": True,
    }
    assert config.parse(json.dumps(text)).insecure
