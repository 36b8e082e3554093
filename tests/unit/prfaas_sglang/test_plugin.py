"""The plugin: inert unless asked for, and any doubt ends the process with a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cache_service.core.errors import ConfigError
from prfaas_sglang import config, plugin
from prfaas_sglang.engine import compat

GOOD = '{"worker_id": "a-0", "site": "A", "insecure": true}'


def test_inert_without_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is checked or imported when neither variable is set."""
    monkeypatch.delenv("PRFAAS_CONFIG", raising=False)
    monkeypatch.delenv("PRFAAS_CPU_ENGINE", raising=False)
    monkeypatch.setattr(compat, "require_supported_engine", lambda: pytest.fail("was called"))
    plugin.register()


def test_another_engine_version_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang swallows exceptions of plugins; SystemExit is not one, and names both versions."""
    monkeypatch.setenv("PRFAAS_CONFIG", GOOD)
    monkeypatch.setattr(compat, "engine_version", lambda: "0.5.99")
    with pytest.raises(SystemExit, match=r"SGLang 0\.5\.99 is not supported; install sglang==0\.5\.21"):
        plugin.register()


def test_a_wrong_configuration_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The field is named."""
    monkeypatch.setenv("PRFAAS_CONFIG", '{"worker_id": "a-0"}')
    monkeypatch.delenv("PRFAAS_CPU_ENGINE", raising=False)
    with pytest.raises(SystemExit, match=r"PRFAAS_CONFIG: .*site"):
        plugin.register()


def test_a_file_can_hold_the_configuration(tmp_path: Path) -> None:
    """@/path is read."""
    path = tmp_path / "worker.json"
    path.write_text(GOOD)
    loaded = config.load({"PRFAAS_CONFIG": f"@{path}"})
    assert loaded is not None
    assert (loaded.worker_id, loaded.site, loaded.frame_bytes) == ("a-0", "A", 256 << 10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "PRFAAS_CONFIG"),
        ("@/no/such/file", "cannot read /no/such/file"),
        (GOOD.replace('"A"', "7"), "site"),
        (GOOD.replace("}", ', "colour": 1}'), "colour"),
        (GOOD.replace("a-0", "a 0"), "worker_id: 'a 0' is not a name"),
        (GOOD.replace("}", ', "telemetry_listen": "9101"}'), "telemetry_listen: '9101' is not host:port"),
        (GOOD.replace("}", ', "connections": 0}'), r"connections: 0 is not in 1\.\.64"),
        (GOOD.replace(', "insecure": true', ""), "PRFAAS_CONFIG: give either tls.* or insecure.*neither is"),
        (GOOD.replace("true", "false"), "neither is given"),
        (
            GOOD.replace("}", ', "tls": {"ca": "a", "cert": "b", "key": "c"}}'),
            "tls.*insecure.*both are given",
        ),
        (GOOD.replace("true", '"yes"'), "insecure"),
        (GOOD.replace("}", ', "peer_sites": ["B", "no name"]}'), "peer_sites: 'no name' is not a name"),
        (GOOD.replace("}", ', "frame_bytes": 1}'), r"frame_bytes: 1 is not in 4096\.\.4194304"),
    ],
)
def test_each_wrong_field_is_named(text: str, message: str) -> None:
    """ConfigError says which field and what is accepted."""
    with pytest.raises(ConfigError, match=message):
        config.load({"PRFAAS_CONFIG": text})


def test_encryption_is_said_one_way_or_the_other() -> None:
    """With tls alone the configuration is good, and the sites of peers are kept."""
    tls = {"ca": "ca.pem", "cert": "A.pem", "key": "A.key"}
    values = {"worker_id": "a-0", "site": "A", "tls": tls, "peer_sites": ["B"]}
    loaded = config.load({"PRFAAS_CONFIG": json.dumps(values)})
    assert loaded is not None
    assert (loaded.tls, loaded.insecure, loaded.peer_sites) == (config.TlsConfig(**tls), False, ("B",))


def test_unset_is_none() -> None:
    """No variable, no configuration."""
    assert config.load({}) is None


@pytest.mark.parametrize("name", ["SGLANG_RUST_SERVER", "SGLANG_DISAGG_STAGING_BUFFER"])
def test_engine_modes_that_bypass_us_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The variable is named."""
    monkeypatch.setenv(name, "1")
    with pytest.raises(compat.UnsupportedEngine, match=name):
        compat.refuse_environment()
