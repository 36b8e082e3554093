"""A wrong configuration is refused with the path of what is wrong; the example of --help is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cache_service import __main__ as entry
from cache_service import config
from cache_service.core.errors import ConfigError
from cache_service.core.ids import Namespace


def good() -> dict[str, Any]:
    return {
        "site": "B",
        "listen": "127.0.0.1:7001",
        "metrics_listen": "127.0.0.1:7002",
        "namespace": {"model": "tiny-gdn", "page_size": 64},
        "workers": [
            {
                "worker_id": "a-prefill-0",
                "site": "A",
                "dp_rank": 0,
                "events": "tcp://127.0.0.1:5557",
                "replay": "tcp://127.0.0.1:5558",
                "topic": "kv",
            }
        ],
    }


def test_good() -> None:
    """The documented file is accepted, as JSON and as YAML."""
    parsed = config.parse(json.dumps(good()))
    assert parsed.key() == Namespace("tiny-gdn", 64)
    assert [str(source.worker_id) for source in parsed.sites()] == ["a-prefill-0"]
    text = entry._EPILOG.split("YAML:\n")[1].split("On the worker")[0]
    assert config.parse(text) == parsed


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("sit",), "x", "`sit`"),
        (("site",), "", "site"),
        (("site",), 7, "$.site"),
        (("listen",), "7001", "listen"),
        (("listen",), "127.0.0.1:70000", "listen"),
        (("metrics_listen",), "127.0.0.1:7001", "metrics_listen"),
        (("namespace", "page_size"), 0, "page_size"),
        (("namespace", "page_size"), "64", "$.namespace.page_size"),
        (("namespace", "model"), "", "model"),
        (("namespace", "lora"), "x", "$.namespace"),
        (("workers", 0, "worker_id"), "a b", "workers[0].worker_id"),
        (("replication",), {}, "replication: give either etcd or peers"),
        (("replication",), {"etcd": {"endpoints": []}}, "replication.etcd.endpoints"),
        (("replication",), {"etcd": {"endpoints": ["x"]}}, "replication.etcd.endpoints[0]"),
        (("replication",), {"etcd": {"endpoints": ["h:1"], "user": "u"}}, "etcd.user"),
        (("replication",), {"peers": {"B": "h:1"}}, "replication.peers.B"),
        (
            ("replication",),
            {"peers": {"B": "127.0.0.1:1"}},
            "replication.peers.B: is this service's own",
        ),
        (("replication",), {"peers": {"A": "h"}}, "replication.peers.A"),
        (("replication",), {"peers": {"A": "h:1"}}, "replication.peers.A: h:1 is not loopback: give tls"),
        (("ready_wait_s",), -1, "ready_wait_s"),
        (("replication",), {"peers": {}, "live_lease_s": 1}, "replication.live_lease_s"),
        (("replication",), {"peers": {}, "publish": {"stride": 0}}, "replication.publish.stride"),
        (("replication",), {"peers": {}, "nonsense": 0}, "replication"),
        (("workers", 0, "dp_rank"), -1, "workers[0].dp_rank"),
        (("workers", 0, "events"), "tcp://*:5557", "workers[0].events"),
        (("workers", 0, "replay"), "127.0.0.1:5558", "workers[0].replay"),
        (("workers", 0, "colour"), "red", "$.workers[0]"),
        (("ingest",), {"lease_s": 0}, "ingest.lease_s"),
        (("log_flush_s",), -1, "log_flush_s"),
        (("index_budget_bytes",), -1, "index_budget_bytes"),
    ],
)
def test_wrong(path: tuple[Any, ...], value: object, named: str) -> None:
    """Each mistake is named."""
    data = good()
    target = data
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = value
    with pytest.raises(ConfigError) as caught:
        config.parse(json.dumps(data))
    assert named in str(caught.value)


def test_same_stream_twice() -> None:
    """Two entries of one worker and rank are one too many."""
    data = good()
    data["workers"] *= 2
    with pytest.raises(ConfigError, match=r"workers\[1\].*workers\[0\]"):
        config.parse(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[]", "{", "a: b: c"])
def test_no_configuration_at_all(text: str) -> None:
    """Text that is no mapping is refused, not crashed on."""
    with pytest.raises(ConfigError):
        config.parse(text)


def test_file_is_named(tmp_path: Path) -> None:
    """The message begins with the file."""
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        config.load(tmp_path / "absent.yaml")


def test_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong file ends the program with status 2 and one line that says what is wrong."""
    path = tmp_path / "cache.json"
    path.write_text(json.dumps({**good(), "colour": "red"}))
    assert entry.main(["--config", str(path)]) == 2
    assert "colour" in capsys.readouterr().err
