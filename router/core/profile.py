"""What one model costs on one kind of worker: bytes of KV per prompt, seconds of prefill, decode rate.

The paper (arXiv 2604.15039) calls these S_kv(l), T_prefill(l), and BS_max with T_decode (Table 4); everything
that plans, simulates or routes takes them from here. A profile is per *instance*: one SGLang server, however
many chips it spans. Curves are monotone and defined for every length from 1 token on: outside of what was
measured they are extrapolated, and `measured_tokens` says from where on.

Token counts are plain integers (or real numbers, for means); times are seconds; sizes are bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

from cache_service.core.errors import ConfigError


class Curve(Protocol):
    """A prefill time as a function of the prompt's length, nothing cached."""

    def at(self, tokens: float) -> float:
        """Return the seconds for `tokens` >= 0; never falls as `tokens` grows."""
        ...


@dataclass(frozen=True, slots=True)
class Quadratic:
    """T(l) = fixed_s + per_token_s l + per_token2_s l^2, all coefficients >= 0: what `prfaas profile` fits.

    The linear term is the weights' work, the quadratic one attention's (paper, section 3: near-quadratic).
    """

    fixed_s: float
    per_token_s: float
    per_token2_s: float = 0.0

    def __post_init__(self) -> None:
        values = (self.fixed_s, self.per_token_s, self.per_token2_s)
        if not all(math.isfinite(v) and v >= 0 for v in values) or not any(values):
            raise ValueError(f"coefficients {values}: accepted are numbers >= 0, not all 0")

    def at(self, tokens: float) -> float:
        """Return the seconds for `tokens`."""
        return self.fixed_s + tokens * (self.per_token_s + tokens * self.per_token2_s)


@dataclass(frozen=True, slots=True)
class Knots:
    """A table (tokens, seconds), straight in log-log between its points and beyond them.

    Below the first point the first slope is kept, above the last the last one. Both columns must be positive;
    tokens must grow, seconds must not fall.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if len(self.points) < 2:
            raise ValueError("a table needs at least two points")
        if not all(math.isfinite(v) and v > 0 for point in self.points for v in point):
            raise ValueError("tokens and seconds must be finite and > 0")
        for (l0, t0), (l1, t1) in pairwise(self.points):
            if l1 <= l0 or t1 < t0:
                raise ValueError(
                    f"from ({l0}, {t0}) to ({l1}, {t1}): tokens must grow, seconds must not fall"
                )

    def at(self, tokens: float) -> float:
        """Return the seconds for `tokens`; 0 tokens count as one. O(points)."""
        tokens = max(1.0, tokens)
        low = 0
        while low < len(self.points) - 2 and tokens > self.points[low + 1][0]:
            low += 1
        (l0, t0), (l1, t1) = self.points[low], self.points[low + 1]
        return t0 * math.exp(math.log(t1 / t0) * math.log(tokens / l0) / math.log(l1 / l0))


@dataclass(frozen=True, slots=True)
class KvShape:
    """S_kv(l) from the pools: what a prompt leaves in memory and on the wire.

    Attributes:
        bytes_per_token: full-attention KV, all layers.
        state_bytes: linear-attention state of one request, independent of its length.
        window_bytes_per_token: sliding-window KV, all such layers.
        window_tokens: the window; only its trailing tokens travel.
        page_tokens: KV travels in whole pages of this many tokens.
    """

    bytes_per_token: float
    state_bytes: float = 0.0
    window_bytes_per_token: float = 0.0
    window_tokens: int = 0
    page_tokens: int = 1

    def __post_init__(self) -> None:
        sizes = (self.bytes_per_token, self.state_bytes, self.window_bytes_per_token, self.window_tokens)
        if not all(math.isfinite(v) and v >= 0 for v in sizes) or self.page_tokens < 1 or not any(sizes):
            raise ValueError(f"{self}: sizes must be >= 0 and not all 0, page_tokens >= 1")

    def bytes_at(self, tokens: float, held: float = 0.0) -> float:
        """Return the bytes that cross for a prompt of `tokens`, of which decode holds the leading `held`.

        The state crosses whole, the window as far as it is not held, full-attention KV in whole pages.
        """
        page = self.page_tokens
        fresh = max(0.0, math.ceil(tokens / page) * page - math.floor(held / page) * page)
        window = max(0.0, min(tokens - held, self.window_tokens))
        return fresh * self.bytes_per_token + window * self.window_bytes_per_token + self.state_bytes


@dataclass(frozen=True, slots=True)
class KvTable:
    """S_kv(l) as a table (tokens, bytes), straight between its points and beyond them (Table 5 prints such).

    A held prefix saves its share of the length-dependent part.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if len(self.points) < 2:
            raise ValueError("a table needs at least two points")
        for (l0, s0), (l1, s1) in pairwise(self.points):
            if not (l1 > l0 >= 0 and s1 >= s0 > 0):
                raise ValueError(f"from ({l0}, {s0}) to ({l1}, {s1}): tokens must grow, bytes must not fall")

    def bytes_at(self, tokens: float, held: float = 0.0) -> float:
        """Return the bytes that cross for `tokens`, the leading `held` being there already. O(points)."""
        return self._line(tokens) - self._line(held) + self._line(0.0) if held else self._line(tokens)

    def _line(self, tokens: float) -> float:
        low = 0
        while low < len(self.points) - 2 and tokens > self.points[low + 1][0]:
            low += 1
        (l0, s0), (l1, s1) = self.points[low], self.points[low + 1]
        return max(0.0, s0 + (s1 - s0) * (tokens - l0) / (l1 - l0))


