"""A launcher and its processes: stopped in order, at any moment, and never left behind."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from prfaas_sglang.fleet.ports import free_port
from tests.integration.fleet_support import SERVER, SLEEPER, ended, launched

STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SERVER


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C, or what a service manager sends: said, exit 0, nothing left."""
    with launched(tmp_path, ("a", SERVER, free_port(), 20.0), ("b", SERVER, free_port(), 20.0)) as fleet:
        fleet.until("ready")
        children = fleet.children()
        assert set(children) == {"a", "b"}
        assert f"{number.name}: stopped" in fleet.end(number)
        assert fleet.process.returncode == 0
        assert ended(children)


def test_a_signal_during_the_start_does_not_wait_for_readiness(tmp_path: Path) -> None:
    """A worker that takes minutes to start does not hold Ctrl-C up."""
    with launched(tmp_path, ("slow", SLEEPER, free_port(), 120.0)) as fleet:
        fleet.until("started")
        children = fleet.children()
        started = time.monotonic()
        assert "SIGINT: stopped" in fleet.end(signal.SIGINT)
        assert time.monotonic() - started < 10
        assert ended(children)


def test_a_second_signal_does_not_wait_for_the_grace(tmp_path: Path) -> None:
    """A process that ignores SIGTERM is killed at once when the operator insists; the exit stays orderly."""
    with launched(tmp_path, ("stubborn", STUBBORN, free_port(), 20.0)) as fleet:
        fleet.until("ready")
        children = fleet.children()
        started = time.monotonic()
        fleet.process.send_signal(signal.SIGINT)
        time.sleep(0.5)  # the launcher is in its grace period of 8 s now
        assert children["stubborn"].is_running()
        assert "SIGINT: stopped" in fleet.end(signal.SIGINT)
        assert time.monotonic() - started < 6
        assert ended(children)


def test_a_killed_launcher_leaves_no_orphan(tmp_path: Path) -> None:
    """SIGKILL of the launcher takes its children along, without a chance to clean up."""
    with launched(tmp_path, ("a", SERVER, free_port(), 20.0), ("b", SLEEPER, free_port(), 60.0)) as fleet:
        fleet.until("started")
        children = fleet.children()
        fleet.process.kill()
        assert ended(children)


def test_a_death_at_start_stops_the_others(tmp_path: Path) -> None:
    """Exit 1 with the name, the status and the last lines; nothing is left."""
    script = "print('no such flag: --x'); raise SystemExit(2)"
    with launched(tmp_path, ("a", SERVER, free_port(), 60.0), ("bad", script, free_port(), 60.0)) as fleet:
        fleet.until("started")
        children = {name: p for name, p in fleet.children().items() if name == "a"}
        output = fleet.end()
        assert fleet.process.returncode == 1
        assert "bad (pid " in output
        assert "exited with status 2" in output
        assert "no such flag: --x" in output
        assert ended(children)


def test_a_death_later_ends_the_run(tmp_path: Path) -> None:
    """A process that dies while the fleet runs is named with its signal; the others are stopped."""
    with launched(tmp_path, ("a", SERVER, free_port(), 20.0), ("b", SERVER, free_port(), 20.0)) as fleet:
        fleet.until("ready")
        children = fleet.children()
        children["b"].kill()
        output = fleet.end()
        assert fleet.process.returncode == 1
        assert "b (pid " in output
        assert "was killed by SIGKILL" in output
        assert ended(children)


def test_logs_of_an_earlier_run_are_not_mixed_in(tmp_path: Path) -> None:
    """The last lines of a death are those of this run, also when the run directory is used again."""
    (tmp_path / "bad.log").write_text("old news\n")
    with launched(tmp_path, ("bad", "raise SystemExit(2)", free_port(), 20.0)) as fleet:
        output = fleet.end()
        assert "exited with status 2" in output
        assert "old news" not in output
        assert "its log is empty" in output
