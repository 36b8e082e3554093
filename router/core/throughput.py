"""The paper's throughput model (arXiv 2604.15039, section 3): what a system sustains with a given threshold.

Symbols are those of its Table 4. Requests flow through two producers, prefill in remote sites (PrfaaS) and
prefill at home (PD-P), into one consumer, decode at home (PD-D). As in the paper every offloaded request
counts as one of the mean offloaded length, every other one as one of the mean local length; arrivals are
even; a worker prefills one prompt at a time; compute and sending overlap layer by layer. So these are
capacities in steady state: no queue, no round trip, no loss (the simulator has those).

Beyond the paper: several remote sites, a wire ratio (compression) per link, and a cached prefix on each
prompt, which the computing and the decoding site are both taken to hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from router.core.profile import ModelProfile
from router.core.workload import POINTS, Lengths, mean, mean_above, mean_below


class Stage(StrEnum):
    """What may limit the whole."""

    REMOTE_PREFILL = "remote prefill"
    LINK = "link"
    LOCAL_PREFILL = "local prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Remote:
    """A prefill site (the paper's PrfaaS cluster) and its link to the home site.

    Attributes:
        instances: N_prfaas.
        profile: the model on its chips.
        link_bytes_per_s: B_out, what its link carries; 0 when it is down.
        wire_ratio: bytes on the wire per byte of KV, 1 without compression.
    """

    instances: float
    profile: ModelProfile
    link_bytes_per_s: float
    wire_ratio: float = 1.0


@dataclass(frozen=True, slots=True)
class System:
    """A home site that decodes, and the remote sites that prefill for it.

    Attributes:
        profile: the model on the home site's chips, decode rate included.
        prefill: N_p, home instances that prefill.
        decode: N_d, home instances that decode.
        output_tokens: L_out, mean tokens of an answer, > 0.
        remotes: prefill sites, () for none.
        cached_ratio: cached tokens of a prompt per uncached one, >= 0.
    """

    profile: ModelProfile
    prefill: float
    decode: float
    output_tokens: float
    remotes: tuple[Remote, ...] = ()
    cached_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.profile.decode is None:
            raise ValueError(f"profile {self.profile.name!r}: the home site needs a decode rate")
        if not self.output_tokens > 0 or min(self.prefill, self.decode, self.cached_ratio) < 0:
            raise ValueError("output_tokens must be > 0; prefill, decode and cached_ratio >= 0")


@dataclass(frozen=True, slots=True)
class Split:
    """What a threshold does to the workload: p, l_long, l_short of Table 4."""

    threshold: float
    p: float
    long: float
    short: float


def split(lengths: Lengths, threshold: float) -> Split:
    """Return p = P(L > t) and the mean lengths above and not above it."""
    return Split(
        threshold,
        lengths.above(threshold),
        mean_above(lengths, threshold),
        mean_below(lengths, threshold),
    )


# --- the equations ----------------------------------------------------------------------------------------


def prefill_s(profile: ModelProfile, uncached: float, cached_ratio: float) -> float:
    """Return T_prefill of a prompt with its share of cached tokens."""
    return profile.prefill_s(uncached, uncached * cached_ratio)


def wire_bytes(remote: Remote, uncached: float, cached_ratio: float) -> float:
    """Return the bytes that cross for one offloaded prompt: S_kv of what decode does not hold."""
    held = uncached * cached_ratio
    return remote.profile.kv_bytes(uncached + held, held) * remote.wire_ratio


def egress_needed_bytes_per_s(instances: float, profile: ModelProfile, mean_tokens: float) -> float:
    """Return eq. 2: the egress that keeps `instances` of a prefill cluster busy, N/P x Phi_kv(L_avg)."""
    return instances * profile.kv_bytes_per_s(mean_tokens)


def theta_remote(remote: Remote, uncached: float, cached_ratio: float = 0.0) -> float:
    """Return eq. 3: Theta_prfaas = min(N / T_prefill(l_long), B_out / S_kv(l_long)), requests/s."""
    if not uncached:
        return 0.0
    compute = remote.instances / prefill_s(remote.profile, uncached, cached_ratio)
    return min(compute, remote.link_bytes_per_s / wire_bytes(remote, uncached, cached_ratio))


def theta_local(system: System, uncached: float) -> float:
    """Return eq. 4: Theta_pd-p = N_p / T_prefill(l_short), requests/s."""
    return system.prefill / prefill_s(system.profile, uncached, system.cached_ratio) if uncached else 0.0


def theta_decode(system: System) -> float:
    """Return eq. 5: Theta_pd-d = N_d BS_max / (T_decode L_out), requests/s."""
    rate = system.profile.decode
    assert rate is not None  # System refuses such a profile
    return system.decode * rate.tokens_per_s / system.output_tokens


@dataclass(frozen=True, slots=True)
class Throughput:
    """What a system sustains.

    Attributes:
        system: what was asked about.
        at: threshold and shares.
        remote, local, decode: Theta of the three stages, requests/s; `remotes` one by one.
        requests_per_s: Lambda_max, eq. 6.
        bottleneck: the stage that sets it.
    """

    system: System
    at: Split
    remotes: tuple[float, ...]
    local: float
    decode: float
    requests_per_s: float
    bottleneck: Stage

    @property
    def remote(self) -> float:
        """Theta_prfaas over all remote sites."""
        return math.fsum(self.remotes)

    @property
    def prefill_capacity(self) -> float:
        """Requests/s that prefill alone would sustain: min of the first two terms of eq. 6."""
        return min(_per(self.remote, self.at.p), _per(self.local, 1.0 - self.at.p))

    @property
    def egress_bytes_per_s(self) -> tuple[float, ...]:
        """Bytes per second on each remote site's link at Lambda_max."""
        offloaded = self.requests_per_s * self.at.p
        total = self.remote
        return tuple(
            offloaded * theta / total * wire_bytes(remote, self.at.long, self.system.cached_ratio)
            if total > 0 and self.at.p > 0
            else 0.0
            for remote, theta in zip(self.system.remotes, self.remotes, strict=True)
        )

    def utilisation(self) -> dict[Stage, float]:
        """Return the busy share of each stage at Lambda_max, over all remote sites together."""
        ratio, rate = self.system.cached_ratio, self.requests_per_s
        busy = 0.0
        for remote, theta in zip(self.system.remotes, self.remotes, strict=True):
            if theta > 0 and self.at.p > 0:
                busy += (
                    rate * self.at.p * theta / self.remote * prefill_s(remote.profile, self.at.long, ratio)
                )
        instances = sum(remote.instances for remote in self.system.remotes)
        link = sum(remote.link_bytes_per_s for remote in self.system.remotes)
        return {
            Stage.REMOTE_PREFILL: busy / instances if instances else 0.0,
            Stage.LINK: sum(self.egress_bytes_per_s) / link if link else 0.0,
            Stage.LOCAL_PREFILL: rate * (1.0 - self.at.p) / self.local if self.local else 0.0,
            Stage.DECODE: rate / self.decode if self.decode else 0.0,
        }


def _per(theta: float, share: float) -> float:
    """Return theta / share, where a stage that nothing goes through limits nothing."""
    return theta / share if share > 0 else math.inf


def throughput(system: System, at: Split) -> Throughput:
    """Return eq. 6: Lambda_max = min(Theta_prfaas / p, Theta_pd-p / (1 - p), Theta_pd-d)."""
    remotes = tuple(theta_remote(r, at.long, system.cached_ratio) for r in system.remotes)
    local, decode = theta_local(system, at.short), theta_decode(system)
    limits = {
        Stage.REMOTE_PREFILL: _per(math.fsum(remotes), at.p),
        Stage.LOCAL_PREFILL: _per(local, 1.0 - at.p),
        Stage.DECODE: decode,
    }
    bottleneck = min(limits, key=lambda stage: limits[stage])
    if bottleneck is Stage.REMOTE_PREFILL and _link_binds(system, remotes, at.long):
        bottleneck = Stage.LINK
        limits[Stage.LINK] = limits[Stage.REMOTE_PREFILL]
    return Throughput(system, at, remotes, local, decode, limits[bottleneck], bottleneck)


def _link_binds(system: System, thetas: tuple[float, ...], uncached: float) -> bool:
    """Say whether the links hold back more of the remote sites' compute than not."""
    free = sum(r.instances / prefill_s(r.profile, uncached, system.cached_ratio) for r in system.remotes)
    return math.fsum(thetas) < free * (1 - 1e-9)


@dataclass(frozen=True, slots=True)
class Ttft:
    """Time to the first token with nothing else in the system, seconds: what Table 6 prints."""

    mean_s: float
    p90_s: float


def ttft(found: Throughput, lengths: Lengths) -> Ttft:
    """Return mean and P90 of the prefill time over the workload, each prompt where the threshold sends it.

    No queue and no transfer, as in the paper. O(POINTS log POINTS).
    """
    system, times = found.system, []
    for i in range(POINTS):
        tokens = lengths.quantile((i + 0.5) / POINTS)
        if tokens > found.at.threshold and found.remote > 0:
            parts = (
                theta * prefill_s(remote.profile, tokens, system.cached_ratio)
                for remote, theta in zip(system.remotes, found.remotes, strict=True)
            )
            times.append(math.fsum(parts) / found.remote)
        else:
            times.append(prefill_s(system.profile, tokens, system.cached_ratio))
    times.sort()
    return Ttft(math.fsum(times) / POINTS, times[math.ceil(0.9 * POINTS) - 1])


def tokens_per_request(system: System, lengths: Lengths) -> float:
    """Return mean prompt (cached included) and output tokens of a request."""
    return mean(lengths) * (1.0 + system.cached_ratio) + system.output_tokens
