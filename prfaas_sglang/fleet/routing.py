"""The fleet file's sections on routes: policy, admission, long loop, links; passed on to the router's file.

Decides only what these may hold. Defaults are the router's own (router/config.py): what is left out here is
left out there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from cache_service.core.errors import ConfigError


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every section: unknown keys are errors."""

    def given(self) -> dict[str, Any]:
        """Return the fields that were given, sections as mappings."""
        values = {name: getattr(self, name) for name in self.__struct_fields__}
        return {
            name: value.given() if isinstance(value, _Section) else value
            for name, value in values.items()
            if value is not None
        }


class Routing(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How prompts are routed (docs/routing.md); a policy reads its own fields only.

    Attributes:
        threshold_tokens: `prfaas`: a longer uncached part is prefilled in another site.
        early_first_token: see router/config.py.
    """

    policy: Literal["prfaas", "ttft", "local", "remote", "round_robin", "cache_aware"] = "prfaas"
    threshold_tokens: int = 512
    early_first_token: bool = True
    max_link_wait_s: float | None = None
    margin_ratio: float | None = None
    margin_s: float | None = None
    recompute_weight: float | None = None
    crowd_weight: float | None = None
    cost_weight_s: float | None = None
    balance_abs: int | None = None
    balance_rel: float | None = None

    def router_policy(self) -> dict[str, Any]:
        """Return the router's `policy` section."""
        given = self.given()
        del given["early_first_token"]
        return {"name": given.pop("policy"), **given}


class ClassSeconds(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Seconds for each class of requests."""

    interactive: float
    standard: float
    batch: float


class Admission(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Bounds of the router's queue, and when first tokens are due."""

    waiting: int | None = None
    waiting_per_tenant: int | None = None
    ttft_s: ClassSeconds | None = None
    max_wait_s: ClassSeconds | None = None
    link_horizon_s: float | None = None


class Tune(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The long loop, which sets the threshold from what was seen."""

    enabled: bool | None = None
    apply: bool | None = None
    period_s: float | None = None
    min_requests: int | None = None
    min_gain: float | None = None
    damping: float | None = None
    cooldown_s: float | None = None


class Link(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A directed link; KV flows from the prefill site to the decode site.

    Attributes:
        gbps: capacity, 10^9 bit/s.
        ceiling_gbps: never use more.
        price_per_gb: of 10^9 bytes that leave `src`.
    """

    src: str
    dst: str
    gbps: float
    ceiling_gbps: float | None = None
    price_per_gb: float | None = None


#: Accepted ranges, those of the router.
_RANGES: dict[str, tuple[float, float]] = {
    "routing.threshold_tokens": (0, 1 << 30),
    "routing.max_link_wait_s": (1e-3, 3600),
    "routing.margin_ratio": (0, 1),
    "routing.margin_s": (0, 1e6),
    "routing.recompute_weight": (0, 1e6),
    "routing.crowd_weight": (0, 1e6),
    "routing.cost_weight_s": (0, 1e6),
    "routing.balance_abs": (0, 1e6),
    "routing.balance_rel": (0, 1e6),
    "admission.waiting": (1, 1 << 20),
    "admission.waiting_per_tenant": (1, 1 << 20),
    "admission.link_horizon_s": (1e-3, 3600),
    **{f"admission.ttft_s.{name}": (1e-3, 86400) for name in ClassSeconds.__struct_fields__},
    **{f"admission.max_wait_s.{name}": (1e-3, 86400) for name in ClassSeconds.__struct_fields__},
    "tune.period_s": (0.1, 86400),
    "tune.min_requests": (1, 1 << 30),
    "tune.min_gain": (0, 10),
    "tune.damping": (0.01, 1),
    "tune.cooldown_s": (0, 1e6),
    "gbps": (1e-6, 100_000),
    "ceiling_gbps": (1e-6, 100_000),
    "price_per_gb": (0, 1e6),
}


def check_ranges(prefix: str, section: str, values: dict[str, Any]) -> None:
    """Check numbers against their ranges; `section` is "routing." and the like, `prefix` is for the message.

    Raises ConfigError naming the field and what is accepted.
    """
    for name, value in values.items():
        if isinstance(value, dict):
            check_ranges(f"{prefix}{name}.", f"{section}{name}.", value)
        elif (bounds := _RANGES.get(section + name)) and not bounds[0] <= value <= bounds[1]:
            raise ConfigError(f"{prefix}{name}: {value:g} is not in {bounds[0]:g}..{bounds[1]:.10g}")


def check_profile(field: str, profile: str, *, needed: bool) -> None:
    """Check that a worker's profile is a file, and is there when `needed`. Raises ConfigError."""
    if not profile:
        if needed:
            raise ConfigError(
                f"{field}: is missing; routing.policy ttft predicts times from it: give the YAML file that "
                "`prfaas profile` wrote for this model and chip"
            )
        return
    if not Path(profile).expanduser().is_file():
        raise ConfigError(f"{field}: no file {profile}; give the YAML file that `prfaas profile` wrote")
