"""What articles about the paper claim, beside what the paper's text and our model say.

`ours` is the model's number where it has one; the note begins with what the paper's text says: yes, partly,
no, or Mooncake (true of that earlier paper). What a model of throughput cannot judge has kind `text` and says
where it is tested.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.harness import Row
from benchmarks.paper import systems
from benchmarks.paper.systems import GBPS, KI
from router.core.profiles import case_study, table3
from router.core.throughput import Stage, Throughput, ttft, wire_bytes
from router.core.workload import PAPER, mean_above


@dataclass(frozen=True, slots=True)
class Found:
    """The systems that the claims are about."""

    ours: Throughput
    even: Throughput
    naive: Throughput
    equal_cost: Throughput


def claims(smoke: bool) -> list[Row]:
    """Return one row per claim."""
    del smoke
    found = Found(
        systems.prfaas(),
        systems.homogeneous(),
        systems.naive(),
        systems.homogeneous(8 + 4 * systems.PRICE_RATIO),
    )
    return [*_numbers(found), *(_text(*claim) for claim in TEXTS)]


def _claim(name: str, unit: str, ours: float | None, claimed: float | None, note: str) -> Row:
    return Row(f"claim: {name}", unit, ours, claimed, "press", note=note, kind="model")


def _text(name: str, paper: str, note: str) -> Row:
    """Return the row of a claim that has no number here."""
    return Row(f"claim: {name}", "", None, None, "press", note=f"{paper}: {note}", kind="text")


def _numbers(found: Found) -> list[Row]:
    ours, even, naive, equal = found.ours, found.even, found.naive, found.equal_cost
    rate = ours.requests_per_s
    mine, theirs = ttft(ours, PAPER), ttft(even, PAPER)
    busy = ours.utilisation()
    gain = rate / equal.requests_per_s
    gib = 1 << 30
    hybrid = case_study.H200.kv_bytes(128 * KI) / gib
    dense = table3.profile("MiniMax-M2.5")
    transfer_s = wire_bytes(systems.PRFAAS.remotes[0], mean_above(PAPER, 19_400), 0.0) / (100 * GBPS)
    return [
        _claim("54 % more throughput", "%", (rate / even.requests_per_s - 1) * 100, 54, "yes"),
        _claim("32 % more than naive", "%", (rate / naive.requests_per_s - 1) * 100, 32, "yes"),
        _claim("15 % more at equal cost", "%", (gain - 1) * 100, 15, "yes; price ratio 2 implied"),
        _claim("3x throughput per dollar", "x", gain, 3, "no: the paper has 1.15"),
        _claim("30 % lower cloud spend", "%", (1 - 1 / gain) * 100, 30, "no: hardware only, egress extra"),
        _claim("28 % saving", "%", (1 - 1 / gain) * 100, 28, "no: hardware only, egress extra"),
        _claim(
            "mean TTFT lower by 50 %",
            "%",
            (1 - mine.mean_s / theirs.mean_s) * 100,
            50,
            "yes: prefill time only",
        ),
        _claim(
            "P90 TTFT lower by 64 %", "%", (1 - mine.p90_s / theirs.p90_s) * 100, 64, "yes: prefill time only"
        ),
        _claim(
            "end-to-end latency lower by 40 %",
            "%",
            (theirs.mean_s - mine.mean_s) / (theirs.mean_s + 1024 * 0.025) * 100,
            40,
            "no: 1,024 tokens at 25 ms are most of a request's time and stay",
        ),
        _claim(
            "half the idle time in decode",
            "% idle",
            (1 - busy[Stage.DECODE]) * 100,
            None,
            f"no: at home alone {(1 - even.utilisation()[Stage.DECODE]) * 100:.0f} % idle",
        ),
        _claim(
            "utilisation from 30-50 % to 75-85 %",
            "%",
            busy[Stage.DECODE] * 100,
            80,
            f"no: decode is the least busy; at home alone {even.utilisation()[Stage.DECODE] * 100:.0f} %",
        ),
        _claim("KV of tens of GB", "GiB", dense.kv_bytes(128 * KI) / gib, 31, "dense, 128K; hybrid: below"),
        _claim("KV of tens of GB, 1T hybrid at 128K", "GiB", hybrid, None, "partly: 0.19 to 2.3 GiB"),
        _claim("MiniMax-M2.5 near 60 Gbps at 32K", "Gbps", dense.kv_bytes_per_s(32 * KI) / GBPS, 60, "yes"),
        _claim("egress of 13 Gbps on 100", "Gbps", sum(ours.egress_bytes_per_s) / GBPS, 13, "yes"),
        _claim(
            "under 5 % overhead of the distance",
            "% of TTFT",
            transfer_s / mine.mean_s * 100,
            5,
            "no such test in the paper; mean offloaded KV on an idle 100 Gbps link, all of it exposed",
        ),
        _claim(
            "feasible only with hybrid models",
            "x",
            dense.kv_bytes_per_s(32 * KI) / table3.profile("Ring-2.5-1T").kv_bytes_per_s(32 * KI),
            None,
            "yes: a dense model needs so many times the link; `bandwidth` above has the rest",
        ),
    ]


#: name, what the paper's text says, our answer.
TEXTS = (
    ("published 16 April, v1, 8 authors", "yes", "not a matter of this model"),
    ("published 19 April", "no", "16 April"),
    ("Mooncake: +59-498 %, 100 B tokens/day", "Mooncake", "its own paper, FAST'25"),
    ("RDMA ties prefill and decode to one island; hybrid models shrink KV", "yes", "Table 3 above"),
    (
        "only long-context prefill is offloaded",
        "yes",
        "by uncached length: rule `prfaas`, router/core/policy.py",
    ),
    ("scheduling looks at the bandwidth", "yes", "equation 3 above; a link without width gets nothing"),
    ("decode stays near the user", "partly", "home site decodes; the paper has no user distance"),
    ("standard Ethernet, no RDMA", "partly", "between sites only; measured: bench_transfer"),
    ("standard WAN links", "partly", "VPC or dedicated 100 Gbps; measured on emulated links: bench_transfer"),
    ("builds directly on Mooncake", "partly", "an ancestor; ours builds on SGLang"),
    ("agents and sites share KV", "partly", "one index over all sites: cache_service"),
    ("cross-datacenter KV pool", "partly", "pools per site, metadata global"),
    ("dramatic cost cut", "partly", "15 % at equal cost, before egress: `cost` above"),
    ("first to cross the datacenter", "partly", "not a matter of this model"),
    ("production numbers missing", "yes", "Table 6 is model output there as well as here"),
    ("aggressive compression", "partly", "named as a complement; measured: bench_compression"),
    ("layer-by-layer streaming", "yes", "equation 3 needs it; measured: bench_layerwise"),
    ("decode begins on the first slice", "no", "every layer is needed before the first step"),
    ("global dedup over users", "partly", "prefix reuse; salted namespaces keep tenants apart"),
    ("prefill on compute-dense, decode on memory-rich chips", "yes", "H200 and H20 above"),
    ("prefill marketplace, video", "no", "opinion"),
    ("hit rate grows with users", "no", "hit rate is an input here: prfaas plan, sensitivity"),
    ("foundation of Kimi's long context", "no", "a case study"),
    ("open: WAN price, tail latency, partitions", "yes", "price: prfaas plan; the rest is no model's matter"),
    ("the quote 'comes partly from pairing'", "partly", "another article's words"),
    ("preprint, internal model, no release", "yes", "so the H20 curve is fitted"),
    ("13B/33B tests Beijing-Shanghai", "no", "one 1T model, no geography"),
    ("WAN jitter destabilises decode", "no", "decode starts after the transfer: jitter is TTFT, not ITL"),
    (
        "99.8 % accuracy of attention state",
        "no",
        "lossless unless fp8 is chosen: tests/engine",
    ),
    ("middleware for vLLM and TensorRT-LLM", "no", "in-house vLLM; ours: SGLang"),
    ("open-source prototype in evaluation", "no", "none was found"),
    ("synchronised over continents", "no", "not in the paper"),
    ("prefill goes to surplus regions", "partly", "prices per site: prfaas plan"),
    ("stable under surges", "partly", "a goal, not measured; steady state here, surges are the simulator's"),
)
