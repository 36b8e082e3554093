"""The command line: help that teaches, exit statuses, an import that costs nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from prfaas_sglang import cli


@pytest.mark.parametrize("command", [["up"], ["demo"], ["doctor"], ["certs"], ["models"], ["models", "tiny"]])
def test_every_help_has_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """--help of every subcommand shows how it is used."""
    with pytest.raises(SystemExit) as end:
        cli.main([*command, "--help"])
    assert end.value.code == 0
    assert f"example:\n  prfaas {' '.join(command)}" in capsys.readouterr().out


def test_the_command_line_is_import_light() -> None:
    """Help and argument errors wait for no library."""
    script = (
        "import sys, prfaas_sglang.cli; "
        "print({'cryptography', 'yaml', 'rich', 'torch', 'msgspec', 'aiohttp', 'grpc'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["up"], "-f FILE is missing"),
        (["up", "-f", "nowhere.yaml"], "nowhere.yaml: cannot be read: No such file or directory"),
        (["demo", "--json", "/proc/no/such/folder.json"], "--json: cannot write /proc/no/such/folder.json"),
        (["certs", "/proc/no", "--sites", "A"], "/proc/no: cannot write certificates: No such file"),
        (["certs", "x", "--sites", ","], "--sites: is empty"),
        (["certs", "x", "--sites", "A,a b"], "--sites: 'a b' is not a name"),
        (["certs", "x", "--sites", "A,B,a"], "--sites: 'a' and 'A' are the same to a certificate"),
        (["certs", "x", "--sites", "ca"], "--sites: 'ca' would have the authority's file names"),
        (["certs", "x", "--sites", "A", "--days", "0"], "--days: 0 is not in 1..3650"),
        (["models", "tiny", "--family", "huge", "--out", "/tmp/x"], "huge"),
    ],
)
def test_wrong_use_is_status_2_and_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message says what is wrong; nothing is started."""
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_run_directory_that_is_a_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Instead of a traceback."""
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--run-dir", str(tmp_path / "file")]) == 2
    assert "--run-dir: cannot make the folder" in capsys.readouterr().err
