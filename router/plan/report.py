"""A plan as text and as JSON values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from router.core.throughput import Stage
from router.core.workload import mean
from router.plan.planner import Option, Plan, Sensitivity

GBPS = 8e-9
#: A stage this busy binds; at the best threshold several do at once.
BINDS = 0.995


def text(plan: Plan, changed: Sequence[Sensitivity]) -> str:
    """Return the report that `prfaas plan` prints."""
    question = plan.question
    found = plan.both.found
    lines = [
        f"second site: {'YES' if plan.pays else 'NO'}",
        *(f"  {reason}" for reason in plan.reasons),
        "",
        *_table(_options(plan)),
    ]
    if question.offers:
        lines += ["", *_operation(plan)]
    lines += ["", "utilisation at that throughput"]
    busy = found.utilisation()
    for stage in Stage:
        if question.offers or stage in (Stage.LOCAL_PREFILL, Stage.DECODE):
            mark = "  <- bottleneck" if busy[stage] > BINDS else ""
            lines.append(f"  {stage:<15} {busy[stage]:>6.1%} {'#' * round(busy[stage] * 40)}{mark}")
    for what in dict.fromkeys(s.what for s in changed):
        lines += ["", f"sensitivity: {what}", *_table(_sensitivity(changed, what))]
    lines += ["", *_caveats(plan)]
    return "\n".join(lines) + "\n"


def _options(plan: Plan) -> list[list[str]]:
    home = plan.question.home
    named = [(f"{home.name} alone, {home.instances} instances", plan.alone)]
    if plan.question.offers:
        named.append((f"{home.name} with {', '.join(o.name for o in plan.question.offers)}", plan.both))
    if plan.grown is not None:
        more = plan.grown.found.system
        named.append((f"{home.name} alone, {more.prefill + more.decode:.0f} for the same money", plan.grown))
    head = ["", "req/s", "N_p/N_d", "prefill mean", "P90", "$/h", "egress $/h", "$/Mtok"]
    return [head, *([name, *_cells(option)] for name, option in named)]


def _cells(option: Option) -> list[str]:
    system = option.found.system
    return [
        f"{option.requests_per_s:.3f}",
        f"{system.prefill:.0f}/{system.decode:.0f}",
        f"{option.ttft.mean_s:.2f} s",
        f"{option.ttft.p90_s:.2f} s",
        f"{option.dollars_per_hour:.2f}",
        f"{option.egress_dollars_per_hour:.2f}",
        f"{option.dollars_per_mtok:.4g}",
    ]


def _operation(plan: Plan) -> list[str]:
    """Return how to run the system with the remote sites."""
    found, question = plan.both.found, plan.question
    lines = [
        f"with the remote sites: threshold {found.at.threshold:,.0f} uncached tokens, "
        f"{found.at.p:.1%} of requests offloaded (mean {found.at.long:,.0f} tokens; "
        f"{found.at.short:,.0f} at home), N_p/N_d = {found.system.prefill:.0f}/{found.system.decode:.0f}"
    ]
    egress = found.egress_bytes_per_s
    for offer, rate, transfer in zip(question.offers, egress, plan.both.transfer_s, strict=True):
        width = offer.link_bytes_per_s
        share = rate / width if width else 0.0
        lines.append(
            f"  {offer.name} -> {question.home.name}: {rate * GBPS:.3g} of {width * GBPS:.3g} Gbps "
            f"({share:.0%}), {rate * 86_400 / 1e12:.3g} TB a day; one prompt's KV takes {transfer:.3g} s "
            "on the idle link, most of it while prefill runs"
        )
    return lines


def _sensitivity(changed: Sequence[Sensitivity], what: str) -> list[list[str]]:
    rows = [["", "req/s", "threshold", "N_p/N_d", "offloaded", "egress Gbps", "$/Mtok", "bottleneck", "pays"]]
    for item in changed:
        if item.what != what:
            continue
        option, found = item.plan.both, item.plan.both.found
        rows.append(
            [
                f"{item.value:.4g} {item.unit}",
                f"{option.requests_per_s:.3f}",
                f"{found.at.threshold:,.0f}",
                f"{found.system.prefill:.0f}/{found.system.decode:.0f}",
                f"{found.at.p:.0%}",
                f"{sum(found.egress_bytes_per_s) * GBPS:.3g}",
                f"{option.dollars_per_mtok:.4g}",
                str(found.bottleneck),
                "yes" if item.plan.pays else "no",
            ]
        )
    return rows


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _caveats(plan: Plan) -> list[str]:
    """Say what the numbers are not."""
    lines = ["model output: steady state, even arrivals, no queues, no loss"]
    question = plan.question
    longest = question.uncached.quantile(1.0)
    for name, profile in (
        (question.home.name, question.home.profile),
        *((offer.name, offer.profile) for offer in question.offers),
    ):
        if profile.measured_tokens is None:
            lines.append(f"{name}: profile {profile.name!r} is not measured: {profile.source or 'no source'}")
        elif profile.measured_tokens[1] < longest:
            lines.append(
                f"{name}: profile {profile.name!r} was measured up to {profile.measured_tokens[1]:,} tokens; "
                f"the workload reaches {longest:,.0f}, which is extrapolated"
            )
    return lines


def as_json(plan: Plan, changed: Sequence[Sensitivity]) -> dict[str, Any]:
    """Return the plan as JSON values: bytes and seconds, no Gbps."""
    question = plan.question
    return {
        "kind": "model",
        "pays": plan.pays,
        "reasons": list(plan.reasons),
        "mean_uncached_tokens": mean(question.uncached),
        "alone": _option_json(plan.alone),
        "both": _option_json(plan.both) if question.offers else None,
        "grown": _option_json(plan.grown) if plan.grown else None,
        "sensitivity": [
            {
                "what": item.what,
                "unit": item.unit,
                "value": item.value,
                "pays": item.plan.pays,
                "both": _option_json(item.plan.both),
            }
            for item in changed
        ],
    }


def _option_json(option: Option) -> dict[str, Any]:
    found = option.found
    return {
        "requests_per_s": found.requests_per_s,
        "threshold_tokens": round(found.at.threshold),
        "offloaded_ratio": found.at.p,
        "prefill_instances": found.system.prefill,
        "decode_instances": found.system.decode,
        "bottleneck": found.bottleneck,
        "utilisation": {stage.value: share for stage, share in found.utilisation().items()},
        "egress_bytes_per_s": list(found.egress_bytes_per_s),
        "prefill_mean_s": option.ttft.mean_s,
        "prefill_p90_s": option.ttft.p90_s,
        "transfer_s": list(option.transfer_s),
        "dollars_per_hour": option.dollars_per_hour,
        "egress_dollars_per_hour": option.egress_dollars_per_hour,
        "dollars_per_mtok": option.dollars_per_mtok,
    }
