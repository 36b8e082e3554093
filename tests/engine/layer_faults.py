"""A plugin for SGLang that breaks what layer-wise sending relies on; installed by test_layerwise.

PRFAAS_TEST_FAULT=missing: the first layer bypasses the wrapped attention backend, as a captured graph would.
PRFAAS_TEST_FAULT=twice: the first layer of a batch of TWICE_TOKENS tokens is computed twice.
"""

from __future__ import annotations

import os
from typing import Any

TWICE_TOKENS = 128


def register() -> None:
    """Install the fault that the environment names."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    fault = {"missing": _missing, "twice": _twice}.get(os.environ.get("PRFAAS_TEST_FAULT", ""))
    if fault is not None:
        HookRegistry.register(
            "sglang.srt.layers.radix_attention.RadixAttention.forward", fault, HookType.AROUND
        )


def _missing(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    from sglang.srt.model_executor.forward_context import get_attn_backend

    instance = vars(get_attn_backend())
    wrapped = instance.pop("forward", None) if self.layer_id == 0 else None
    try:
        return original(self, *args, **kwargs)
    finally:
        if wrapped is not None:
            instance["forward"] = wrapped


def _twice(original: Any, self: Any, q: Any, *args: Any, **kwargs: Any) -> Any:
    if self.layer_id == 0 and q.shape[0] == TWICE_TOKENS:
        original(self, q, *args, **kwargs)
    return original(self, q, *args, **kwargs)
