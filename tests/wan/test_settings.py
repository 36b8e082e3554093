"""Settings, profiles and the reasons for a skip: no root, no network."""

from __future__ import annotations

import os
import shutil

import pytest

from cache_service.core.errors import ConfigError
from tests.wan import link
from tests.wan.profiles import PROFILES, profile
from tests.wan.settings import NAMES, RANGES, SHORT, Direction, parse


def test_every_field_has_a_range_and_a_short_name() -> None:
    assert set(RANGES) == set(NAMES) == {name for name, _ in SHORT.values()}


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("rate=1gbit", "rate_bps", 1e9),
        ("rate=20.5mbit", "rate_bps", 20.5e6),
        ("delay=20ms", "delay_s", 0.02),
        ("jitter_step=500us", "jitter_step_s", 5e-4),
        ("loss=1%", "loss", 0.01),
        ("loss=1e-3", "loss", 1e-3),
        ("loss_burst=3", "loss_burst", 3),
        ("queue=5mb", "queue_bytes", 5e6),
        ("queue=64kib", "queue_bytes", 65536),
        ("up=0", "up", 0),
    ],
)
def test_short_spellings(text: str, field: str, value: float) -> None:
    name, parsed = parse(text)
    assert name == field
    assert parsed == pytest.approx(value)


@pytest.mark.parametrize("text", ["rate", "speed=1gbit", "rate=1ms", "delay=20", "delay=1.2.3s", "loss=120%"])
def test_wrong_spellings_name_the_key(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"wan\.{text.split('=')[0]}"):
        parse(text)


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"wan\.loss: 2"):
        Direction(loss=2)
    with pytest.raises(ConfigError, match=r"wan\.delay_s"):
        profile("metro").with_(delay_s=-1)


def test_profiles_are_what_they_say() -> None:
    assert {"metro", "continental", "intercontinental", "lossy"} < set(PROFILES)
    assert {"bufferbloat", "flapping", "partition"} < set(PROFILES)
    assert profile("continental").rtt_s == pytest.approx(0.040)
    assert profile("intercontinental").rtt_s == pytest.approx(0.150)
    assert profile("lossy").a2b.loss == 0.01
    assert profile("continental").bdp_bytes == pytest.approx(5e6)
    bloat = profile("bufferbloat")
    assert bloat.a2b.queue_bytes * 8 / bloat.a2b.rate_bps == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="continental"):
        profile("lunar")


def test_a_skip_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os.path, "exists", lambda path: True)
    monkeypatch.setattr(shutil, "which", lambda program: f"/usr/bin/{program}")
    assert link.missing() is None
    monkeypatch.setattr(shutil, "which", lambda program: None if program == "gcc" else program)
    assert "gcc" in (link.missing() or "")
    monkeypatch.setattr(shutil, "which", lambda program: None if program == "ip" else program)
    assert "iproute2" in (link.missing() or "")
    monkeypatch.setattr(os.path, "exists", lambda path: path != "/dev/net/tun")
    assert "/dev/net/tun" in (link.missing() or "")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "root" in (link.missing() or "")