@dataclass(frozen=True, slots=True)
class DecodeRate:
    """Decode under its latency objective: BS_max requests a step, T_decode a step (paper, eq. 5)."""

    max_batch: float
    step_s: float

    def __post_init__(self) -> None:
        if not (self.max_batch > 0 and self.step_s > 0):
            raise ValueError(f"max_batch {self.max_batch}, step_s {self.step_s}: both must be > 0")

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second of one instance."""
        return self.max_batch / self.step_s


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """One model on one kind of instance.

    Attributes:
        name: model and chip, for people.
        kv: S_kv(l).
        curve: T_prefill(l) of one instance, one prompt at a time, nothing cached.
        decode: decode rate of one instance; None where it never decodes or was not measured.
        measured_tokens: shortest and longest prompt measured; None where the curve was not measured.
        source: where the numbers come from, one line.
        facts: what else was recorded (engine, chip, layout fingerprint), for people.
    """

    name: str
    kv: KvShape | KvTable
    curve: Quadratic | Knots
    decode: DecodeRate | None = None
    measured_tokens: tuple[int, int] | None = None
    source: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)

    def kv_bytes(self, tokens: float, held: float = 0.0) -> float:
        """Return S_kv: bytes that cross for a prompt of `tokens` whose leading `held` decode has already.

        Raises ValueError unless 0 <= held <= tokens.
        """
        if not 0 <= held <= tokens:
            raise ValueError(f"held {held} of {tokens} tokens: accepted are 0..tokens")
        return self.kv.bytes_at(tokens, held)

    def prefill_s(self, uncached: float, cached: float = 0.0) -> float:
        """Return T_prefill: seconds to compute `uncached` tokens after `cached` ones found in the cache.

        With a prefix the tokens attend to it as well: T(cached + uncached) - T(cached), which for a quadratic
        is exact up to the fixed part; never less than a prompt of `uncached` tokens alone.

        Raises ValueError when a count is negative.
        """
        if uncached < 0 or cached < 0:
            raise ValueError(f"uncached {uncached}, cached {cached}: accepted are numbers >= 0")
        alone = self.curve.at(uncached)
        if not cached:
            return alone
        after = self.curve.at(cached + uncached) - self.curve.at(cached)
        if isinstance(self.curve, Quadratic):
            return after + self.curve.fixed_s
        return max(alone, after)

    def prefill_of(self, tokens: int) -> Callable[[int], float]:
        """Return T_prefill of a prompt of `tokens` by how many of them (fewer) are found in the cache.

        The same as `prefill_s(tokens - cached, cached)`, cheaper when asked often.
        """
        curve = self.curve
        if not isinstance(curve, Quadratic):
            return lambda cached: self.prefill_s(tokens - cached, cached)
        whole_s, linear, square = curve.at(tokens), curve.per_token_s, curve.per_token2_s
        return lambda cached: whole_s - cached * (linear + cached * square)

    def kv_bytes_per_s(self, tokens: float) -> float:
        """Return Phi_kv, eq. 1: S_kv(l) / T_prefill(l), bytes per second of one instance."""
        return self.kv_bytes(tokens) / self.prefill_s(tokens)


# --- as plain values (a YAML or JSON file) ----------------------------------------------------------------

FORMAT = 1


def to_dict(profile: ModelProfile) -> dict[str, Any]:
    """Return the profile as plain values; `from_dict` gives it back equal."""
    value: dict[str, Any] = {"format": FORMAT, "name": profile.name}
    if isinstance(profile.kv, KvTable):
        value["kv"] = {"table": [list(p) for p in profile.kv.points]}
    else:
        value["kv"] = {key: getattr(profile.kv, key) for key in _KV}
    if isinstance(profile.curve, Knots):
        value["prefill"] = {"table": [list(p) for p in profile.curve.points]}
    else:
        value["prefill"] = {key: getattr(profile.curve, key) for key in _QUADRATIC}
    if profile.decode is not None:
        value["decode"] = {key: getattr(profile.decode, key) for key in _DECODE}
    if profile.measured_tokens is not None:
        value["measured_tokens"] = list(profile.measured_tokens)
    if profile.source:
        value["source"] = profile.source
    if profile.facts:
        value["facts"] = dict(profile.facts)
    return value


_KV = ("bytes_per_token", "state_bytes", "window_bytes_per_token", "window_tokens", "page_tokens")
_QUADRATIC = ("fixed_s", "per_token_s", "per_token2_s")
_DECODE = ("max_batch", "step_s")
_KEYS = ("format", "name", "kv", "prefill", "decode", "measured_tokens", "source", "facts")


def from_dict(value: object, where: str = "profile") -> ModelProfile:
    """Return the profile that `value` (plain values, as of `to_dict`) describes.

    Raises ConfigError naming the field, as `where.field`, and the accepted values.
    """
    top = _mapping(value, where, _KEYS)
    if top.get("format") != FORMAT:
        raise ConfigError(f"{where}.format: {top.get('format')!r}; accepted is {FORMAT}")
    name = top.get("name")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}.name: missing or not a text")
    kv_value = _mapping(top.get("kv"), f"{where}.kv", ("table", *_KV))
    prefill_value = _mapping(top.get("prefill"), f"{where}.prefill", ("table", *_QUADRATIC))
    try:
        at = f"{where}.kv"
        if "table" in kv_value:
            kv: KvShape | KvTable = KvTable(_table(kv_value, at))
        else:
            kv = KvShape(**_numbers(kv_value, at, needed=_KV[:1], whole=_KV[3:]))
        at = f"{where}.prefill"
        if "table" in prefill_value:
            curve: Quadratic | Knots = Knots(_table(prefill_value, at))
        else:
            curve = Quadratic(**_numbers(prefill_value, at, needed=_QUADRATIC[:2]))
        at, decode = f"{where}.decode", None
        if top.get("decode") is not None:
            decode = DecodeRate(**_numbers(_mapping(top["decode"], at, _DECODE), at, needed=_DECODE))
    except ValueError as error:
        raise ConfigError(f"{at}: {error}") from None
    facts = _mapping(top.get("facts") or {}, f"{where}.facts", None)
    return ModelProfile(
        name=name,
        kv=kv,
        curve=curve,
        decode=decode,
        measured_tokens=_range(top.get("measured_tokens"), f"{where}.measured_tokens"),
        source=str(top.get("source") or ""),
        facts={str(key): str(fact) for key, fact in facts.items()},
    )


def _mapping(value: object, where: str, keys: tuple[str, ...] | None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: missing or not a mapping")
    unknown = [str(key) for key in value if keys is not None and key not in keys]
    if unknown:
        raise ConfigError(f"{where}.{unknown[0]}: unknown; accepted are {', '.join(keys or ())}")
    return value


def _numbers(
    value: dict[str, Any], where: str, needed: tuple[str, ...], whole: tuple[str, ...] = ()
) -> dict[str, Any]:
    for key in needed:
        if key not in value:
            raise ConfigError(f"{where}.{key}: missing")
    for key, number in value.items():
        kinds = (int,) if key in whole else (int, float)
        if type(number) not in kinds or not math.isfinite(number):
            raise ConfigError(f"{where}.{key}: {number!r} is not {'a whole' if key in whole else 'a'} number")
    return value


def _table(value: dict[str, Any], where: str) -> tuple[tuple[float, float], ...]:
    rows = value["table"]
    if len(value) > 1:
        raise ConfigError(f"{where}: give a table or the coefficients, not both")
    if not isinstance(rows, list):
        raise ConfigError(f"{where}.table: not a list of [tokens, value]")
    for i, row in enumerate(rows):
        pair = isinstance(row, list) and len(row) == 2 and all(type(v) in (int, float) for v in row)
        if not pair or not all(math.isfinite(v) for v in row):
            raise ConfigError(f"{where}.table[{i}]: not [tokens, value]")
    return tuple((float(a), float(b)) for a, b in rows)


def _range(value: object, where: str) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value):
        low, high = value
        if 0 < low <= high:
            return (low, high)
    raise ConfigError(f"{where}: not [shortest, longest] in tokens")
