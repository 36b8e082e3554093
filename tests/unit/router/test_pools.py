"""From a worker's description of its pools to KV bytes, and the options of `prfaas profile`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cache_service.core.errors import ConfigError, RemoteProtocolError
from prfaas_sglang import cli
from prfaas_sglang.core.layout import Component, Layout, to_json
from router.core.profile import DecodeRate, KvShape
from router.plan import measure
from router.plan.pools import kv_shape, parse

LAYOUT = Layout(
    "sglang 0.5.21",
    "m",
    64,
    "bfloat16",
    2,
    (
        Component("kv", (640, 640)),
        Component("mamba", (5000, 300)),
        Component("swa", (128,)),
        Component("aux", (7,)),
    ),
)


def described(**changes: Any) -> bytes:
    """Return what a worker with LAYOUT tells, with some fields changed."""
    value: dict[str, Any] = {"layout": to_json(LAYOUT), "fingerprint": "f", "window_tokens": 128}
    layout = {**value["layout"], **{k: v for k, v in changes.items() if k in value["layout"]}}
    return json.dumps({**value, **changes, "layout": layout}).encode()


def test_every_rank_sends_its_rows() -> None:
    """KV per token, the window by the page, state and metadata once, all times the ranks."""
    assert kv_shape(parse(described())) == KvShape(40.0, 10614.0, 4.0, 128, 64)
    assert kv_shape(parse(described(components=to_json(LAYOUT)["components"][:1]))).window_tokens == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"page_size": 0}, r"layout\.page_size: 0 is not in 1"),
        ({"tp_size": -1}, r"layout\.tp_size"),
        ({"components": []}, "none of kind kv"),
        ({"components": [{"kind": "kv", "row_bytes": [-1]}]}, "less than 0 bytes"),
        ({"components": [{"kind": "kv"}]}, "row_bytes"),
        ({"window_tokens": -5}, "window_tokens"),
    ],
)
def test_impossible_pools_are_refused(changes: dict[str, Any], message: str) -> None:
    """The field is named."""
    with pytest.raises(RemoteProtocolError, match=message):
        parse(described(**changes))
    with pytest.raises(RemoteProtocolError, match="layout"):
        parse(b"\xff")


OPTIONS = measure.Options("http://p:1", "http://p:2", "http://d:1", "", Path("out"), "", (), 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "p:1"}, "--url"),
        ({"telemetry_url": ""}, "--telemetry"),
        ({"decode_url": "ftp://x"}, "--decode"),
        ({"bootstrap": "nowhere"}, "--bootstrap"),
        ({"tokens": (5,)}, "--tokens"),
        ({"tokens": (0, 5)}, "--tokens"),
        ({"repeats": 0}, "--repeats"),
        ({"step_s": -1.0}, "--step-ms"),
    ],
)
def test_options_are_checked(changes: dict[str, Any], message: str) -> None:
    """Before anything is asked."""
    measure.check(OPTIONS)
    with pytest.raises(ConfigError, match=message):
        measure.check(replace(OPTIONS, **changes))


def test_decode_rate() -> None:
    """The largest batch within the objective, on the line between two that were measured."""
    steps = {1: 0.01, 2: 0.011, 4: 0.015, 8: 0.035}
    assert measure.decode_rate(steps, 0.025) == DecodeRate(6, 0.025)
    assert measure.decode_rate(steps, 1.0) == DecodeRate(8, 0.035)
    assert measure.decode_rate(steps, 0.001) is None
    assert measure.decode_rate({}, 0.0) is None


def test_lengths() -> None:
    """A list, in any order."""
    assert measure.lengths("2048, 512,512") == (512, 2048)
    assert measure.lengths("") == ()
    with pytest.raises(ConfigError, match="--tokens"):
        measure.lengths("a")


def test_a_worker_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ends with status 1 and the address."""
    url = "http://127.0.0.1:9"  # discard: nobody listens
    argv = ["profile", "--url", url, "--telemetry", url, "--decode", url, "--out", str(tmp_path / "p.yaml")]
    assert cli.main(argv) == 1
    assert f"{url}/layout" in capsys.readouterr().err
