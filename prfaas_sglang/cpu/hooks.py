"""Which functions of SGLang 0.5.21 are replaced on a CPU worker, and by what.

One table: a test resolves every target against the pinned engine. Replacements of functions go through
SGLang's hook registry; Triton kernel objects and torch's pinned-memory keywords are attributes and set here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils._device

from cache_service.core.errors import UnsupportedEngine
from prfaas_sglang.cpu import torch_ops

#: Function in SGLang -> torch version. Triton does not run without a GPU.
REPLACED: dict[str, Callable[..., Any]] = {
    "sglang.kernels.ops.attention.fla.layernorm_gated.rms_norm_gated": torch_ops.rms_norm_gated,
    "sglang.kernels.ops.attention.fla.fused_norm_gate.layer_norm_gated_fwd": torch_ops.layer_norm_gated_fwd,
    "sglang.kernels.ops.elementwise.elementwise.fused_gate_sigmoid_mul_add": (
        torch_ops.fused_gate_sigmoid_mul_add
    ),
    "sglang.srt.layers.attention.hybrid_linear_attn_backend.track_mamba_states_all_layers": (
        torch_ops.track_mamba_states_all_layers
    ),
    "sglang.srt.layers.attention.hybrid_linear_attn_backend.track_mamba_states_if_needed": (
        torch_ops.track_mamba_states_if_needed
    ),
}

#: Triton kernel objects (module, name) -> function.
KERNELS: dict[tuple[str, str], Callable[..., Any]] = {
    ("sglang.srt.mem_cache.allocator.paged", "alloc_extend_kernel"): torch_ops.alloc_extend_kernel,
    ("sglang.srt.mem_cache.allocator.paged", "alloc_decode_kernel"): torch_ops.alloc_decode_kernel,
}

EXTRA_BUFFER_CHECK = "sglang.srt.arg_groups.mamba_hook.validate_mamba_extra_buffer"

#: torch factories whose `pin_memory=True` needs an allocator that a CPU-only torch does not have.
PINNING_FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange")

_installed = False


def install() -> None:
    """Register every replacement and apply them. Idempotent within a process and its forks.

    Raises UnsupportedEngine when one could not be applied: SGLang itself only logs that.
    """
    global _installed
    if _installed:
        return
    import importlib

    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, function in REPLACED.items():
        HookRegistry.register(target, function, HookType.REPLACE)
    HookRegistry.register(EXTRA_BUFFER_CHECK, _check_extra_buffer_without_gpu, HookType.AROUND)
    HookRegistry.apply_hooks()
    missing = {*REPLACED, EXTRA_BUFFER_CHECK} - HookRegistry._patched
    if missing:
        raise UnsupportedEngine(f"cannot replace {', '.join(sorted(missing))}")
    for (module, name), function in KERNELS.items():
        setattr(importlib.import_module(module), name, torch_ops.Launch(function))
    _ignore_pinning()
    _installed = True


def _check_extra_buffer_without_gpu(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run SGLang's own checks with only the platform assertion satisfied.

    That assertion stands for the Triton kernels that return per-chunk states; the torch ones here do too.
    """
    from sglang.srt.arg_groups import mamba_hook

    platform = mamba_hook.get_platform
    mamba_hook.get_platform = lambda: SimpleNamespace(is_cuda=True)
    try:
        return original(*args, **kwargs)
    finally:
        mamba_hook.get_platform = platform


def _ignore_pinning() -> None:
    # `with torch.device(...)` keeps a table of the factories, made on first use: it must hold the originals
    torch.utils._device._device_constructors()
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    for name in PINNING_FACTORIES:
        setattr(torch, name, _without_pinning(getattr(torch, name)))


def _without_pinning(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return call
