"""The paper's tables and figures, our number beside the printed one."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.harness import Row
from benchmarks.paper import systems
from benchmarks.paper.systems import GBPS, KI
from router.core.optimum import by_crossings, by_grid, ratios
from router.core.profile import Knots, KvShape, ModelProfile
from router.core.profile_fit import fit
from router.core.profiles import case_study, table3
from router.core.throughput import (
    Remote,
    System,
    Throughput,
    egress_needed_bytes_per_s,
    split,
    throughput,
    ttft,
    wire_bytes,
)
from router.core.workload import PAPER, mean, mean_above

MIB = 1 << 20
#: KV of prompts of so many Ki tokens at 8 bits a value, MiB, as NVIDIA's Dynamo guide prints it.
DYNAMO_FP8_MIB = {
    "Qwen3.5-397B": {4: 243, 16: 423, 32: 663, 64: 1.12 * KI},
    "Qwen3-235B": {4: 376, 16: 1.47 * KI, 32: 2.94 * KI, 64: 5.88 * KI},
}
#: What rounding to printed digits may change.
_DIGITS = 0.005


def row(
    name: str,
    unit: str,
    ours: float,
    paper: float | None,
    within: float | None = None,
    note: str = "",
) -> Row:
    """Return a row of the model beside the paper."""
    source = "paper" if paper is not None else "paper prints none"
    return Row(name, unit, ours, paper, source, within=within, note=note, kind="model")


def tables_3(smoke: bool) -> list[Row]:
    """Table 3, and whether the KV sizes behind it agree with what others print."""
    del smoke
    found = []
    for model, printed in table3.PHI_GBPS.items():
        profile = table3.profile(model)
        for tokens, phi in zip(table3.LENGTHS, printed, strict=True):
            size, seconds = profile.kv_bytes(tokens) / MIB, profile.prefill_s(tokens)
            found.append(
                row(
                    f"Table 3: {model}, {tokens // KI}K, Phi_kv",
                    "Gbps",
                    profile.kv_bytes_per_s(tokens) / GBPS,
                    phi,
                    _DIGITS,
                    f"by construction: S_kv {size:.1f} MiB of config.json, T_prefill {seconds:.2f} s",
                )
            )
    for model, printed_mib in DYNAMO_FP8_MIB.items():
        kv = table3.profile(model).kv
        assert isinstance(kv, KvShape)
        halved = replace(kv, bytes_per_token=kv.bytes_per_token / 2)
        for length, mib in printed_mib.items():
            ours = halved.bytes_at(length * KI) / MIB
            name = f"S_kv of {model} at {length}K, KV of 8 bits"
            found.append(Row(name, "MiB", ours, mib, "Dynamo guide", within=0.01, kind="model"))
    for a, b, times in (("MiniMax-M2.5", "MiMo-V2-Flash", 13), ("Qwen3-235B", "Qwen3.5-397B", 4)):
        ours = table3.profile(a).kv_bytes_per_s(32 * KI) / table3.profile(b).kv_bytes_per_s(32 * KI)
        found.append(row(f"{a} to {b} at 32K, Phi_kv", "x", ours, times, 0.02))
    return [*found, *(_left_out(model, length) for model in table3.PHI_GBPS for length in (1, 2))]


def _left_out(model: str, at: int) -> Row:
    """Predict one printed length from the other three: the only figures of Table 3 that are not given in."""
    profile = table3.profile(model)
    assert isinstance(profile.curve, Knots)
    curve = fit([p for i, p in enumerate(profile.curve.points) if i != at]).curve
    tokens = table3.LENGTHS[at]
    phi = replace(profile, curve=curve).kv_bytes_per_s(tokens) / GBPS
    name = f"Table 3: {model}, {tokens // KI}K from the other lengths"
    return row(name, "Gbps", phi, table3.PHI_GBPS[model][at], note="T = a + b l + c l^2 of three points")


def egress(smoke: bool) -> list[Row]:
    """Section 2.3: what a cluster sends (equation 2)."""
    del smoke
    found = []
    for what, instances, model, length, paper, within in (
        ("512 H200", 64, "MiniMax-M2.5", 32, 3800, 0.02),
        ("512 H200", 64, "Qwen3-235B", 32, 2100, 0.02),
        ("512 H200", 64, "Ring-2.5-1T", 32, 170, 0.03),
        ("512 H200", 64, "Ring-2.5-1T", 128, 100, None),
        ("10,000 H200", 1250, "Ring-2.5-1T", 128, 1800, 0.02),
    ):
        bytes_per_s = egress_needed_bytes_per_s(instances, table3.profile(model), length * KI)
        note = "" if within else "the paper says: below"
        name = f"Section 2.3: {what}, {model}, {length}K, egress"
        found.append(row(name, "Gbps", bytes_per_s / GBPS, paper, within, note))
    return found


def tables_5(smoke: bool) -> list[Row]:
    """Table 5: Phi_kv from its own S_kv and T_prefill, and the slope that tells the layers."""
    del smoke
    found = [
        row(f"Table 5: {n}K, Phi_kv", "Gbps", case_study.H200.kv_bytes_per_s(n * KI) / GBPS, phi, 0.01)
        for n, phi in ((1, 3.61), (8, 3.59), (32, 3.19), (128, 2.62))
    ]
    slope = (case_study.H200.kv_bytes(128 * KI) - case_study.H200.kv_bytes(KI)) / (127 * KI)
    layers = slope / (576 * 2)
    found.append(row("Table 5: KV per token", "bytes", slope, None, note=f"{layers:.1f} MLA layers of 1,152"))
    return found


def _six(name: str, found: Throughput, paper: dict[str, float]) -> list[Row]:
    """Return the column of Table 6 of one system."""
    times = ttft(found, PAPER)
    values = {
        "Lambda_max": ("req/s", found.requests_per_s, 0.02),
        "Theta_prfaas": ("req/s", found.remote, 0.03),
        "Theta_pd-p": ("req/s", found.local, 0.03),
        "Theta_pd-d": ("req/s", found.decode, 0.02),
        "mean TTFT": ("s", times.mean_s, 0.03),
        "P90 TTFT": ("s", times.p90_s, 0.03),
        "t": ("tokens", found.at.threshold, 0.02),
        "share offloaded": ("%", found.at.p * 100, 0.02),
        "l_long": ("Ki", found.at.long / KI, 0.02),
        "N_p": ("", found.system.prefill, 0.0),
        "N_d": ("", found.system.decode, 0.0),
        "egress": ("Gbps", sum(found.egress_bytes_per_s) / GBPS, None),
    }
    return [
        row(f"Table 6: {name}, {what}", values[what][0], values[what][1], printed, values[what][2])
        for what, printed in paper.items()
    ]


def tables_6(smoke: bool) -> list[Row]:
    """Table 6 with t and N_p/N_d searched for. The H20 curve is fitted: the paper prints none."""
    del smoke
    ours, even, naive = systems.prfaas(), systems.homogeneous(), systems.naive()
    crossing = by_crossings(systems.PRFAAS, PAPER)
    found = _six(
        "PrfaaS-PD",
        ours,
        {
            "Lambda_max": 3.24,
            "t": 19_400,
            "share offloaded": 49.6,
            "l_long": 44,
            "N_p": 3,
            "N_d": 5,
            "Theta_prfaas": 1.61,
            "Theta_pd-p": 1.64,
            "Theta_pd-d": 3.91,
            "mean TTFT": 2.22,
            "P90 TTFT": 3.51,
            "egress": 13,
        },
    )
    found += _six(
        "homogeneous PD",
        even,
        {
            "Lambda_max": 2.11,
            "N_p": 9,
            "N_d": 3,
            "Theta_pd-d": 2.35,
            "mean TTFT": 4.44,
            "P90 TTFT": 9.73,
        },
    )
    found += _six(
        "naive heterogeneous",
        naive,
        {
            "Lambda_max": 2.45,
            "Theta_prfaas": 2.45,
            "Theta_pd-d": 6.25,
            "mean TTFT": 1.74,
            "P90 TTFT": 3.51,
        },
    )
    base = even.requests_per_s
    return [
        *found,
        row("Table 6: PrfaaS-PD to homogeneous", "x", ours.requests_per_s / base, 1.54, 0.02),
        row("Table 6: naive to homogeneous", "x", naive.requests_per_s / base, 1.16, 0.02),
        row("PrfaaS-PD to naive", "x", ours.requests_per_s / naive.requests_per_s, 1.32, 0.02),
        row("PrfaaS-PD by the crossings (7), (8)", "req/s", crossing.requests_per_s, 3.24, 0.02),
        row("mean of L", "tokens", mean(PAPER), 27_000, 0.02),
    ]


def figures_5(smoke: bool) -> list[Row]:
    """Fig. 5: N_p at t = 19.4K, and t at N_p/N_d = 3/5. The paper prints the peaks only."""
    del smoke
    at = split(PAPER, 19_400)
    found = []
    for system in ratios(systems.PRFAAS)[1:]:
        now = throughput(system, at)
        name = f"Fig. 5a: N_p/N_d = {system.prefill:.0f}/{system.decode:.0f}"
        peak = 3.24 if system.prefill == 3 else None
        found.append(
            row(name, "req/s", now.requests_per_s, peak, 0.02 if peak else None, f"{now.bottleneck}")
        )
    for t in (2_000, 5_000, 10_000, 15_000, 19_400, 25_000, 30_000, 40_000, 60_000):
        now = throughput(systems.PRFAAS, split(PAPER, t))
        peak = 3.24 if t == 19_400 else None
        found.append(
            row(
                f"Fig. 5b: t = {t / 1000:g}K",
                "req/s",
                now.requests_per_s,
                peak,
                0.02 if peak else None,
                f"{now.bottleneck}",
            )
        )
    return found


def costs(smoke: bool) -> list[Row]:
    """The gain at equal cost: the paper says about 15 % and no price, so the price it implies is taken."""
    del smoke
    even = systems.homogeneous(systems.PRFAAS.remotes[0].instances * systems.PRICE_RATIO + 8)
    ours = systems.prfaas()
    name = f"equal cost, H200 at {systems.PRICE_RATIO:g} H20: gain"
    note = f"16 H20 instances alone: {even.requests_per_s:.2f} req/s; the price is implied, not printed"
    gain = ours.requests_per_s / even.requests_per_s
    daily_tb = sum(ours.egress_bytes_per_s) * 86_400 / 1e12
    return [
        row(name, "x", gain, 1.15, 0.02, note),
        row("egress of a day at Lambda_max", "TB", daily_tb, None),
        row(
            "egress price at which the gain is spent, H20 instance at 8 $/h",
            "$/GB",
            _break_even(ours, even, 8.0),
            None,
        ),
    ]


def _break_even(ours: Throughput, even: Throughput, hourly: float) -> float:
    """Return the $/GB of egress that makes a request as dear as at home, at the same hardware cost."""
    per_hour = 16 * hourly
    saved = per_hour / (even.requests_per_s * 3600) - per_hour / (ours.requests_per_s * 3600)
    return saved / (sum(ours.egress_bytes_per_s) / ours.requests_per_s / 1e9)


def bandwidth(smoke: bool) -> list[Row]:
    """What the link's width does, re-optimised for each; and to a dense model."""
    found = []
    offloaded = wire_bytes(systems.PRFAAS.remotes[0], mean_above(PAPER, 19_400), 0.0)
    found.append(row("KV of the mean offloaded request", "GB", offloaded / 1e9, None))
    for gbps in (100, 10) if smoke else (200, 100, 50, 25, 12, 10, 5, 2, 1):
        now = systems.prfaas(gbps)
        note = (
            f"t {now.at.threshold:.0f}, N_p/N_d {now.system.prefill:.0f}/{now.system.decode:.0f}, "
            f"egress {sum(now.egress_bytes_per_s) / GBPS:.1f} Gbps, {now.bottleneck}"
        )
        found.append(row(f"case study on {gbps} Gbps", "req/s", now.requests_per_s, None, note=note))
    for model in ("MiniMax-M2.5", "Qwen3-235B", "Qwen3.5-397B", "Ring-2.5-1T"):
        for gbps in (100, 10):
            found.append(_second_site(model, gbps))
    return found


