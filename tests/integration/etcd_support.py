"""Real etcd for tests: 1 or 3 members on free ports, and a TCP proxy that cuts connections."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
HEALTHY_S = 30.0


def find_etcd() -> str | None:
    """Return the etcd to test with: $PRFAAS_ETCD, what scripts/etcd.sh fetched, or the one on PATH."""
    named = os.environ.get("PRFAAS_ETCD") or str(ROOT / ".tools" / "etcd")
    return named if os.access(named, os.X_OK) else shutil.which("etcd")


def free_ports(count: int) -> list[int]:
    """Return ports that were free a moment ago, each another one."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [int(s.getsockname()[1]) for s in sockets]


@dataclass
class Member:
    """One member: its ports, its data, and its process while it has one."""

    name: str
    client_port: int
    peer_port: int
    metrics_port: int
    folder: Path
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def endpoint(self) -> str:
        """Return where clients go."""
        return f"127.0.0.1:{self.client_port}"


@dataclass(frozen=True)
class ServerTls:
    """PEM files of the members; `client_auth` demands client certificates of the same authority."""

    ca: str
    cert: str
    key: str
    client_auth: bool = False


class EtcdCluster:
    """Members, numbered from 0, with their data below `folder`; `start` them, and `close` in the end."""

    def __init__(
        self,
        folder: Path,
        *,
        members: int = 1,
        quota_bytes: int = 0,
        tls: ServerTls | None = None,
        arguments: Sequence[str] = (),
        partition: Partition | None = None,
    ) -> None:
        self._tls = tls
        self._partition = partition
        self._arguments = [*arguments]
        if quota_bytes:
            self._arguments.append(f"--quota-backend-bytes={quota_bytes}")
        ports = free_ports(3 * members)
        self.members = [
            Member(f"m{i}", *ports[3 * i : 3 * i + 3], folder=folder / f"m{i}") for i in range(members)
        ]

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Return where clients go."""
        return tuple(member.endpoint for member in self.members)

    def start(self) -> EtcdCluster:
        """Start every member and wait until each has a leader."""
        for index in range(len(self.members)):
            self._launch(index)
        self.wait_healthy()
        return self

    def kill(self, index: int) -> None:
        """SIGKILL a member."""
        process = self._process(index)
        process.kill()
        process.wait(timeout=10)
        self.members[index].process = None

    def stop(self, index: int) -> None:
        """SIGSTOP a member: it hangs, its connections stay."""
        os.kill(self._process(index).pid, signal.SIGSTOP)

    def go_on(self, index: int) -> None:
        """SIGCONT a member."""
        os.kill(self._process(index).pid, signal.SIGCONT)

    def restart(self, index: int) -> None:
        """Start a killed member again on its data, and wait until it is healthy."""
        self._launch(index)
        self.wait_healthy([index])

    def wipe(self, index: int) -> None:
        """Delete a killed member's data."""
        shutil.rmtree(self.members[index].folder / "data")

    def leader(self) -> int:
        """Return the number of the leader; wait for one to be elected."""
        deadline = time.monotonic() + HEALTHY_S
        while time.monotonic() < deadline:
            for index, member in enumerate(self.members):
                if member.process and b"\netcd_server_is_leader 1" in self._get(member, "/metrics"):
                    return index
            time.sleep(0.05)
        raise AssertionError(f"no leader within {HEALTHY_S} s")

    def wait_healthy(self, indexes: Sequence[int] | None = None) -> None:
        """Wait until members say that they are healthy, which takes a leader."""
        deadline = time.monotonic() + HEALTHY_S
        for index in range(len(self.members)) if indexes is None else indexes:
            member = self.members[index]
            while b'"health":"true"' not in self._get(member, "/health"):
                assert self._process(index).poll() is None, self.log(index)
                assert time.monotonic() < deadline, f"{member.name} is not healthy: {self.log(index)}"
                time.sleep(0.02)

    def admin(self, path: str, body: dict[str, Any], *, token: str = "") -> dict[str, Any]:
        """Call etcd's JSON gateway: users and roles, which the client leaves to an operator."""
        request = urllib.request.Request(
            f"http://{self.members[0].endpoint}/v3/{path}",
            data=json.dumps(body).encode(),
            headers={"Authorization": token} if token else {},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def secure(self, tls: ServerTls) -> None:
        """Let members that are started from now on talk TLS to clients."""
        self._tls = tls

    def log(self, index: int) -> str:
        """Return the end of a member's log."""
        return (self.members[index].folder / "log").read_text(errors="replace")[-2000:]

    def close(self) -> None:
        """Kill what runs."""
        for index, member in enumerate(self.members):
            if member.process is not None:
                self.kill(index)

    def _process(self, index: int) -> subprocess.Popen[bytes]:
        process = self.members[index].process
        assert process is not None, f"member {index} does not run"
        return process

    def _launch(self, index: int) -> None:
        member = self.members[index]
        binary = find_etcd()
        assert binary, "no etcd: run scripts/etcd.sh"
        member.folder.mkdir(parents=True, exist_ok=True)
        scheme = "https" if self._tls else "http"
        # Members reach each other through a partition's proxies, if there is one.
        reached = [m.peer_port for m in self.members] if self._partition is None else self._partition.ports
        peers = ",".join(f"{m.name}=http://127.0.0.1:{p}" for m, p in zip(self.members, reached, strict=True))
        command = [
            binary,
            f"--name={member.name}",
            f"--data-dir={member.folder / 'data'}",
            f"--listen-client-urls={scheme}://{member.endpoint}",
            f"--advertise-client-urls={scheme}://{member.endpoint}",
            f"--listen-peer-urls=http://127.0.0.1:{member.peer_port}",
            f"--initial-advertise-peer-urls=http://127.0.0.1:{reached[self.members.index(member)]}",
            f"--listen-metrics-urls=http://127.0.0.1:{member.metrics_port}",
            f"--initial-cluster={peers}",
            # Half of etcd's own times: a new leader is found in a second. Leases of 1 s are possible.
            "--heartbeat-interval=50",
            "--election-timeout=500",
            "--log-level=warn",
            *self._tls_arguments(),
            *self._arguments,
        ]
        with (member.folder / "log").open("ab") as log:
            member.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=member.folder)

    def _tls_arguments(self) -> list[str]:
        if self._tls is None:
            return []
        files = [f"--cert-file={self._tls.cert}", f"--key-file={self._tls.key}"]
        return (
            [*files, f"--trusted-ca-file={self._tls.ca}", "--client-cert-auth"]
            if self._tls.client_auth
            else files
        )

    @staticmethod
    def _get(member: Member, path: str) -> bytes:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{member.metrics_port}{path}", timeout=2) as answer:
                found: bytes = answer.read()
                return found
        except (OSError, urllib.error.URLError):
            return b""


