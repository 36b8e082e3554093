"""The router as a process: what it says on the command line, and how it ends."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.integration.router_support import Rooms, Worker, chunk, write_model

SHORT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True}


def config(tmp_path: Path, **changes: Any) -> Path:
    """Write a configuration file for two workers that need not exist."""
    data = {
        "listen": "127.0.0.1:0",
        "site": "B",
        "model": {
            "name": "tiny",
            "path": str(write_model(tmp_path / "model")),
            "context_length": 2000,
            "page_size": 16,
        },
        "workers": [
            {
                "worker_id": "p0",
                "site": "B",
                "role": "prefill",
                "url": "http://127.0.0.1:1",
                "bootstrap_host": "127.0.0.1",
                "bootstrap_port": 8998,
            },
            {"worker_id": "d0", "site": "B", "role": "decode", "url": "http://127.0.0.1:2"},
        ],
        "timeouts": {"drain_s": 20},
    } | changes
    file = tmp_path / "router.json"
    file.write_text(json.dumps(data))
    return file


async def launch(*arguments: object) -> Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "router", *map(str, arguments), stdout=PIPE, stderr=PIPE
    )


async def ended(process: Process) -> tuple[int | None, str, str]:
    """Wait for the end; return (status, stdout, stderr)."""
    out, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, out.decode(), err.decode()


async def ready(process: Process) -> str:
    """Return the base URL from the process's first log line."""
    assert process.stdout is not None
    line = json.loads(await asyncio.wait_for(process.stdout.readline(), 60))
    assert line["event"] == "router_ready"
    return f"http://{line['listen']}"


@pytest.fixture
async def workers() -> AsyncIterator[tuple[Worker, Worker]]:
    rooms = Rooms()
    pair = Worker("prefill", rooms), Worker("decode", rooms)
    for worker in pair:
        await worker.start()
    yield pair
    for worker in pair:
        await worker.stop()


def pointed_at(tmp_path: Path, pair: tuple[Worker, Worker]) -> Path:
    data = json.loads(config(tmp_path).read_text())
    for entry, worker in zip(data["workers"], pair, strict=True):
        entry["url"] = worker.url
    return config(tmp_path, workers=data["workers"])


async def test_help_teaches_the_configuration() -> None:
    """Every section of the file is in the help."""
    status, out, _ = await ended(await launch("--help"))
    assert status == 0
    for word in (
        "listen:",
        "site:",
        "model:",
        "index:",
        "policy:",
        "workers:",
        "links:",
        "timeouts:",
        "x-prfaas-",
    ):
        assert word in out


async def test_the_example_in_the_help_is_accepted(tmp_path: Path) -> None:
    """What the help shows is a valid file, but for the model directory."""
    _, out, _ = await ended(await launch("--help"))
    example = out.partition("refused):\n")[2].partition("\nroutes:")[0]
    file = tmp_path / "example.yaml"
    file.write_text(example.replace("/models/tiny-gdn", str(write_model(tmp_path / "model"))))
    assert await ended(await launch("--config", file, "--check")) == (0, "", "")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy": {"name": "prfaas", "threshold_tokens": -1}}, "policy.threshold_tokens: -1 is below 0"),
        ({"workers": []}, "workers: none with role decode in site 'B'"),
        (
            {"model": {"name": "m", "path": "/absent", "context_length": 9, "page_size": 1}},
            "model.path: /absent",
        ),
    ],
)
async def test_wrong_configuration_is_status_2(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    """One line on stderr that names the field; no traceback."""
    status, out, err = await ended(await launch("--config", config(tmp_path, **changes)))
    assert (status, out) == (2, "")
    assert words in err
    assert len(err.splitlines()) == 1


async def test_port_in_use_is_said(tmp_path: Path) -> None:
    """Status 1, with the address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        status, _, err = await ended(await launch("--config", config(tmp_path, listen=address)))
    assert status == 1
    assert err == f"router: listen: {address} cannot be used: Address already in use\n"


async def refused(url: str) -> None:
    """Return once new connections are refused."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    while True:
        try:
            _, writer = await asyncio.open_connection(host, int(port))
        except (ConnectionRefusedError, ConnectionResetError):  # reset: it waited to be accepted
            return
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_lets_the_stream_in_flight_end(
    tmp_path: Path, workers: tuple[Worker, Worker], number: signal.Signals
) -> None:
    """New connections are refused, the running answer is completed, the status is 0."""
    go_on = asyncio.Event()

    async def script(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(chunk("one"))
        await asyncio.wait_for(go_on.wait(), 20)
        await response.write(chunk("two"))
        return response

    workers[1].script = script
    process = await launch("--config", pointed_at(tmp_path, workers))
    url = await ready(process)
    async with (
        aiohttp.ClientSession() as client,
        client.post(f"{url}/v1/chat/completions", json=SHORT) as response,
    ):
        assert await response.content.readuntil(b"\n\n") == chunk("one")
        process.send_signal(number)
        assert process.stdout is not None
        assert json.loads(await process.stdout.readline())["event"] == "router_draining"
        await refused(url)
        go_on.set()
        assert await response.content.read() == chunk("two")
    status, out, err = await ended(process)
    assert (status, err) == (0, "")
    events = [json.loads(line) for line in out.splitlines()]
    assert [(e["event"], e.get("outcome")) for e in events] == [("request", "ok"), ("router_stopped", None)]


async def test_drain_is_bounded(tmp_path: Path, workers: tuple[Worker, Worker]) -> None:
    """A request that does not end within drain_s is cut and aborted on its workers; the status is still 0."""

    async def script(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(chunk("one"))
        await asyncio.Event().wait()
        raise AssertionError("never")

    workers[1].script = script
    data = json.loads(pointed_at(tmp_path, workers).read_text())
    process = await launch("--config", config(tmp_path, workers=data["workers"], timeouts={"drain_s": 0.2}))
    url = await ready(process)
    async with (
        aiohttp.ClientSession() as client,
        client.post(f"{url}/v1/chat/completions", json=SHORT) as response,
    ):
        await response.content.readuntil(b"\n\n")
        process.terminate()
        status, _, err = await ended(process)
    assert (status, err) == (0, "")
    assert await asyncio.wait_for(workers[1].aborted.get(), 20)


async def test_index_that_is_not_there(tmp_path: Path, workers: tuple[Worker, Worker]) -> None:
    """A configured cache service that nobody runs: served all the same, without a match."""
    data = json.loads(pointed_at(tmp_path, workers).read_text())
    process = await launch("--config", config(tmp_path, workers=data["workers"], index="127.0.0.1:1"))
    url = await ready(process)
    body = {"messages": [{"role": "user", "content": "x" * 100}]}
    async with (
        aiohttp.ClientSession() as client,
        client.post(f"{url}/v1/chat/completions", json=body) as response,
    ):
        assert (response.status, response.headers["x-prfaas-matched-tokens"]) == (200, "0")
    process.terminate()
    status, out, _ = await ended(process)
    assert status == 0
    events = {line["event"]: line for line in map(json.loads, out.splitlines())}
    assert events["request"]["index"] == "unreachable"
