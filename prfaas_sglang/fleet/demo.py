"""`prfaas demo`: two sites on this machine, a multi-agent workload, the same prompts on one plain server."""

from __future__ import annotations

import asyncio
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import aiohttp
from msgspec import structs
from rich.console import Console

from cache_service.core.errors import ConfigError, Unavailable
from prfaas_sglang.fleet import client, config, report, up
from prfaas_sglang.fleet.config import Fleet
from prfaas_sglang.fleet.launch import Launcher
from prfaas_sglang.fleet.progress import Progress
from prfaas_sglang.fleet.signals import StopRequested, stop_on_signals
from prfaas_sglang.fleet.specs import Plan
from prfaas_sglang.fleet.workload import Agent, agents

#: Agents that talk at the same time.
CONCURRENCY = 3
#: How long the end of a process may come after the request that it broke.
DEATH_NOTICE_S = 1.0
#: SGLang takes 5 s to drain what the demo knows to be idle.
IDLE_GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class Exchange:
    """One turn of one agent: what was asked, and the fleet's answer."""

    agent: Agent
    turn: int
    messages: tuple[dict[str, str], ...]
    answer: client.Answer


def run(
    *,
    file: Path | None = None,
    backend: Literal["prfaas", "mooncake_tcp"] | None = None,
    run_dir: Path | None = None,
    json_file: Path | None = None,
    keep: bool = False,
) -> int:
    """Run the demo; return 0 when every output is identical and every kind of route and hit was seen."""
    started = time.monotonic()
    console = Console()
    progress = Progress(console)
    fleet = config.load(file) if file else config.parse(up.example(), where="demo.yaml")
    if backend:
        fleet = structs.replace(fleet, transfer=fleet.transfer.over(backend))
    if json_file and not _writable(json_file):
        raise ConfigError(f"--json: cannot write {json_file}")
    directory = up.prepare(run_dir)
    progress.note(f"demo: {describe(fleet)}; logs in {directory}")
    verdict: report.Verdict | None = None
    with stop_on_signals() as stop:
        try:
            with Launcher(fleet, directory, progress) as launcher:
                ready_s = time.monotonic() - started
                verdict = _drive(launcher, progress)
                console.print(report.table(verdict.rows))
                say_verdict(progress, verdict, ready_s, time.monotonic() - started)
                if json_file:
                    result = {"seconds": progress.seconds, "backend": fleet.transfer.backend}
                    json_file.write_text(json.dumps(result | verdict.to_json(), indent=1) + "\n", "utf-8")
                if keep and launcher.plan is not None:
                    launcher.stop_reference()
                    progress.note(f"kept: {up.curl(launcher.plan.router_url, fleet.model.served_name)}")
                    launcher.watch(stop)
                launcher.grace_s = IDLE_GRACE_S
        except StopRequested as request:
            progress.note(f"{request}: stopped everything")
            if verdict is None or not keep:
                return 130
    return 0 if verdict.ok else 1


def _writable(path: Path) -> bool:
    """True when a file can be made or replaced there; found out before the work, not after."""
    return not path.is_dir() and os.access(path if path.exists() else path.absolute().parent, os.W_OK)


def describe(fleet: Fleet) -> str:
    """Return one line about a fleet."""
    sites = "; ".join(
        f"site {site.name}: " + ", ".join(f"{worker.name} ({worker.role})" for worker in site.workers)
        for site in fleet.sites
    )
    how = "in the clear" if fleet.transfer.insecure else "encrypted"
    return f"{fleet.model.path}, KV over {fleet.transfer.backend}, {how}; {sites}"


def say_verdict(progress: Progress, verdict: report.Verdict, ready_s: float, total_s: float) -> None:
    """Print what the run showed."""
    remote = [row for row in verdict.rows if row.route == "remote"]
    hits = sum(row.hit_tokens for row in verdict.rows)
    prompts = sum(row.prompt_tokens for row in verdict.rows)
    link = sum(row.link_bytes or 0 for row in verdict.rows)
    known = any(row.link_bytes is not None for row in verdict.rows)
    progress.note(
        f"{len(remote)} remote and {len(verdict.rows) - len(remote)} local routes; "
        f"{hits} of {prompts} prompt tokens came from a cache; "
        f"{report.size(link) if known else '-'} of KV crossed the link"
    )
    progress.note(f"fleet ready after {ready_s:.1f} s, everything done after {total_s:.1f} s")
    for problem in verdict.problems():
        progress.note(f"PROBLEM: {problem}")
    progress.note(f"{verdict.identical} of {len(verdict.rows)} outputs identical to a single SGLang server")


