"""Adds `--disaggregation-transfer-backend prfaas` to SGLang and refuses what it cannot do.

Uses SGLang's documented extension points: the backend choices list, plugin hooks, resolution hooks. The enum
member is found through `_missing_`, so that pickling and identity work as for built-in members.
"""

from __future__ import annotations

from typing import Any

from cache_service.core.errors import UnsupportedEngine
from prfaas_sglang import config
from prfaas_sglang.engine import compat

BACKEND = "prfaas"

#: Server argument -> (value it must have, why). Checked when the backend is prfaas.
_REQUIRED: dict[str, tuple[tuple[object, ...], str]] = {
    "pp_size": ((1,), "pipeline parallelism is not supported"),
    "dp_size": ((1,), "start one worker per data-parallel replica"),
    "enable_dp_attention": ((False, None), "data-parallel attention is not supported"),
    "dcp_size": ((1, None), "decode context parallelism is not supported"),
    "enable_pd_role_switch": ((False, None), "role switching is not supported"),
    "enable_mixed_chunk": ((False, None), "mixed chunks corrupt linear-state checkpoints in this SGLang"),
    "speculative_algorithm": ((None,), "speculative decoding is not supported"),
    "enable_hisparse": ((False, None), "HiSparse is not supported"),
    "disaggregation_enable_kv_checksum": ((False, None), "frames carry their own checksums"),
    "disaggregation_decode_host_receive_threshold": ((0, 0.0, None), "host receive is not supported"),
    "optimistic_prefill_attempts": ((0, None), "optimistic prefill is not supported"),
    "tokenizer_worker_num": ((1, None), "plugins do not load in extra tokenizer workers"),
    "device": (("cpu", "cuda"), "KV pools are moved from and to cpu and cuda only"),
}


def _around_get_kv_class(original: Any, transfer_backend: Any, class_type: Any) -> Any:
    from sglang.srt.disaggregation.utils import KVClassType

    if getattr(transfer_backend, "value", None) != BACKEND or class_type == KVClassType.KVARGS:
        return original(transfer_backend, class_type)
    from prfaas_sglang.engine import backend

    return {
        KVClassType.MANAGER: backend.PrfaasManager,
        KVClassType.SENDER: backend.PrfaasSender,
        KVClassType.RECEIVER: backend.PrfaasReceiver,
        KVClassType.BOOTSTRAP_SERVER: backend.PrfaasBootstrapServer,
    }[class_type]


def _check_arguments(server_args: Any, previous: Any) -> None:
    """Resolution hook: the launch stops with a sentence when an argument cannot work with prfaas."""
    from sglang.srt.arg_groups.overrides import resolving_view

    previous(server_args)
    arguments = resolving_view(server_args)
    if arguments.disaggregation_transfer_backend != BACKEND or arguments.disaggregation_mode == "null":
        return
    for name, (accepted, why) in _REQUIRED.items():
        value = getattr(arguments, name, accepted[0])
        if value not in accepted:
            flag = "--" + name.replace("_", "-")
            raise UnsupportedEngine(f"{flag} {value}: {why} with the prfaas transfer backend")


def _after_events_publisher(result: Any, publisher: Any, *_: Any) -> None:
    """Follow the scheduler's cache from where SGLang begins to publish its events (one rank does)."""
    settings = config.load()
    if settings is None or settings.state_events is None or not publisher.enable_kv_cache_events:
        return
    from sglang.srt.disaggregation.kv_events import select_kv_publisher_dp_rank
    from sglang.srt.runtime_context import get_parallel

    from prfaas_sglang.engine import state_events

    ranks = get_parallel()
    dp_rank = select_kv_publisher_dp_rank(ranks.attn_dp_size, ranks.attn_dp_rank, ranks.dp_rank)
    state_events.follow(publisher.tree_cache, settings.state_events, dp_rank)


def install() -> None:
    """Register the backend. Idempotent within a process.

    Raises ConfigError for a wrong PRFAAS_CONFIG, UnsupportedEngine when SGLang is not what we know.
    """
    config.load()
    compat.refuse_environment()
    compat.probe()
    from sglang.srt.arg_groups.choices import (
        DISAGG_TRANSFER_BACKEND_CHOICES,
        add_disagg_transfer_backend_choices,
    )
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    from sglang.srt.disaggregation.utils import TransferBackend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if BACKEND in DISAGG_TRANSFER_BACKEND_CHOICES:
        return
    member: Any = object.__new__(TransferBackend)
    member._name_, member._value_ = "PRFAAS", BACKEND
    member._sort_order_ = len(TransferBackend)
    TransferBackend._missing_ = classmethod(lambda cls, value: member if value == BACKEND else None)
    add_disagg_transfer_backend_choices([BACKEND])
    HookRegistry.register(
        "sglang.srt.disaggregation.utils.get_kv_class", _around_get_kv_class, HookType.AROUND
    )
    HookRegistry.register(
        "sglang.srt.managers.scheduler_components.kv_events_publisher"
        ".SchedulerKvEventsPublisher.init_kv_events",
        _after_events_publisher,
        HookType.AFTER,
    )
    register_resolution_hook("handle_pd_disaggregation")(_check_arguments)
