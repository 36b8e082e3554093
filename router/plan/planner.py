"""Whether a second site pays, and how to run it if so: the throughput model with prices (pure).

Compares three systems for the same workload: home as it is, home with the remote sites, and home grown by
what the remote sites would cost. Each runs at its own best threshold and ratio: of most throughput, or of
cheapest tokens where egress has a price. A second site pays when its tokens are cheaper than those of the
grown home (or, where home cannot grow, when it adds throughput at all).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from router.core.optimum import by_crossings, by_grid, ratios
from router.core.profile import ModelProfile
from router.core.throughput import (
    Remote,
    Stage,
    System,
    Throughput,
    Ttft,
    prefill_s,
    tokens_per_request,
    ttft,
    wire_bytes,
)
from router.core.workload import Lengths

#: Less than this share more is no gain.
WORTH = 0.005
#: Home instances up to which every ratio is tried; above, the crossing conditions find the same sooner.
GRID = 32


@dataclass(frozen=True, slots=True)
class Home:
    """The site that decodes; dollars are of one instance and hour."""

    name: str
    profile: ModelProfile
    instances: int
    dollars_per_hour: float = 0.0
    can_grow: bool = True


@dataclass(frozen=True, slots=True)
class Offer:
    """A remote prefill site and its link, as offered; dollars are of one instance and hour."""

    name: str
    profile: ModelProfile
    instances: int
    link_bytes_per_s: float
    dollars_per_hour: float = 0.0
    rtt_s: float = 0.0
    dollars_per_byte: float = 0.0
    link_dollars_per_hour: float = 0.0
    wire_ratio: float = 1.0

    @property
    def remote(self) -> Remote:
        """The site as the throughput model sees it."""
        return Remote(self.instances, self.profile, self.link_bytes_per_s, self.wire_ratio)

    @property
    def fixed_dollars_per_hour(self) -> float:
        """What it costs per hour before a byte is sent."""
        return self.instances * self.dollars_per_hour + self.link_dollars_per_hour


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked.

    Attributes:
        lengths: of whole prompts, of which `hit_ratio` is found cached.
        output_tokens: mean tokens of an answer.
    """

    home: Home
    offers: tuple[Offer, ...]
    lengths: Lengths
    output_tokens: float
    hit_ratio: float = 0.0

    @property
    def uncached(self) -> Lengths:
        """Lengths of what is left to compute of a prompt."""
        return self.lengths.scaled(1.0 - self.hit_ratio) if self.hit_ratio else self.lengths


@dataclass(frozen=True, slots=True)
class Option:
    """One way to serve the workload.

    Attributes:
        found: threshold, ratio, throughput.
        ttft: of prefill alone, nothing else in the system.
        dollars_per_hour: hardware and lines; `egress_dollars_per_hour` comes on top, at full throughput.
        dollars_per_mtok: all of it per million prompt and output tokens; 0 without prices.
        transfer_s: per remote site, the seconds that the mean offloaded prompt's KV takes on an idle link.
    """

    found: Throughput
    ttft: Ttft
    dollars_per_hour: float
    egress_dollars_per_hour: float
    dollars_per_mtok: float
    transfer_s: tuple[float, ...]

    @property
    def requests_per_s(self) -> float:
        """Lambda_max."""
        return self.found.requests_per_s


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer.

    Attributes:
        alone: home as it is.
        both: home with the remote sites; equal to `alone` when there are none.
        grown: home grown by the cost of the remote sites; None where it cannot grow or nothing has a price.
        pays: whether the second site does; `reasons` say why or why not.
    """

    question: Question
    alone: Option
    both: Option
    grown: Option | None
    pays: bool
    reasons: tuple[str, ...]


def plan(question: Question) -> Plan:
    """Answer a question. About 0.1 s for ten instances; O(instances x thresholds)."""
    home = question.home
    alone = _option(question, home.instances, ())
    both = _option(question, home.instances, question.offers)
    grown = _grown(question, both)
    pays, reasons = _verdict(question, alone, both, grown)
    return Plan(question, alone, both, grown, pays, reasons)


def _option(question: Question, instances: int, offers: tuple[Offer, ...]) -> Option:
    lengths, hit = question.uncached, question.hit_ratio
    system = System(
        profile=question.home.profile,
        prefill=0,
        decode=instances,
        output_tokens=question.output_tokens,
        remotes=tuple(offer.remote for offer in offers),
        cached_ratio=hit / (1.0 - hit),
    )
    fixed = instances * question.home.dollars_per_hour + sum(o.fixed_dollars_per_hour for o in offers)

    def egress_dollars(now: Throughput) -> float:
        rates = zip(now.egress_bytes_per_s, offers, strict=True)
        return 3600 * sum(rate * offer.dollars_per_byte for rate, offer in rates)

    def requests_per_dollar(now: Throughput) -> float:
        spent = fixed + egress_dollars(now)
        return now.requests_per_s / spent if spent else 0.0

    if any(offer.dollars_per_byte for offer in offers):
        found = by_grid(ratios(system)[:: max(1, instances // GRID)], lengths, requests_per_dollar)
    elif instances <= GRID:
        found = by_grid(ratios(system), lengths)
    else:
        found = by_crossings(system, lengths)
    egress = egress_dollars(found)
    tokens_per_hour = found.requests_per_s * 3600 * tokens_per_request(system, lengths)
    per_mtok = (fixed + egress) / tokens_per_hour * 1e6 if tokens_per_hour else math.inf
    return Option(found, ttft(found, lengths), fixed, egress, per_mtok, _transfer_s(found, offers))


def _transfer_s(found: Throughput, offers: tuple[Offer, ...]) -> tuple[float, ...]:
    """Return what one prompt's KV takes on each idle link, round trip included; 0 where nothing is sent."""
    ratio = found.system.cached_ratio
    return tuple(
        wire_bytes(offer.remote, found.at.long, ratio) / offer.link_bytes_per_s + offer.rtt_s
        if found.at.p > 0 and offer.link_bytes_per_s > 0
        else 0.0
        for offer in offers
    )