def _drive(launcher: Launcher, progress: Progress) -> report.Verdict:
    """Run the workload on the fleet, then on a single server; compare."""
    assert launcher.plan is not None
    everyone = agents()
    try:
        exchanges, moved = asyncio.run(_ask_fleet(launcher.plan, launcher.fleet, everyone, progress))
        with progress.step("single SGLang server ready, as the reference"):
            reference_url = launcher.start_reference()
        with progress.step("the same prompts on the single server"):
            model = launcher.fleet.model.served_name
            expected = asyncio.run(_ask_again(reference_url, model, exchanges, progress))
    except Unavailable:
        _look_for_deaths(launcher)
        raise
    launcher.check()
    rows = tuple(
        _row(exchange, count, answer)
        for exchange, count, answer in zip(exchanges, moved, expected, strict=True)
    )
    sites = dict.fromkeys(s.name for s, w in launcher.fleet.workers() if w.role == "prefill")
    return report.Verdict(rows, tuple(sites))


def _look_for_deaths(launcher: Launcher) -> None:
    """Raise ProcessDied when a failed request comes from a process that ended: that is the better message."""
    deadline = time.monotonic() + DEATH_NOTICE_S
    while time.monotonic() < deadline:
        launcher.check()
        time.sleep(0.1)


async def _ask_fleet(
    plan: Plan, fleet: Fleet, everyone: list[Agent], progress: Progress
) -> tuple[list[Exchange], list[int | None]]:
    """Let the agents talk; return their exchanges and how many KV bytes each moved."""
    turns = sum(len(agent.questions) for agent in everyone)
    async with aiohttp.ClientSession() as session:
        with progress.step(f"{turns} requests from {len(everyone)} agents"):
            exchanges = await _converse(session, plan.router_url, fleet.model.served_name, everyone, progress)
        with progress.step("KV bytes read from the workers' telemetry"):
            moved = [await _bytes_of(session, plan, exchange) for exchange in exchanges]
    return exchanges, moved


async def _converse(
    session: aiohttp.ClientSession, url: str, model: str, everyone: list[Agent], progress: Progress
) -> list[Exchange]:
    """Let the agents talk, CONCURRENCY at a time; return their exchanges in the agents' order."""
    slots = asyncio.Semaphore(CONCURRENCY)
    with progress.bar(sum(len(agent.questions) for agent in everyone)) as advance:

        async def talk(agent: Agent) -> list[Exchange]:
            messages: list[dict[str, str]] = [{"role": "system", "content": agent.system}]
            done = []
            async with slots:
                for turn, question in enumerate(agent.questions, start=1):
                    messages.append({"role": "user", "content": question})
                    answer = await client.chat(session, url, model, messages, max_tokens=agent.max_tokens)
                    done.append(Exchange(agent, turn, tuple(messages), answer))
                    messages.append({"role": "assistant", "content": answer.text})
                    advance()
            return done

        # the first agent of each system prompt goes ahead: the others find the prompt cached
        first = {agent.system: agent for agent in reversed(everyone)}
        leaders = [agent for agent in everyone if first[agent.system] is agent]
        followers = [agent for agent in everyone if agent not in leaders]
        done = dict(zip(leaders, await asyncio.gather(*map(talk, leaders)), strict=True))
        done |= zip(followers, await asyncio.gather(*map(talk, followers)), strict=True)
    return [exchange for agent in everyone for exchange in done[agent]]


async def _ask_again(
    url: str, model: str, exchanges: list[Exchange], progress: Progress
) -> list[client.Answer]:
    answers = []
    async with aiohttp.ClientSession() as session:
        with progress.bar(len(exchanges)) as advance:
            for exchange in exchanges:
                tokens = exchange.agent.max_tokens
                answers.append(await client.chat(session, url, model, exchange.messages, max_tokens=tokens))
                advance()
    return answers


async def _bytes_of(session: aiohttp.ClientSession, plan: Plan, exchange: Exchange) -> int | None:
    headers = exchange.answer.headers
    telemetry = plan.telemetry_urls.get(headers["prefill-worker"])
    if telemetry is None:
        return None
    return await client.transfer_bytes(session, telemetry, int(headers["room"]))


def _row(exchange: Exchange, moved: int | None, expected: client.Answer) -> report.Row:
    answer, headers = exchange.answer, exchange.answer.headers
    remote = headers["route"] == "remote"
    return report.Row(
        agent=exchange.agent.name,
        turn=exchange.turn,
        prompt_tokens=answer.prompt_tokens,
        matched_tokens=int(headers["matched-tokens"]),
        hit_tokens=answer.hit_tokens,
        route=headers["route"],
        prefill_worker=headers["prefill-worker"],
        prefill_site=headers["prefill-site"],
        link_bytes=moved if remote else (None if moved is None else 0),
        site_bytes=moved if not remote else (None if moved is None else 0),
        ttft_s=answer.ttft_s,
        identical=bool(answer.output_ids) and answer.output_ids == expected.output_ids,
    )
