"""What is known of one request: its response headers, its one log line, its metrics.

Decides nothing; the handler fills it in as the request goes on, and every way out ends in `finish`. Holds
counts and names only, never a prompt.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from enum import StrEnum

from cache_service import logs
from router.answers import Facts
from router.core.decision import Decision
from router.core.match import Match
from router.metrics import RouterMetrics
from router.openai import Api

_log = logging.getLogger("router.request")


class Outcome(StrEnum):
    """How a request ended: a closed set, used as a metric label."""

    OK = "ok"
    CLIENT_ERROR = "client_error"
    CLIENT_LEFT = "client_left"
    UPSTREAM_ERROR = "upstream_error"
    STREAM_BROKEN = "stream_broken"
    UNAVAILABLE = "unavailable"
    REJECTED = "rejected"
    TIMEOUT = "timeout"
    INTERNAL = "internal"


@dataclass(slots=True)
class Record:
    """One request, from arrival (`started_s`, loop clock) to its last byte."""

    api: Api
    request_id: str
    started_s: float
    stream: bool = False
    prompt_tokens: int | None = None
    match: Match | None = None
    decision: Decision | None = None
    room: int | None = None
    retries: int = 0
    failures: list[str] = field(default_factory=list)
    ttft_s: float | None = None
    facts: Facts = field(default_factory=Facts)
    status: int = 0
    outcome: Outcome = Outcome.INTERNAL
    error: str = ""

    def headers(self) -> dict[str, str]:
        """Return the x-prfaas-* headers for what is known now."""
        values: dict[str, object] = {"request-id": self.request_id, "prompt-tokens": self.prompt_tokens}
        if (decision := self.decision) is not None:
            values |= {
                "route": decision.kind,
                "reason": decision.reason,
                "prefill-site": decision.prefill.site,
                "prefill-worker": decision.prefill.worker_id,
                "decode-worker": decision.decode.worker_id,
                "matched-tokens": decision.matched_tokens,
                "uncached-tokens": decision.uncached_tokens,
                "local-uncached-tokens": decision.local_uncached_tokens,
                "threshold-tokens": decision.threshold_tokens,
                "room": self.room,
                "retries": self.retries,
            }
        return {f"x-prfaas-{name}": str(value) for name, value in values.items() if value is not None}

    def finish(self, metrics: RouterMetrics, now_s: float) -> None:
        """Write the log line and count the request; call once."""
        metrics.requests.labels(self.api, self.outcome).inc()
        mismatch = self.facts.prompt_tokens is not None and self.facts.prompt_tokens != self.prompt_tokens
        if mismatch:
            metrics.length_mismatches.inc()
        decision = self.decision
        if decision is not None and self.outcome is Outcome.OK:
            route = decision.kind
            metrics.duration.labels(route).observe(now_s - self.started_s)
            metrics.prompt_tokens.labels(route).inc(self.prompt_tokens or 0)
            if self.stream and self.ttft_s is not None:
                metrics.ttft.labels(route).observe(self.ttft_s)
            if self.facts.hit_tokens is not None:
                metrics.matched_tokens.labels(route).inc(decision.matched_tokens)
                metrics.hit_tokens.labels(route).inc(self.facts.hit_tokens)
        fields: dict[str, object] = {
            "request_id": self.request_id,
            "api": self.api,
            "stream": self.stream,
            "outcome": self.outcome,
            "status": self.status,
            "route": decision and decision.kind,
            "reason": decision and decision.reason,
            "prefill_site": decision and decision.prefill.site,
            "prefill_worker": decision and decision.prefill.worker_id,
            "decode_worker": decision and decision.decode.worker_id,
            "room": self.room,
            "prompt_tokens": self.prompt_tokens,
            "matched_tokens": decision and decision.matched_tokens,
            "hit_tokens": self.facts.hit_tokens,
            "uncached_tokens": decision and decision.uncached_tokens,
            "local_uncached_tokens": decision and decision.local_uncached_tokens,
            "threshold_tokens": decision and decision.threshold_tokens,
            "wire_bytes": decision and round(decision.wire_bytes),
            "cost": decision and decision.cost,
            "predicted_ttft_s": decision and round(decision.predicted.ttft_s, 6),
            "index": self.match and ("ok" if self.match.available else self.match.reason),
            "ttft_s": self.ttft_s and round(self.ttft_s, 6),
            "total_s": round(now_s - self.started_s, 6),
            "retries": self.retries,
            "failures": self.failures,
            "engine_prompt_tokens": self.facts.prompt_tokens if mismatch else None,
            "error": self.error,
        }
        bad = self.outcome not in (Outcome.OK, Outcome.CLIENT_ERROR, Outcome.CLIENT_LEFT)
        logs.event(
            _log,
            "request",
            logging.WARNING if bad or mismatch else logging.INFO,
            exc_info=False,
            **{key: value for key, value in fields.items() if value not in (None, "", [])},
        )