def _grown(question: Question, both: Option) -> Option | None:
    """Return home with as many more instances as the remote sites, lines and egress would pay for."""
    home = question.home
    if not question.offers or not home.can_grow or home.dollars_per_hour <= 0:
        return None
    instances = (both.dollars_per_hour + both.egress_dollars_per_hour) / home.dollars_per_hour
    whole = {max(home.instances, math.floor(instances)), max(home.instances, math.ceil(instances))}
    options = [_option(question, n, ()) for n in sorted(whole)]
    return min(options, key=lambda option: option.dollars_per_mtok)


# --- the verdict ------------------------------------------------------------------------------------------


def _verdict(
    question: Question, alone: Option, both: Option, grown: Option | None
) -> tuple[bool, tuple[str, ...]]:
    """Say whether the second site pays, and why or why not."""
    if not question.offers:
        return False, ("no remote site is offered",)
    gain = both.requests_per_s / alone.requests_per_s - 1 if alone.requests_per_s else math.inf
    if gain < WORTH:
        why = _why_slow(question, both)
        return False, (f"it adds {max(gain, 0.0):.1%} throughput to what home does alone", *why)
    added = f"throughput {alone.requests_per_s:.3g} -> {both.requests_per_s:.3g} req/s"
    if alone.requests_per_s:
        added += f" ({gain:+.0%})"
    if grown is None:
        reasons = [added]
        if both.dollars_per_mtok > 0:
            reasons.append(_marginal(alone, both))
        reasons.append(
            "home cannot grow, so there is nothing else to buy"
            if not question.home.can_grow
            else "home has no price, so nothing can be said of cost"
        )
        return True, tuple(reasons)
    saved = 1 - both.dollars_per_mtok / grown.dollars_per_mtok
    more = grown.found.system.prefill + grown.found.system.decode
    against = (
        f"a million tokens cost {both.dollars_per_mtok:.4g} $, against {grown.dollars_per_mtok:.4g} $ with "
        f"the same money in {question.home.name} ({more:.0f} instances, {grown.requests_per_s:.3g} req/s)"
    )
    if saved > WORTH:
        return True, (added, f"{against}: {saved:.1%} less")
    return False, (added, f"{against}: {-saved:.1%} more", *_why_dear(question, both, grown))


def _marginal(alone: Option, both: Option) -> str:
    if not alone.requests_per_s:
        return f"a million tokens cost {both.dollars_per_mtok:.4g} $; home alone serves nothing"
    extra_tokens = both.requests_per_s / alone.requests_per_s - 1
    alone_per_mtok = alone.dollars_per_mtok
    extra = (both.dollars_per_mtok * (1 + extra_tokens) - alone_per_mtok) / extra_tokens
    return f"each further million tokens costs {extra:.4g} $, those of home alone {alone_per_mtok:.4g} $"