#: H20 to H200 prefill seconds at 1, 8, 32 and 128K, of the fitted curve: stands for "a slower chip" below.
SLOWER = tuple(
    b / a for (_, a), (_, b) in zip(case_study.H200.curve.points, case_study.H20.curve.points, strict=True)
)


def slower(profile: ModelProfile) -> ModelProfile:
    """Return a model of Table 3 on chips as much slower as H20 is in the case study."""
    assert isinstance(profile.curve, Knots)
    points = tuple((n, s * f) for (n, s), f in zip(profile.curve.points, SLOWER, strict=True))
    return replace(profile, curve=Knots(points), decode=case_study.DECODE)


def _second_site(model: str, gbps: float) -> Row:
    """Compare 4 remote and 8 home instances with 16 at home (equal cost at a price ratio of 2)."""
    fast = table3.profile(model)
    home = System(slower(fast), 4, 4, 1024, (Remote(4, fast, gbps * GBPS),))
    both = by_grid(ratios(home), PAPER)
    alone = by_grid(ratios(replace(home, prefill=8, decode=8, remotes=())), PAPER)
    note = f"offloads {both.at.p:.0%}, needs {fast.kv_bytes_per_s(32 * KI) / GBPS:.1f} Gbps per instance"
    name = f"{model}, {gbps:g} Gbps: second site at equal cost"
    gain = both.requests_per_s / alone.requests_per_s
    return Row(name, "x", gain, 1.0, "home alone", note=note, kind="model")