class CutProxy:
    """Passes TCP on to one port; cuts every connection on request, or once after some bytes to clients.

    While `refuses` is set, a new connection is reset at once, as is one from a port that does not pass; while
    `swallows` is, nothing reaches a client; while `open` is not, what should waits.
    """

    def __init__(self, target_port: int, passes: Callable[[int], bool] = lambda from_port: True) -> None:
        self._target_port = target_port
        self._passes = passes
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._cut_after: int | None = None
        self.refuses = False
        self.swallows = False
        self.open = asyncio.Event()
        self.open.set()
        self.cuts = 0
        self.passed_bytes = 0

    @property
    def endpoint(self) -> str:
        """Return where clients go."""
        assert self._server is not None
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def start(self) -> CutProxy:
        """Listen."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    def cut(self) -> None:
        """Reset every connection; new ones are taken."""
        self.cuts += 1
        for writer in self._writers:
            writer.transport.abort()

    def cut_after(self, more_bytes: int) -> None:
        """Cut once, when this many more bytes have gone to clients."""
        self._cut_after = self.passed_bytes + more_bytes

    async def close(self) -> None:
        """Stop listening and cut."""
        assert self._server is not None
        self._server.close()
        self.cut()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuses or not self._passes(writer.get_extra_info("peername")[1]):
            writer.transport.abort()
            return
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, up_writer}
        self._writers |= both
        try:
            await asyncio.gather(
                self._pass(reader, up_writer, counts=False), self._pass(up_reader, writer, counts=True)
            )
        finally:
            self._writers -= both
            for each in both:
                each.transport.abort()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, counts: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(16384):
                if counts:
                    self.passed_bytes += len(data)
                    if self._cut_after is not None and self.passed_bytes >= self._cut_after:
                        self._cut_after = None
                        self.cut()
                        return
                    if self.swallows:
                        continue
                    await self.open.wait()
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


class Partition:
    """Proxies between members, by which one member can be parted from the others, both ways.

    `await open(...)` before the cluster is made: a cluster with it is started in a thread.
    """

    def __init__(self) -> None:
        self._proxies: list[CutProxy] = []
        self._cluster: EtcdCluster | None = None
        self._alone: int | None = None

    @property
    def ports(self) -> list[int]:
        """Return where members reach each other."""
        return [int(proxy.endpoint.rpartition(":")[2]) for proxy in self._proxies]

    async def open(self, folder: Path, members: int) -> EtcdCluster:
        """Start the proxies and a cluster behind them."""
        cluster = self._cluster = EtcdCluster(folder, members=members, partition=self)
        for index, member in enumerate(cluster.members):
            proxy = await CutProxy(member.peer_port, lambda port, to=index: self._passes(port, to)).start()
            self._proxies.append(proxy)
        await asyncio.to_thread(cluster.start)
        return cluster

    def part(self, alone: int | None) -> None:
        """Part one member from the rest; None: nobody."""
        self._alone = alone
        for proxy in self._proxies:
            proxy.cut()

    async def close(self) -> None:
        """Kill the cluster, close the proxies."""
        if self._cluster is not None:
            await asyncio.to_thread(self._cluster.close)
        for proxy in self._proxies:
            await proxy.close()

    def _passes(self, from_port: int, to: int) -> bool:
        if self._alone is None:
            return True
        if to == self._alone:
            return False
        assert self._cluster is not None
        process = self._cluster.members[self._alone].process
        assert process is not None
        # Who dials is known by its side of the connection.
        return all(c.laddr.port != from_port for c in psutil.Process(process.pid).net_connections("tcp"))


@contextlib.contextmanager
def running(cluster: EtcdCluster) -> Iterator[EtcdCluster]:
    """Start a cluster for a `with` block."""
    try:
        yield cluster.start()
    finally:
        cluster.close()