def _why_slow(question: Question, both: Option) -> tuple[str, ...]:
    """Name what holds the remote sites back."""
    reasons = []
    long, ratio = question.uncached.quantile(0.9), question.hit_ratio / (1.0 - question.hit_ratio)
    for offer in question.offers:
        if offer.link_bytes_per_s <= 0:
            reasons.append(f"the link from {offer.name} carries nothing")
            continue
        reasons += _link_arithmetic(question, offer)
        if offer.dollars_per_byte and not both.found.at.p:
            dollars = wire_bytes(offer.remote, long, ratio) * offer.dollars_per_byte
            reasons.append(
                f"egress from {offer.name} spends more than it saves, so sending nothing is cheapest: the "
                f"KV of a prompt of {long:,.0f} uncached tokens costs {dollars:.3g} $"
            )
    if both.found.bottleneck is Stage.DECODE:
        reasons.append("decode binds at home, which remote prefill does not relieve")
    return tuple(reasons)


def _link_arithmetic(question: Question, offer: Offer) -> list[str]:
    """Say what the site would send and what its link carries, where the link is too thin; else nothing."""
    lengths, ratio = question.uncached, question.hit_ratio / (1.0 - question.hit_ratio)
    long = lengths.quantile(0.9)
    size = wire_bytes(offer.remote, long, ratio)
    wanted = offer.instances * size / prefill_s(offer.profile, long, ratio)
    if wanted <= offer.link_bytes_per_s:
        return []
    return [
        f"the link binds: a prompt of {long:,.0f} uncached tokens is {size / 1e6:,.0f} MB of KV, so the "
        f"{offer.instances} instances in {offer.name} make {wanted * 8e-9:.3g} Gbps and the link carries "
        f"{offer.link_bytes_per_s * 8e-9:.3g}"
    ]


def _why_dear(question: Question, both: Option, grown: Option) -> tuple[str, ...]:
    """Name what makes the second site's tokens dear: egress price, the link, or the chip."""
    reasons = [line for offer in question.offers for line in _link_arithmetic(question, offer)]
    whole = both.dollars_per_hour + both.egress_dollars_per_hour
    if both.dollars_per_mtok * both.dollars_per_hour / whole < grown.dollars_per_mtok * (1 - WORTH):
        share = both.egress_dollars_per_hour / whole
        reasons.append(f"egress is {share:.0%} of the cost: without it the second site would pay")
    ratio = question.hit_ratio / (1.0 - question.hit_ratio)
    long = both.found.at.long or question.uncached.quantile(0.9)
    for offer in question.offers:
        dearer = offer.dollars_per_hour / question.home.dollars_per_hour
        faster = prefill_s(question.home.profile, long, ratio) / prefill_s(offer.profile, long, ratio)
        if dearer > faster:
            reasons.append(
                f"an instance in {offer.name} costs {dearer:.2f} times one in {question.home.name} and "
                f"prefills {long:,.0f} tokens {faster:.2f} times as fast"
            )
    if not reasons:
        limit = both.found.bottleneck
        reasons.append(f"{limit} binds with the second site, so not all that is paid for works")
    return tuple(reasons)


# --- sensitivity ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The plan again with one input changed; `value` is in `unit`."""

    what: str
    unit: str
    value: float
    plan: Plan


def sensitivity(question: Question) -> list[Sensitivity]:
    """Re-plan for other bandwidths, hit ratios, egress prices and remote prices. About 25 plans."""
    if not question.offers:
        return []
    found = []
    width = sum(o.link_bytes_per_s for o in question.offers) * 8e-9
    for factor in (0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0):
        offers = tuple(replace(o, link_bytes_per_s=o.link_bytes_per_s * factor) for o in question.offers)
        changed = plan(replace(question, offers=offers))
        found.append(Sensitivity("bandwidth", "Gbps", width * factor, changed))
    for hit in sorted({0.0, 0.25, 0.5, 0.75, 0.9, question.hit_ratio}):
        found.append(Sensitivity("hit ratio", "%", hit * 100, plan(replace(question, hit_ratio=hit))))
    for price in (0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.09):
        offers = tuple(replace(o, dollars_per_byte=price / 1e9) for o in question.offers)
        found.append(Sensitivity("egress price", "$/GB", price, plan(replace(question, offers=offers))))
    for factor in (0.5, 0.75, 1.0, 1.25, 1.5, 2.0):
        offers = tuple(replace(o, dollars_per_hour=o.dollars_per_hour * factor) for o in question.offers)
        changed = plan(replace(question, offers=offers))
        found.append(Sensitivity("remote price", "x", factor, changed))
    return found
