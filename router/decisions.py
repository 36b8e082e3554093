"""The last decisions, for people: what was chosen, why, and what was predicted (GET /decisions).

Decides nothing. Holds names and counts only, never a prompt, a tenant or a session.
"""

from __future__ import annotations

import time
from collections import deque

from router.core.decision import Decision, RequestClass


class DecisionLog:
    """The last `size` decisions, newest last."""

    def __init__(self, size: int) -> None:
        self._entries: deque[dict[str, object]] = deque(maxlen=size)

    def add(self, request_id: str, request_class: RequestClass, tokens: int, decision: Decision) -> None:
        """Note a decision as it is dispatched."""
        terms = decision.predicted
        self._entries.append(
            {
                "time_unix_s": round(time.time(), 3),
                "request_id": request_id,
                "class": request_class,
                "route": decision.kind,
                "reason": decision.reason,
                "prefill_site": decision.prefill.site,
                "prefill_worker": decision.prefill.worker_id,
                "decode_worker": decision.decode.worker_id,
                "prompt_tokens": tokens,
                "matched_tokens": decision.matched_tokens,
                "uncached_tokens": decision.uncached_tokens,
                "local_uncached_tokens": decision.local_uncached_tokens,
                "threshold_tokens": decision.threshold_tokens,
                "wire_bytes": round(decision.wire_bytes),
                "cost": decision.cost,
                "predicted": {
                    "wait_s": terms.wait_s,
                    "prefill_s": terms.prefill_s,
                    "transfer_s": terms.transfer_s,
                    "ttft_s": terms.ttft_s,
                },
            }
        )

    def last(self, count: int) -> list[dict[str, object]]:
        """Return the last `count`, oldest first."""
        return list(self._entries)[-count:] if count > 0 else []
