"""Torch versions of the Triton functions that SGLang launches on its CPU engine, signatures kept.

Each is named after the function it replaces; `hooks.py` says which. Sums run in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_GATES = {"swish": F.silu, "silu": F.silu, "sigmoid": torch.sigmoid}


def rms_norm_gated(
    *,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    activation: str = "swish",
) -> torch.Tensor:
    """norm(x) * act(z), or norm(x * act(z)); normalised over the last axis in groups of `group_size`."""
    f = x.float()
    gate = _GATES[activation](z.reshape(x.shape).float()) if z is not None else None
    if gate is not None and not norm_before_gate:
        f = f * gate
    grouped = f if group_size is None else f.reshape(*x.shape[:-1], -1, group_size)
    if not is_rms_norm:
        grouped = grouped - grouped.mean(-1, keepdim=True)
    grouped = grouped * torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + eps)
    f = grouped.reshape(x.shape) * weight.float()
    if bias is not None:
        f = f + bias.float()
    if gate is not None and norm_before_gate:
        f = f * gate
    return f.to(x.dtype)


def layer_norm_gated_fwd(
    x: torch.Tensor,
    g: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str = "swish",
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    is_rms_norm: bool = False,
) -> tuple[torch.Tensor, None, None, torch.Tensor]:
    """(norm(x + residual) * act(g), mean, rstd, residual out); x: [T, D]. mean and rstd are not used."""
    f = x.float()
    residual_out = x
    if residual is not None:
        f = f + residual.float()
        residual_out = f.to(residual.dtype)
    if not is_rms_norm:
        f = f - f.mean(-1, keepdim=True)
    f = f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        f = f * weight.float()
    if bias is not None:
        f = f + bias.float()
    return (f * _GATES[activation](g.float())).to(out_dtype or x.dtype), None, None, residual_out


def fused_gate_sigmoid_mul_add(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    shared_output: torch.Tensor,
    final_hidden_states: torch.Tensor,
) -> None:
    """final += shared * sigmoid(hidden @ gate), in place."""
    gate = torch.sigmoid(hidden_states.float() @ gate_weight.reshape(-1).float()).unsqueeze(-1)
    final_hidden_states.add_((shared_output.float() * gate).to(final_hidden_states.dtype))


def _tracked(
    cache_indices: torch.Tensor, mask: torch.Tensor, track: torch.Tensor, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    source, target = cache_indices[:batch_size], track[:batch_size]
    chosen = mask[:batch_size].bool() & (source >= 0) & (target >= 0)
    return source[chosen].long(), target[chosen].long()


def track_mamba_states_all_layers(
    conv_states_pool: torch.Tensor,
    ssm_states_pool: torch.Tensor,
    cache_indices: torch.Tensor,
    mamba_track_mask: torch.Tensor,
    mamba_track_indices: torch.Tensor,
    batch_size: int,
    check_freed_slots: bool = False,
) -> None:
    """Copy the live state rows of chosen requests to their snapshot rows; pools: [layers, slots, ...]."""
    source, target = _tracked(cache_indices, mamba_track_mask, mamba_track_indices, batch_size)
    if source.numel():
        conv_states_pool[:, target] = conv_states_pool[:, source]
        ssm_states_pool[:, target] = ssm_states_pool[:, source]


def track_mamba_states_if_needed(
    conv_states: torch.Tensor,
    ssm_states: torch.Tensor,
    cache_indices: torch.Tensor,
    mamba_track_mask: torch.Tensor,
    mamba_track_indices: torch.Tensor,
    batch_size: int,
    check_freed_slots: bool = False,
) -> None:
    """The same for one layer; pools: [slots, ...]."""
    source, target = _tracked(cache_indices, mamba_track_mask, mamba_track_indices, batch_size)
    if source.numel():
        conv_states[target] = conv_states[source]
        ssm_states[target] = ssm_states[source]


class Launch:
    """Stands in for a Triton kernel object: `kernel[grid](*args)` calls a function."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __getitem__(self, grid: Any) -> Any:
        return self._function


def alloc_extend_kernel(
    prefix_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    last_loc: torch.Tensor,
    free_pages: torch.Tensor,
    out_indices: torch.Tensor,
    batch_bound: int,
    page_size: int,
) -> None:
    """Token slots for the extension of each request, by SGLang's own torch version."""
    from sglang.srt.mem_cache.allocator.paged import alloc_extend_naive

    alloc_extend_naive(
        prefix_lens, seq_lens, last_loc, free_pages, out_indices, page_size, out_indices.device
    )


def alloc_decode_kernel(
    seq_lens: torch.Tensor,
    last_loc: torch.Tensor,
    free_pages: torch.Tensor,
    out_indices: torch.Tensor,
    batch_bound: int,
    page_size: int,
) -> None:
    """The next token slot of each request: the next one of its page, or the first of a new page."""
    starts_page = ((seq_lens - 1) % page_size) == 0
    pages = int(starts_page.sum())
    out_indices.copy_(last_loc + 1)
    if 0 < pages <= free_pages.numel():
        out_indices[starts_page] = free_pages[:pages] * page_size
