"""Hooks inside SGLang's scheduler that have no extension point, set when the transfer manager is made."""

from __future__ import annotations

import functools
from typing import Any

from sglang.srt.disaggregation.prefill import PrefillBootstrapQueue


def announce_prompts() -> None:
    """Tell every sender of ours how long its prompt is, before its first poll. Idempotent.

    SGLang says it only after the handshake, but staging memory is reserved before that.
    """
    original = PrefillBootstrapQueue.create_sender
    if hasattr(original, "prfaas"):
        return

    @functools.wraps(original)
    def create_sender(self: Any, req: Any, num_kv_heads: int) -> bool:
        created: bool = original(self, req, num_kv_heads)
        announce = getattr(req.disagg_kv_sender, "announce", None) if created else None
        if announce is not None:
            announce(len(req.origin_input_ids))
        return created

    create_sender.prfaas = True  # type: ignore[attr-defined]
    PrefillBootstrapQueue.create_sender = create_sender
