"""Gated delta rule and causal convolution in plain torch, with the signatures of SGLang's CPU kernels.

State layouts are those of SGLang's pools: conv [slots, dim, width - 1], temporal [slots, HV, V, K]. All sums
run in float32. The chunked form is the one of "Gated Delta Networks" (arXiv 2412.06464, section 3.3).
"""

import torch
import torch.nn.functional as F

CHUNK = 64
PAD_SLOT = -1


def _activate(x, activation):
    return F.silu(x) if activation in (True, "silu", "swish") else x


def causal_conv1d_fn_cpu(
    x,
    weight,
    bias=None,
    conv_states=None,
    query_start_loc=None,
    cache_indices=None,
    has_initial_state=None,
    activation="silu",
    pad_slot_id=PAD_SLOT,
    seq_lens_cpu=None,
):
    """Depthwise causal convolution of packed sequences. x: [dim, total_tokens]; returns the same shape."""
    dim, width = weight.shape
    out = torch.empty_like(x)
    starts = query_start_loc.tolist()
    sequences = len(starts) - 1
    slots = cache_indices.tolist() if cache_indices is not None else list(range(sequences))
    continued = has_initial_state.tolist() if has_initial_state is not None else [False] * sequences
    for i, slot in enumerate(slots):
        tokens = x[:, starts[i] : starts[i + 1]]
        if slot == pad_slot_id or tokens.shape[1] == 0:
            continue
        left = (
            conv_states[slot][:, -(width - 1) :].to(x.dtype)
            if continued[i]
            else tokens.new_zeros(dim, width - 1)
        )
        padded = torch.cat([left, tokens], dim=1)
        y = F.conv1d(
            padded[None].float(), weight[:, None].float(), None if bias is None else bias.float(), groups=dim
        )[0]
        out[:, starts[i] : starts[i + 1]] = _activate(y, activation).to(out.dtype)
        if conv_states is not None:
            conv_states[slot] = padded[:, -conv_states.shape[-1] :].to(conv_states.dtype)
    return out


def causal_conv1d_update_cpu(
    x,
    conv_state,
    weight,
    bias=None,
    activation=None,
    cache_seqlens=None,
    conv_state_indices=None,
    pad_slot_id=PAD_SLOT,
):
    """One token per sequence. x: [batch, dim]; conv_state is shifted in place."""
    if x.dim() != 2:
        raise NotImplementedError("causal_conv1d_update_cpu: one token per sequence only")
    if conv_state_indices is None:
        conv_state_indices = torch.arange(x.shape[0])
    valid = conv_state_indices != pad_slot_id
    slots = conv_state_indices[valid].long()
    window = torch.cat([conv_state[slots].to(x.dtype), x[valid].unsqueeze(-1)], dim=-1)
    y = (window[..., -weight.shape[-1] :].float() * weight.float()).sum(-1)
    if bias is not None:
        y = y + bias.float()
    conv_state[slots] = window[..., 1:].to(conv_state.dtype)
    out = torch.zeros_like(x)
    out[valid] = _activate(y, activation).to(x.dtype)
    return out


def fused_gdn_gating_cpu(A_log, a, b, dt_bias, beta=1.0, threshold=20.0):
    """Return (log decay, write strength), each [1, tokens, HV] float32."""
    log_decay = -A_log.float().exp() * F.softplus(a.float() + dt_bias.float(), beta, threshold)
    return log_decay.unsqueeze(0), b.float().sigmoid().unsqueeze(0)


def _l2_normalize(x, eps=1e-6):
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)


def _prepare_queries(q, k, value_heads, scale, normalize):
    """Return float32 q (scaled) and k with one head per value head."""
    q, k = q.float(), k.float()
    if normalize:
        q, k = _l2_normalize(q), _l2_normalize(k)
    repeat = value_heads // q.shape[-2]
    if repeat > 1:
        q, k = q.repeat_interleave(repeat, -2), k.repeat_interleave(repeat, -2)
    return q * (scale if scale is not None else q.shape[-1] ** -0.5), k


