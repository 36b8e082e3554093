"""prfaas doctor: each finding, what to do about it, and the exit status."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from prfaas_sglang.cpu.environment import STAND_INS
from prfaas_sglang.fleet import doctor


def test_another_engine_version_fails_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pin is exact, and absence is said as such."""
    monkeypatch.setattr(doctor, "engine_version", lambda: "0.5.22")
    check = doctor.check_engine()
    assert (check.state, check.found) == ("fail", "0.5.22")
    assert "sglang==0.5.21" in check.fix
    monkeypatch.setattr(doctor, "engine_version", lambda: "")
    assert doctor.check_engine().found == "not installed"


def test_a_plugin_whitelist_without_us_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLANG_PLUGINS would keep the plugin out."""
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    assert doctor.check_plugin().state == "fail"
    monkeypatch.setenv("SGLANG_PLUGINS", "other,prfaas")
    assert doctor.check_plugin().state == "ok"


def test_an_importable_stand_in_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """It must never be found by a process that is not a CPU worker."""
    assert doctor.check_stand_in().state == "ok"
    monkeypatch.syspath_prepend(str(STAND_INS))
    check = doctor.check_stand_in()
    assert check.state == "fail"
    assert str(STAND_INS) in check.found


def test_little_memory_and_disk_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scarce is not absent."""
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 30))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    assert doctor.check_memory().state == doctor.check_disk().state == "warn"
    assert "1.0 GiB available" in doctor.check_memory().found


def test_missing_mooncake_is_a_warning_with_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the comparison needs it."""
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    check = doctor.check_mooncake()
    assert check.state == "warn"
    assert "mooncake-transfer-engine-non-cuda" in check.fix


@pytest.mark.parametrize(("state", "status"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_only_a_failure_sets_the_exit_status(
    state: doctor.State, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Table and JSON show the same, brackets included."""
    check = doctor.Check("thing", state, "found [a] here", "do [b]")
    monkeypatch.setattr(doctor, "CHECKS", (lambda: check,))
    assert doctor.run() == status
    text = capsys.readouterr().out
    assert "found [a] here" in text
    assert "-> do [b]" in text
    assert doctor.run(as_json=True) == status
    assert json.loads(capsys.readouterr().out) == [
        {"name": "thing", "state": state, "found": "found [a] here", "fix": "do [b]"}
    ]


def test_this_machine_passes(capsys: pytest.CaptureFixture[str]) -> None:
    """Tests run where the engine is set up: nothing fails here, and every check has a name of its own."""
    assert doctor.run(as_json=True) == 0
    names = [check["name"] for check in json.loads(capsys.readouterr().out)]
    assert len(set(names)) == len(names) == len(doctor.CHECKS)
