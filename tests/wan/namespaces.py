"""Network namespaces: make them, start a process in one, or work in one from this process.

Outside fact: setns(2) moves the calling thread only, and a socket stays in the namespace where it was made.
So a test opens its sockets under `entered(ns)` and then uses them from any thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

DIRECTORY = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


def ip(*arguments: str, batch: str | None = None) -> str:
    """Run iproute2's `ip`; returns its output. Raises RuntimeError with its message."""
    done = subprocess.run(["ip", *arguments], input=batch, capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def exists(namespace: str) -> bool:
    """Whether a namespace of that name is there."""
    return (DIRECTORY / namespace).exists()


def command_in(namespace: str, argv: Sequence[str]) -> list[str]:
    """The command line that runs `argv` in a namespace. `ip` becomes it: same pid and signals."""
    return ["ip", "netns", "exec", namespace, *argv]


def in_namespace(namespace: str, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Start `argv` in a namespace; `options` are those of Popen. The caller waits for it."""
    if not exists(namespace):
        raise RuntimeError(f"there is no network namespace {namespace!r}")
    return subprocess.Popen(command_in(namespace, argv), **options)


@contextlib.contextmanager
def entered(namespace: str) -> Iterator[None]:
    """Put the calling thread into a namespace for the block; sockets made there stay there."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.open(DIRECTORY / namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(there)
        finally:
            os.close(there)
        try:
            yield
        finally:
            _setns(home)
    finally:
        os.close(home)


def write_sysctls(namespace: str, values: Mapping[str, str]) -> None:
    """Set sysctls (names with dots, all below `net.`) in a namespace."""
    with entered(namespace):
        for name, value in values.items():
            Path("/proc/sys", *name.split(".")).write_text(value)


def _setns(handle: int) -> None:
    if _LIBC.setns(handle, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")
