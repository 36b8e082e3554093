"""The systems of the paper's case study (section 5.1)."""

from __future__ import annotations

from dataclasses import replace

from router.core.optimum import by_grid, ratios
from router.core.profiles.case_study import H20, H200
from router.core.throughput import Remote, System, Throughput, split, throughput
from router.core.workload import PAPER

GBPS = 1e9 / 8
KI = 1024
#: 32 H200 (4 instances) and 64 H20 (8) with 100 Gbps between them; 1,024 output tokens.
PRFAAS = System(H20, 3, 5, 1024, (Remote(4, H200, 100 * GBPS),))
#: 96 H20 (12 instances), nothing remote.
HOMOGENEOUS = replace(PRFAAS, prefill=9, decode=3, remotes=())
#: Every prompt is prefilled remotely, every home instance decodes.
NAIVE = replace(PRFAAS, prefill=0, decode=8)
#: H200 to H20, per instance, that the paper's 15 % at equal cost implies: 1.54 / 1.15 = (4 x + 8) / 12.
PRICE_RATIO = 2.0


def prfaas(gbps: float = 100.0) -> Throughput:
    """Return the best threshold and ratio of the case study on a link of `gbps`."""
    remote = replace(PRFAAS.remotes[0], link_bytes_per_s=gbps * GBPS)
    return by_grid(ratios(replace(PRFAAS, remotes=(remote,))), PAPER)


def homogeneous(instances: float = 12) -> Throughput:
    """Return the best ratio of `instances` H20 instances alone."""
    return by_grid(ratios(replace(HOMOGENEOUS, prefill=instances - 3, decode=3)), PAPER)


def naive() -> Throughput:
    """Return what sending everything away sustains."""
    return throughput(NAIVE, split(PAPER, 0.0))
