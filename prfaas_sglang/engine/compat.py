"""Which SGLang this release works with, and the checks that it is that one.

Everything that `engine/` assumes is probed here before serving, so that a mismatch is one clear sentence at
start instead of a wrong token later. Verified against SGLang 0.5.21.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import os

from cache_service.core.errors import UnsupportedEngine

SUPPORTED = ("0.5.21",)


def engine_version() -> str:
    """Return the installed SGLang's version, "" when there is none."""
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return ""


def require_supported_engine() -> None:
    """Raise UnsupportedEngine unless SGLang is one of SUPPORTED."""
    found = engine_version()
    if found not in SUPPORTED:
        raise UnsupportedEngine(
            f"SGLang {found or '(not installed)'} is not supported; install sglang=={SUPPORTED[-1]}"
        )


def probe() -> None:
    """Raise UnsupportedEngine when a name or signature that the backend relies on is not there."""
    from sglang.srt.arg_groups import choices, resolution_hooks
    from sglang.srt.disaggregation.base.conn import KVPoll, StateType
    from sglang.srt.disaggregation.common import conn
    from sglang.srt.disaggregation.utils import KVClassType, TransferBackend, get_kv_class

    expected = {
        "CommonKVSender.__init__": (
            conn.CommonKVSender.__init__,
            ["mgr", "bootstrap_addr", "bootstrap_room", "dest_tp_ranks", "pp_rank"],
        ),
        "CommonKVSender.send": (conn.CommonKVSender.send, ["kv_indices", "state_indices"]),
        "CommonKVReceiver.send_metadata": (
            conn.CommonKVReceiver.send_metadata,
            ["kv_indices", "aux_index", "state_indices", "decode_prefix_len"],
        ),
        "CommonKVReceiver.init": (conn.CommonKVReceiver.init, ["prefill_dp_rank"]),
        "get_kv_class": (get_kv_class, ["transfer_backend", "class_type"]),
    }
    for name, (function, parameters) in expected.items():
        found = [p for p in inspect.signature(function).parameters if p != "self"]
        if found[: len(parameters)] != parameters:
            raise UnsupportedEngine(f"{name} takes {found}, expected {parameters} first")
    polls = (
        KVPoll.Failed,
        KVPoll.Bootstrapping,
        KVPoll.WaitingForInput,
        KVPoll.Transferring,
        KVPoll.Success,
    )
    if polls != (0, 1, 2, 3, 4):
        raise UnsupportedEngine("KVPoll values changed")
    for owner, names in (
        (StateType, ("MAMBA", "SWA")),
        (KVClassType, ("KVARGS", "MANAGER", "SENDER", "RECEIVER", "BOOTSTRAP_SERVER")),
        (TransferBackend, ("MOONCAKE", "FAKE")),
        (choices, ("DISAGG_TRANSFER_BACKEND_CHOICES", "add_disagg_transfer_backend_choices")),
        (resolution_hooks, ("register_resolution_hook",)),
    ):
        missing = [name for name in names if not hasattr(owner, name)]
        if missing:
            raise UnsupportedEngine(f"{owner.__name__} has no {', '.join(missing)}")


def refuse_environment() -> None:
    """Raise UnsupportedEngine for engine modes, set by environment, that bypass our classes."""
    if os.environ.get("SGLANG_RUST_SERVER", "0").lower() in ("1", "true", "yes"):
        raise UnsupportedEngine("SGLANG_RUST_SERVER builds its own bootstrap registry; unset it")
    if os.environ.get("SGLANG_DISAGG_STAGING_BUFFER", "0").lower() in ("1", "true", "yes"):
        raise UnsupportedEngine("SGLANG_DISAGG_STAGING_BUFFER is not supported with prfaas; unset it")
    if os.environ.get("SGLANG_MOONCAKE_CUSTOM_MEM_POOL", "").upper() == "INTRA_NODE_NVLINK":
        raise UnsupportedEngine(
            "SGLANG_MOONCAKE_CUSTOM_MEM_POOL=INTRA_NODE_NVLINK puts metadata into device memory; unset it"
        )
