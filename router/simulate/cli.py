"""`prfaas simulate`: reads the scenario, runs it, prints and writes the figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

import msgspec

from cache_service.core.errors import ConfigError
from router.simulate.report import PARTS, Records
from router.simulate.run import simulate
from router.simulate.spec import Scenario, load, parse


def run(
    file: Path,
    out: TextIO,
    *,
    trace: Path | None = None,
    policy: str | None = None,
    seed: int | None = None,
    json_file: Path | None = None,
    plot_file: Path | None = None,
) -> int:
    """Simulate the scenario of `file`; the others replace what it says. Raises ConfigError."""
    scenario = _changed(load(file), trace, policy, seed)
    if plot_file is not None:
        from router.simulate import plot

        plot.check()
    records = simulate(scenario)
    summary = records.summary(scenario.slo_ttft_s)
    out.write(table(summary))
    document = {"scenario": msgspec.to_builtins(scenario), "kind": "simulated", **summary}
    if json_file is not None:
        _write(json_file, json.dumps(document, indent=1) + "\n")
    if plot_file is not None:
        _plot(plot_file, records, scenario)
    return 0


def _changed(scenario: Scenario, trace: Path | None, policy: str | None, seed: int | None) -> Scenario:
    value: dict[str, Any] = msgspec.to_builtins(scenario)
    if trace is not None:
        value["workload"] |= {"kind": "trace", "trace": str(trace), "requests": 0}
    if policy is not None:
        value["policy"] |= {"name": policy}
    if seed is not None:
        value["seed"] = seed
    return parse(value)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json: cannot write {path}: {error.strerror}") from None


def _plot(path: Path, records: Records, scenario: Scenario) -> None:
    from router.simulate import plot

    try:
        plot.draw(path, records, scenario.slo_ttft_s)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot: cannot write {path}: {error}") from None


def table(summary: dict[str, Any]) -> str:
    """Return the summary for people."""
    asked, tokens, slo = summary["requests"], summary["tokens"], summary["slo"]
    lines = [
        f"{asked['asked']} requests: {asked['answered']} answered "
        f"({asked['remote']} prefilled in another site), "
        f"{asked['rejected']} rejected, {asked['failed']} failed",
        f"{'seconds':<16}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}",
    ]
    for name in ("ttft_s", *PARTS):
        if summary[name]:
            values = "".join(f"{summary[name][key]:>10.3f}" for key in ("mean", "p50", "p90", "p99", "max"))
            lines.append(f"{name.removesuffix('_s'):<16}{values}")
    lines += [
        f"in time (TTFT <= {slo['ttft_s']:g} s): {slo['share']:.1%}, {slo['goodput_per_s']:.3f} a second",
        f"prompt tokens {tokens['prompt']}, of these cached {tokens['hit_ratio']:.1%}, "
        f"computed {tokens['uncached']}",
        f"between sites {summary['wan_bytes'] / 1e9:.1f} GB; busy seconds: "
        + ", ".join(
            f"{s} prefill {b['prefill']:.0f} decode {b['decode']:.0f}" for s, b in summary["busy_s"].items()
        ),
    ]
    return "\n".join(lines) + "\n"
