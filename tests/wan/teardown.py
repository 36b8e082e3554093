"""Takes a link down, whatever state it is in; also the guardian process that does it when its owner is gone.

A link is a directory with a record, written before anything is made: the namespaces it creates, the emulator
and the owner, processes by pid and start time so that a reused pid is never signalled. All is idempotent.
Only the standard library: the guardian runs this file by its path.

Everything that runs in the link's own namespaces is killed, for nothing else can reach it afterwards.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STATE = Path("/run/prfaas-wan")
RECORD = "record.json"


def start_time(pid: int) -> str | None:
    """When a process began (clock ticks since boot), or None when there is no such process."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else rest[18]


def identity(pid: int) -> list[Any]:
    """What a record keeps of a process."""
    return [pid, start_time(pid)]


def alive(process: list[Any] | None) -> bool:
    """Whether the recorded process still runs."""
    return process is not None and process[1] is not None and start_time(process[0]) == process[1]


def write_record(directory: Path, record: dict[str, Any]) -> None:
    """Replace the record of a link."""
    temporary = directory / "record.new"
    temporary.write_text(json.dumps(record))
    temporary.replace(directory / RECORD)


def read_record(directory: Path) -> dict[str, Any] | None:
    """The record of a link, or None when there is none."""
    try:
        record: dict[str, Any] = json.loads((directory / RECORD).read_text())
        return record
    except (FileNotFoundError, NotADirectoryError):
        return None


def take_down(directory: Path) -> None:
    """Remove the link of `directory`: its processes, its namespaces, the directory."""
    record = read_record(directory)
    if record is not None:
        owner = record["owner"]
        spare = {os.getpid(), owner[0] if owner else 0}
        for namespace in record["namespaces"]:
            _empty(namespace, spare)
        _end(record.get("emulator"))
        for namespace in record["namespaces"]:
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, timeout=30)
    shutil.rmtree(directory, ignore_errors=True)


def sweep() -> None:
    """Take down the links whose owner died and whose guardian did not do it."""
    for directory in STATE.glob("*"):
        record = read_record(directory)
        if record and record["owner"] and not alive(record["owner"]) and not alive(record.get("guardian")):
            take_down(directory)


def _empty(namespace: str, spare: set[int]) -> None:
    """Kill what runs in a namespace; a second round catches what was being forked in the first."""
    for _ in range(5):
        done = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, timeout=30)
        pids = {int(word) for word in done.stdout.split()} - spare
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _end(process: list[Any] | None) -> None:
    if not alive(process):
        return
    assert process is not None
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(process[0])
        try:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            select.select([handle], [], [], 5)
        finally:
            os.close(handle)


def guard(directory: Path) -> None:
    """Wait for SIGTERM or for the end of the owner, then take the link down."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("guarding", flush=True)
    record = read_record(directory)
    if record and record["owner"]:
        try:
            owner = os.pidfd_open(record["owner"][0])
        except ProcessLookupError:
            owner = None
        if owner is not None and alive(record["owner"]):
            select.select([owner, reader], [], [])
    take_down(directory)


if __name__ == "__main__":
    guard(Path(sys.argv[1]))
