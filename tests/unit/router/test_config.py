"""Every mistake in the configuration is refused with the path of its field."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from cache_service.core.errors import ConfigError
from router.config import load, parse

GOOD: dict[str, Any] = {
    "listen": "127.0.0.1:8000",
    "site": "B",
    "model": {"name": "m", "path": "/models/m", "context_length": 4096, "page_size": 64},
    "index": "127.0.0.1:7001",
    "policy": {"name": "prfaas", "threshold_tokens": 512},
    "workers": [
        {
            "worker_id": "a0",
            "site": "A",
            "role": "prefill",
            "url": "http://127.0.0.1:30001",
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": 8998,
        },
        {"worker_id": "d0", "site": "B", "role": "decode", "url": "http://127.0.0.1:30003"},
    ],
    "links": [{"src": "A", "dst": "B", "gbps": 10.0}],
    "timeouts": {"connect_s": 5, "first_byte_s": 300, "total_s": 600},
}


def changed(path: str, value: object) -> dict[str, Any]:
    """Return GOOD with the field at a dotted path replaced (numbers are list positions)."""
    data = copy.deepcopy(GOOD)
    *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    target: Any = data
    for part in parents:
        target = target[part]
    target[last] = value
    return data


def test_the_documented_example_is_accepted(tmp_path: Path) -> None:
    """JSON and YAML give the same configuration; numbers may be integers where seconds are meant."""
    (tmp_path / "c.json").write_text(json.dumps(GOOD))
    (tmp_path / "c.yaml").write_text(json.dumps(GOOD))
    config = load(tmp_path / "c.json")
    assert config == load(tmp_path / "c.yaml")
    assert (config.timeouts.total_s, config.index, config.workers[0].bootstrap_port) == (
        600,
        "127.0.0.1:7001",
        8998,
    )
    assert parse(changed("index", None)).index is None


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("listen", "8000", "listen: '8000' is not host:port"),
        ("listen", "h:99999", "listen: "),
        ("index", "nowhere", "index: "),
        ("site", "no site", "site: 'no site' is not a name"),
        ("site", "C", "workers: none with role decode in site 'C'"),
        ("surprise", 1, "surprise"),
        ("model.context_length", "4096", "model.context_length: expected `int`, got `str`"),
        ("model.context_length", 1, "model.context_length: 1 is not in"),
        ("model.page_size", 0, "model.page_size: 0 is not in"),
        ("model.name", "", "model.name: is empty"),
        ("policy.name", "best", "policy.name: 'best' is not one of prfaas, ttft, local, remote"),
        ("policy.threshold_tokens", -1, "policy.threshold_tokens: -1 is below 0"),
        ("workers.0.role", "both", "workers[0].role: "),
        ("workers.0.extra", 1, "workers[0]"),
        ("workers.0.worker_id", "d0", "workers[1].worker_id: 'd0' is already used by workers[0]"),
        ("workers.0.worker_id", "a/0", "workers[0].worker_id: "),
        ("workers.0.url", "127.0.0.1:30001", "workers[0].url: "),
        ("workers.0.url", "http://h:1/path", "workers[0].url: "),
        ("workers.0.url", "http://h:notaport", "workers[0].url: "),
        ("workers.0.url", "http://127.0.0.1:30003/", "workers[1].url: "),
        ("workers.0.bootstrap_host", "", "workers[0].bootstrap_host: is missing"),
        ("workers.0.bootstrap_port", 0, "workers[0].bootstrap_port: 0 is not in"),
        ("workers.0.site", "C", "links[0].src: no site 'A'"),
        ("links", [], "workers[0].site: there is no link from 'A' to 'B'"),
        ("links.0.dst", "A", "links[0]: src and dst are both 'A'"),
        ("links.0.gbps", 0, "links[0].gbps: 0 is not in"),
        ("timeouts.connect_s", 0, "timeouts.connect_s: 0 is not in"),
        ("timeouts.connect", 5, "timeouts"),
        ("workers", [], "workers: none with role decode"),
        ("log_level", "LOUD", "log_level: "),
    ],
)
def test_mistakes_are_named_with_their_path(path: str, value: object, words: str) -> None:
    """One wrong field each."""
    with pytest.raises(ConfigError) as error:
        parse(changed(path, value))
    assert words in str(error.value)


def test_links_are_listed_once() -> None:
    """The same direction twice is a mistake."""
    with pytest.raises(ConfigError, match=r"links\[1\]\.src: 'A->B' is already used by links\[0\]"):
        parse(changed("links", GOOD["links"] * 2))


def test_a_router_needs_prefill_workers() -> None:
    """Decode workers alone serve nothing."""
    with pytest.raises(ConfigError, match="none with role prefill"):
        parse(changed("workers", GOOD["workers"][1:]) | {"links": []})


@pytest.mark.parametrize("text", ["{", "a: [", "- 1", ""])
def test_unreadable_files_are_refused(tmp_path: Path, text: str) -> None:
    """Neither JSON nor YAML, or not an object."""
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError):
        load(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "absent.json")
