"""One emulated link: `with Wan("continental") as wan: ...`.

Owns the life of the namespaces, the TUN addresses, the emulator and the guardian that removes them all when
this process dies without saying so. Decides nothing about packets: that is emulator.c. Root only.

A `Wan` must never leave anything behind: what it makes is in a record before it is made (teardown.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from cache_service.core.errors import ConfigError
from tests.wan import namespaces, settings, teardown
from tests.wan.build import build
from tests.wan.profiles import Profile, profile
from tests.wan.settings import Direction

SIDES = ("a", "b")
WAYS = ("a2b", "b2a", "both")
#: As on a host prepared for a long path; and no memory of what an earlier connection measured.
SYSCTLS = {
    "net.ipv4.tcp_rmem": "4096 131072 67108864",
    "net.ipv4.tcp_wmem": "4096 65536 67108864",
    "net.ipv4.tcp_no_metrics_save": "1",
}
START_S, ANSWER_S = 15.0, 5.0


@dataclass(frozen=True)
class DirectionStats:
    """Counters of one direction since start or reset. Segments are MTU packets, bytes are IP bytes."""

    settings: Direction
    link_up: bool
    queue_bytes: float  #: in the drop-tail queue now, on the wire
    queue_max_bytes: int
    in_flight: int  #: writes outstanding, in queue and delay line
    in_segments: int
    in_bytes: int
    out_segments: int
    out_bytes: int
    out_writes: int
    lost: int  #: by the loss setting
    queue_dropped: int  #: congestion
    down_dropped: int
    port_dropped: int  #: by drop_port
    corrupted: int
    overrun: int  #: too much in flight for the emulator; must be 0
    write_errors: int  #: must be 0
    late_writes: int  #: delivered over 1 ms late
    late_max_ns: int
    host_dropped: int  #: lost in the TUN device because the emulator did not run; must be 0

    @property
    def reliable(self) -> bool:
        """Whether the emulator kept up: no packet lost by itself, at most 1 % of writes over 1 ms late."""
        lost = self.overrun + self.write_errors + self.host_dropped
        return lost == 0 and self.late_writes <= 0.01 * self.out_writes


@dataclass(frozen=True)
class LinkStats:
    """Counters of the link."""

    a2b: DirectionStats
    b2a: DirectionStats
    realtime: bool  #: whether the emulator runs with a real-time priority
    cpu_s: float  #: emulator, the receivers' softirq work included

    @property
    def reliable(self) -> bool:
        """Whether figures taken over this link mean anything: both directions kept up."""
        return self.a2b.reliable and self.b2a.reliable


def missing() -> str | None:
    """Why this machine cannot run the emulator, or None."""
    import shutil

    if os.geteuid() != 0:
        return "the WAN emulator needs root"
    if not os.path.exists("/dev/net/tun"):
        return "the WAN emulator needs /dev/net/tun"
    for program, package in (("gcc", "gcc"), ("ip", "iproute2")):
        if shutil.which(program) is None:
            return f"the WAN emulator needs `{program}` (package {package})"
    return None


class Wan:
    """A link between two namespaces, sides "a" and "b". Names are unique unless given.

    namespaces: (a, b) to use; those that exist are joined and left, the others made and removed.
    subnet: of the link; two links of one namespace need different ones.
    detached: the link outlives this process, until `down`.
    """

    def __init__(
        self,
        which: str | Profile = "continental",
        *,
        name: str | None = None,
        namespaces: tuple[str, str] | None = None,
        subnet: str = "10.77.0",
        ipv6: bool = False,
        sysctls: Mapping[str, str] | None = None,
        detached: bool = False,
    ) -> None:
        self.profile = profile(which)
        self.name = name or f"w{secrets.token_hex(4)}"
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,12}", self.name):
            raise ConfigError(f"wan.name: {self.name!r} is not 1 to 13 of a-z, 0-9, - from a letter on")
        if not re.fullmatch(r"\d+\.\d+\.\d+", subnet):
            raise ConfigError(f"wan.subnet: {subnet!r} is not three numbers, as in 10.77.0")
        self.namespaces = dict(zip(SIDES, namespaces or (f"{self.name}-a", f"{self.name}-b"), strict=True))
        self._subnet, self._ipv6, self._detached = subnet, ipv6, detached
        self._sysctls = {**SYSCTLS, **(sysctls or {})}
        self._directory = teardown.STATE / self.name
        self._lock = threading.Lock()
        self._channel: socket.socket | None = None
        self._emulator: subprocess.Popen[bytes] | None = None
        self._guardian: subprocess.Popen[bytes] | None = None
        self._children: list[subprocess.Popen[Any]] = []
        self._host_dropped = (0, 0)

    # ---- life

    def __enter__(self) -> Wan:
        return self.up()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def up(self) -> Wan:
        """Make the link. On any error nothing is left. Raises RuntimeError with what the system said."""
        executable = build()
        teardown.STATE.mkdir(mode=0o700, exist_ok=True)
        teardown.sweep()
        try:
            self._directory.mkdir()
        except FileExistsError as error:
            raise RuntimeError(f"a link named {self.name!r} exists; take it down first") from error
        try:
            self._make(executable)
        except BaseException:
            self.down()
            raise
        return self

    def _make(self, executable: Path) -> None:
        mine = [n for n in self.namespaces.values() if not namespaces.exists(n)]
        record: dict[str, Any] = {
            "namespaces": mine,
            "sides": list(self.namespaces.values()),
            "profile": self.profile.name,
            "subnet": self._subnet,
            "ipv6": self._ipv6,
            "owner": None if self._detached else teardown.identity(os.getpid()),
        }
        teardown.write_record(self._directory, record)
        if not self._detached:
            argv = [sys.executable, "-I", "-S", teardown.__file__, str(self._directory)]
            self._guardian = self._launch(argv, "guardian")
            record["guardian"] = teardown.identity(self._guardian.pid)
            teardown.write_record(self._directory, record)
        for namespace in mine:
            namespaces.ip("netns", "add", namespace)
        ends = [word for n in self.namespaces.values() for word in (n, self.name)]
        self._emulator = self._launch([str(executable), *ends, str(self._socket)], "emulator")
        record["emulator"] = teardown.identity(self._emulator.pid)
        teardown.write_record(self._directory, record)
        self._await_line(self._emulator, "emulator")
        for side in SIDES:
            self._configure(side, self.namespaces[side] in mine)
        self.set("a2b", **asdict(self.profile.a2b))
        self.set("b2a", **asdict(self.profile.b2a))
        self.reset()
        if self._guardian:
            self._await_line(self._guardian, "guardian")

    def _configure(self, side: str, made: bool) -> None:
        namespace, other = self.namespaces[side], SIDES[1 - SIDES.index(side)]
        values = dict(self._sysctls) if made else {}
        values[f"net.ipv6.conf.{self.name}.disable_ipv6"] = "0" if self._ipv6 else "1"
        namespaces.write_sysctls(namespace, values)
        lines = ["link set lo up"] if made else []
        lines += [
            f"addr add {self.address(side)} peer {self.address(other)} dev {self.name}",
            # the sender's device never fills: the bottleneck is in the emulator
            f"link set {self.name} mtu 1500 txqueuelen 20000 up",
        ]
        if self._ipv6:
            lines.append(f"addr add {self.address(side, 6)}/64 dev {self.name} nodad")
        namespaces.ip("-n", namespace, "-batch", "-", batch="\n".join(lines) + "\n")

    def down(self) -> None:
        """Remove processes, namespaces and the link. Idempotent."""
        if self._channel:
            self._channel.close()
            self._channel = None
        if self._guardian and self._guardian.poll() is None:
            self._guardian.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._guardian.wait(30)
        teardown.take_down(self._directory)
        for process in (self._guardian, self._emulator, *self._children):
            if process is None:
                continue
            process.kill()  # dead already, unless it has left its namespace
            process.wait(10)
        for process in (self._guardian, self._emulator):
            if process and process.stdout:
                process.stdout.close()
        self._guardian = self._emulator = None
        self._children.clear()

    @classmethod
    def attach(cls, name: str) -> Wan:
        """The running link of that name, made by another process. Raises ConfigError when there is none."""
        record = teardown.read_record(teardown.STATE / name)
        if record is None:
            raise ConfigError(
                f"wan.name: there is no link {name!r}; running: {', '.join(running()) or 'none'}"
            )
        sides = tuple(record["sides"])
        return cls(
            record["profile"], name=name, namespaces=sides, subnet=record["subnet"], ipv6=record["ipv6"]
        )

    # ---- use

    def address(self, side: str, version: int = 4) -> str:
        """Address of a side on the link."""
        host = 1 + SIDES.index(side)
        return f"{self._subnet}.{host}" if version == 4 else f"fd77:{self._subnet.replace('.', ':')}::{host}"

    def start(self, side: str, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a process on a side; `down` kills it, and everything else that runs there."""
        child = namespaces.in_namespace(self.namespaces[side], argv, **options)
        self._children.append(child)
        return child

    def entered(self, side: str) -> AbstractContextManager[None]:
        """Put the calling thread on a side for a block; sockets made there stay there."""
        return namespaces.entered(self.namespaces[side])

    def set(self, way: str, **values: float) -> None:
        """Change fields of Direction at run time, all at once. `way`: a2b, b2a or both.

        A new rate serves what is queued; a new delay, jitter or loss holds for packets that come from now on;
        `up=False` also drops what is in flight. Raises ConfigError naming a wrong field.
        """
        if way not in WAYS:
            raise ConfigError(f"wan.way: {way!r} is not one of {', '.join(WAYS)}")
        words = [f"{name}={settings.check(name, value):.17g}" for name, value in values.items()]
        self._ask(" ".join(["set", way, *words]))

    def partition(self, way: str = "both") -> None:
        """Cut the link."""
        self.set(way, up=False)

    def heal(self, way: str = "both") -> None:
        """Mend the link."""
        self.set(way, up=True)

    def stats(self) -> LinkStats:
        """Counters and settings of now."""
        answer = self._ask("stats")
        dropped = self._read_host_dropped()
        ways: dict[str, DirectionStats] = {}
        for way, count, before in zip(WAYS[:2], dropped, self._host_dropped, strict=True):
            fields = answer[way]
            chosen = fields.pop("settings")
            chosen["up"] = bool(chosen["up"])
            ways[way] = DirectionStats(Direction(**chosen), **fields, host_dropped=count - before)
        return LinkStats(ways["a2b"], ways["b2a"], realtime=answer["realtime"], cpu_s=answer["cpu_s"])

    def reset(self) -> None:
        """Set the counters to zero."""
        self._ask("reset")
        self._host_dropped = self._read_host_dropped()

    # ---- inside

    @property
    def _socket(self) -> Path:
        return self._directory / "control"

    def _launch(self, argv: Sequence[str], what: str) -> subprocess.Popen[bytes]:
        with open(self._directory / f"{what}.log", "wb") as log:
            return subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )

    def _await_line(self, process: subprocess.Popen[bytes], what: str) -> None:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], START_S)
        if not ready or not process.stdout.readline():
            raise RuntimeError(f"the WAN {what} did not start: {self._log(what) or 'no message'}")

    def _log(self, what: str) -> str:
        path = self._directory / f"{what}.log"
        return path.read_text(errors="replace").strip() if path.exists() else ""

    def _ask(self, text: str) -> dict[str, Any]:
        with self._lock:
            if self._channel is None:
                self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                self._channel.settimeout(ANSWER_S)
                self._channel.bind("")  # an address for the answer, chosen by the kernel
            try:
                self._channel.connect(str(self._socket))
                self._channel.send(text.encode())
                answer: dict[str, Any] = json.loads(self._channel.recv(16384))
            except OSError as error:
                self._channel.close()  # a late answer must not be taken for that of the next question
                self._channel = None
                raise RuntimeError(
                    f"the WAN emulator is not there: {error}; {self._log('emulator')}"
                ) from error
        if "error" in answer:
            raise ConfigError(f"wan.set: {answer['error']}")
        return answer

    def _read_host_dropped(self) -> tuple[int, int]:
        counts = []
        for side in SIDES:
            with self.entered(side):
                lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
            found = [line.split(":")[1].split() for line in lines if line.strip().startswith(f"{self.name}:")]
            counts.append(int(found[0][11]))  # transmit: bytes, packets, errors, dropped
        return counts[0], counts[1]


def running() -> list[str]:
    """Names of the links on this machine."""
    if not teardown.STATE.is_dir():
        return []
    return sorted(d.name for d in teardown.STATE.iterdir() if (d / teardown.RECORD).exists())