def chunked_delta_rule(q, k, v, log_decay, beta, state):
    """Run one sequence in chunks of CHUNK tokens.

    q, k: [T, H, K]; v: [T, H, V]; log_decay, beta: [T, H]; state: [H, K, V].
    Returns (out [T, H, V], final state, states at the chunk starts [ceil(T / CHUNK), H, K, V]).
    """
    tokens, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    chunks = -(-tokens // CHUNK)
    pad = chunks * CHUNK - tokens
    if pad:
        q, k, v = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (q, k, v))
        log_decay, beta = (F.pad(t, (0, 0, 0, pad)) for t in (log_decay, beta))
    q, k, v = (t.view(chunks, CHUNK, heads, -1).transpose(1, 2) for t in (q, k, v))  # [n, H, C, d]
    decay = log_decay.view(chunks, CHUNK, heads).transpose(1, 2).cumsum(-1)  # [n, H, C]
    beta = beta.view(chunks, CHUNK, heads).transpose(1, 2).unsqueeze(-1)
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril()
    between = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(~lower, float("-inf")).exp()
    k_beta = k * beta
    inner = ((k_beta @ k.transpose(-1, -2)) * between).tril(-1)
    right = torch.cat([v * beta, k_beta * decay.exp().unsqueeze(-1)], dim=-1)
    solved = torch.linalg.solve_triangular(inner + torch.eye(CHUNK), right, upper=False, unitriangular=True)
    u, w = solved.split([value_dim, key_dim], dim=-1)
    attention = (q @ k.transpose(-1, -2)) * between
    q_decayed = q * decay.exp().unsqueeze(-1)
    k_decayed = k * (decay[..., -1:] - decay).exp().unsqueeze(-1)
    chunk_decay = decay[..., -1].exp()[..., None, None]
    out = torch.empty(chunks, heads, CHUNK, value_dim)
    starts = torch.empty(chunks, heads, key_dim, value_dim)
    for c in range(chunks):
        starts[c] = state
        corrected = u[c] - w[c] @ state
        out[c] = q_decayed[c] @ state + attention[c] @ corrected
        state = state * chunk_decay[c] + k_decayed[c].transpose(-1, -2) @ corrected
    return out.transpose(1, 2).reshape(chunks * CHUNK, heads, value_dim)[:tokens], state, starts


def chunk_gated_delta_rule_cpu(
    q,
    k,
    v,
    g,
    beta,
    initial_state,
    initial_state_indices=None,
    cu_seqlens=None,
    head_first=False,
    use_qk_l2norm_in_kernel=True,
    scale=None,
):
    """Prefill of packed sequences; q, k: [1, T, H, K], v: [1, T, HV, V]; states are updated in place.

    Returns (out, None, states at the chunk starts of every sequence, [1, chunks, HV, V, K]).
    """
    if head_first or q.shape[0] != 1:
        raise NotImplementedError("chunk_gated_delta_rule_cpu: packed [1, T, H, D] input only")
    dtype = q.dtype
    value_heads = v.shape[2]
    q, k = _prepare_queries(q[0], k[0], value_heads, scale, use_qk_l2norm_in_kernel)
    v, g, beta = v[0].float(), g[0].float(), beta[0].float()
    out = torch.empty(v.shape, dtype=dtype)
    snapshots = []
    starts = cu_seqlens.tolist()
    for i, slot in enumerate(initial_state_indices.tolist()):
        part = slice(starts[i], starts[i + 1])
        if part.stop <= part.start:
            continue
        if slot >= 0:
            state = initial_state[slot].float().transpose(-1, -2)
        else:
            state = torch.zeros(value_heads, q.shape[-1], v.shape[-1])
        rows, state, chunk_starts = chunked_delta_rule(q[part], k[part], v[part], g[part], beta[part], state)
        out[part] = rows.to(dtype)
        if slot >= 0:
            initial_state[slot] = state.transpose(-1, -2).to(initial_state.dtype)
        snapshots.append(chunk_starts.transpose(-1, -2))
    states = torch.cat(snapshots) if snapshots else torch.empty(0, *initial_state.shape[1:])
    return out.unsqueeze(0), None, states.unsqueeze(0)


def fused_sigmoid_gating_delta_rule_update_cpu(
    A_log=None,
    dt_bias=None,
    q=None,
    k=None,
    v=None,
    a=None,
    b=None,
    initial_state_source=None,
    initial_state_indices=None,
    cu_seqlens=None,
    use_qk_l2norm_in_kernel=True,
    softplus_beta=1.0,
    softplus_threshold=20.0,
    is_kda=False,
    scale=None,
):
    """Decode step, one token per sequence; q, k: [1, B, H, K], v: [1, B, HV, V]; states updated in place."""
    batch, value_heads = v.shape[1], v.shape[2]
    if is_kda or initial_state_indices.shape[0] != batch:
        raise NotImplementedError("fused_sigmoid_gating_delta_rule_update_cpu: GDN, one token per sequence")
    q_, k_ = _prepare_queries(q[0], k[0], value_heads, scale, use_qk_l2norm_in_kernel)
    gate = F.softplus(a.view(batch, value_heads).float() + dt_bias.float(), softplus_beta, softplus_threshold)
    decay = (-A_log.float().exp() * gate).exp()
    beta = b.view(batch, value_heads).float().sigmoid()
    valid = initial_state_indices >= 0
    slots = initial_state_indices.clamp(min=0).long()
    state = initial_state_source[slots].float() * decay[..., None, None]  # [B, HV, V, K]
    update = (v[0].float() - (state * k_[:, :, None, :]).sum(-1)) * beta[..., None]
    state = state + update[..., None] * k_[:, :, None, :]
    out = (state * q_[:, :, None, :]).sum(-1)
    initial_state_source[slots[valid]] = state[valid].to(initial_state_source.dtype)
    return out.to(v.dtype).unsqueeze(0)
