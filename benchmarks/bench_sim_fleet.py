"""The simulator of `prfaas simulate` against a real fleet of SGLang workers on CPU: the same arrivals.

Site A prefills; site B prefills and decodes; between them the emulated 40 ms link. What the simulator is told
was measured on the idle fleet first (the parameters are rows of their own). First tokens wait for the KV in
both (`early_first_token: false`). Ours is the simulator, the peer the fleet: the ratio is the error.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import Measure, Row, run
from benchmarks.sim_fleet import load, measure, predict
from benchmarks.sim_fleet.fleet import CACHE_TOKENS, CHUNK, PAGE, STATES, SimFleet
from benchmarks.sim_fleet.load import Mix, Seen
from benchmarks.sim_fleet.predict import Engine, Figures, Measured
from benchmarks.transfer.ends import link
from router.simulate.spec import SharedCores
from tests.wan.link import missing

#: Of the mean TTFT.
BAR = 0.20
ENGINE = Engine(PAGE, CHUNK, CACHE_TOKENS, STATES)
LENGTHS = (64, 256, 512, 1024, 1536, 2048, 2816, 3584)
MIX = Mix(1200, 0.6, 64, 3500, 16)
#: Seven of ten prompts begin with one of four prefixes of 1,024 tokens.
SHARED = replace(MIX, groups=4, shared=1024, share=0.7)
UNITS = {"mean_s": "s", "p50_s": "s", "p90_s": "s", "requests_per_s": "1/s", "tokens_per_s": "1/s"}


@dataclass(frozen=True, slots=True)
class Case:
    """One load on one link.

    Attributes:
        load: share of what the prefill workers do when each has the machine to itself.
        policy: of router and simulator.
        indexed: prefill workers keep prefixes, and the router asks the cache service who has them.
        told: the router asks the senders what the link carries; else it believes what was measured.
    """

    name: str
    policy: dict[str, Any]
    load: float
    rate_bps: float = 1e8
    mix: Mix = MIX
    requests: int = 100
    told: bool = False
    indexed: bool = False
    seeds: tuple[int, ...] = (1, 2, 3)


#: Half of the prompts cross. What the link has under way does not raise the threshold.
HALF = {"name": "prfaas", "threshold_tokens": 1200, "max_link_wait_s": 60.0}
CASES = {
    case.name: case
    for case in (
        Case("half", HALF, 0.5),
        Case("light", HALF, 0.3, requests=50),
        Case("ttft", {"name": "ttft"}, 0.5),
        Case("gigabit", HALF, 0.5, 1e9),
        Case("shared", HALF, 0.5, mix=SHARED, indexed=True),
        Case("told", {"name": "prfaas", "threshold_tokens": 1200}, 0.5, told=True),
    )
}


def _case(case: Case) -> Measure:
    return lambda smoke: _measure(case, smoke)


def _measure(case: Case, smoke: bool) -> list[Row]:
    if smoke and case.name != next(iter(CASES)):
        return []  # a fleet takes a minute to start and to measure
    why = missing()
    if why is not None:
        return [Row(f"{case.name}: mean TTFT", "s", None, None, f"did not run: {why}", kind="simulated")]
    lengths, repeats = (LENGTHS[::2], 1) if smoke else (LENGTHS, 2)
    queue_bytes = max(5e5, case.rate_bps * 0.040 / 8)
    with (
        tempfile.TemporaryDirectory() as folder,
        link(rate_bps=case.rate_bps, queue_bytes=queue_bytes) as wan,
        SimFleet(wan, Path(folder), case.indexed) as fleet,
    ):
        told = measure.parameters(fleet, lengths, repeats)
        rows = _parameters(case, told)
        seeds, count = (case.seeds[:1], 6) if smoke else (case.seeds, case.requests)
        found: list[tuple[Figures, Figures, Figures]] = []
        notes = []
        with fleet.routed(
            case.policy, measure.by_worker(told), told.rate_bytes_per_s / 1.25e8, case.told
        ) as url:
            load.one_by_one(url, lengths, 2, 0)  # connections and code are warm
            for seed in seeds:
                drawn = load.draw(case.mix, 1.0, count, seed)
                rate = predict.offered(told, [a.tokens for a in drawn], case.load)
                arrivals = load.draw(case.mix, rate, count, seed)
                known = predict.told_decode(told, rate * case.mix.output_tokens)
                fleet.flush()
                wan.reset()
                with company() as others:
                    seen = load.replay(url, arrivals, seed)
                runs = [
                    predict.run(each, ENGINE, case.policy, arrivals, seed)
                    for each in (known, replace(known, shared_cores=SharedCores()))
                ]
                ours, apart = (predict.simulated(records) for records in runs)
                found.append((seen_figures(seen), ours, apart))
                notes.append(_note(seen, rate, others[0], wan.stats().reliable))
    return rows + _rows(case, found, notes)


def seen_figures(seen: Sequence[Seen]) -> Figures:
    """Return the measured figures of the requests that were answered."""
    good = [s for s in seen if not s.error]
    prompt = sum(s.tokens for s in good)
    return predict.figures(
        [s.ttft_s for s in good],
        [s.sent_s for s in good],
        [s.done_s for s in good],
        output_tokens=sum(s.output_tokens for s in good),
        hit_ratio=sum(s.cached for s in good) / prompt if prompt else 0.0,
        remote=sum(s.site != predict.HOME for s in good),
    )


@contextmanager
def company() -> Iterator[list[float]]:
    """Give a list that in the end has the cores, on average, that processes of others used meanwhile."""
    found: list[float] = []
    begin_s, all_s, ours_s = time.perf_counter(), _all_s(), _ours_s()
    yield found
    others_s = _all_s() - all_s - (_ours_s() - ours_s)
    found.append(max(0.0, others_s / (time.perf_counter() - begin_s)))


def _all_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def _ours_s() -> float:
    me = psutil.Process()
    total = 0.0
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:2])
    return total


def _note(seen: Sequence[Seen], rate: float, others: float, reliable: bool) -> str:
    failed = [s.error for s in seen if s.error]
    late_ms = max(s.late_s for s in seen) * 1e3
    text = f"{rate:.2f}/s, {len(seen) - len(failed)} answered, sent late by {late_ms:.0f} ms at most"
    text += f", processes of others on {others:.2f} cores"
    if failed:
        text += f", {len(failed)} failed: {failed[0]:.60}"
    return text + ("" if reliable else ", the link's emulator did not keep up")


def _parameters(case: Case, told: Measured) -> list[Row]:
    rows = []

    def row(name: str, unit: str, value: float, note: str = "") -> None:
        rows.append(Row(f"{case.name}: {name}", unit, value, None, "told to the simulator", note=note))

    for site, profile in told.profiles.items():
        curve = ", ".join(f"{n}: {profile.prefill_s(n) * 1e3:.0f}" for n in LENGTHS[::2])
        curve += f"; the fit is off by {float(profile.facts['fit_off_by_at_most']):.1%} at most"
        row(f"prefill of 1536 tokens at {site}", "ms", profile.prefill_s(1536) * 1e3, curve)
    decode = told.profiles[predict.HOME].decode
    if decode is not None:
        steps = told.profiles[predict.HOME].facts["decode_steps_s"]
        row(
            "decode step",
            "ms",
            decode.step_s * 1e3,
            f"by batch, s: {steps}; told is that of the load's batch",
        )
    row("link", "Mbit/s", told.rate_bytes_per_s * 8e-6, f"round trip {told.rtt_s * 1e3:.1f} ms")
    row("a request beside its prefill", "ms", told.request_s * 1e3)
    slow = told.shared_cores
    note = f"beside decoding {slow.decode:.2f}, beside both {slow.both:.2f}"
    row("a prefill beside another", "x", slow.prefill, note)
    return rows


def _rows(case: Case, found: Sequence[tuple[Figures, Figures, Figures]], notes: Sequence[str]) -> list[Row]:
    rows = []

    def median(which: int, pick: Callable[[Figures], float]) -> float:
        return statistics.median(pick(each[which]) for each in found)

    for which, label in ((1, ""), (2, ", had each its own cores")):
        for field in fields(Figures):
            if field.name not in UNITS:
                continue

            def pick(figures: Figures, name: str = field.name) -> float:
                return float(getattr(figures, name))

            ratios = [pick(each[which]) / pick(each[0]) for each in found]
            name = field.name.removesuffix("_s").replace("_per", "/s")
            if field.name in ("mean_s", "p50_s", "p90_s"):
                name += " TTFT"
            note = "seeds " + ", ".join(f"{r:.3f}" for r in ratios)
            if field.name == "mean_s" and not label:
                note += "; " + "; ".join(notes)
            rows.append(
                Row(
                    f"{case.name}: {name}{label}",
                    UNITS[field.name],
                    median(which, pick),
                    median(0, pick),
                    "the fleet",
                    within=BAR if field.name == "mean_s" and not label else None,
                    kind="simulated",
                    note=note,
                )
            )
    others = [("prefilled at A", "remote")] + ([("hit ratio", "hit_ratio")] if case.indexed else [])
    for what, name in others:
        pairs = [(getattr(each[1], name), getattr(each[0], name)) for each in found]
        ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
        note = "; ".join(f"{ours:.3f} and {theirs:.3f}" for ours, theirs in pairs)
        rows.append(Row(f"{case.name}: {what}", "", ours, theirs, "the fleet", kind="simulated", note=note))
    return rows


if __name__ == "__main__":
    run("sim_fleet", {name: _case(case) for name, case in CASES.items()}, __doc__ or "")
