"""Small fused operations of SGLang's CPU build, in plain torch."""

import torch


def assign_req_to_token_pool_cpu(
    req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len
):
    """Write each request's new token slots into its row of the request-to-token table, in place."""
    position = 0
    rows = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    for row, start, end in rows:
        count = end - start
        req_to_token[row, start:end] = out_cache_loc[position : position + count].to(req_to_token.dtype)
        position += count


def fused_sigmoid_mul_cpu(x, gate):
    """x *= sigmoid(gate), in place."""
    x.mul_(torch.sigmoid(gate.reshape(x.shape).float()).to(x.dtype))


def _gemma_rmsnorm(x, weight, eps):
    f = x.float()
    f = f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps)
    return (f * (1.0 + weight.float())).to(x.dtype)


def fused_qk_gemma_rmsnorm_cpu(q, k, q_weight, k_weight, eps, head_dim):
    """Normalise every head of q and k; returns both as [tokens * heads, head_dim]."""
    return (
        _gemma_rmsnorm(q.reshape(-1, head_dim), q_weight, eps),
        _gemma_rmsnorm(k.reshape(-1, head_dim), k_weight, eps),
    )


def fused_qk_gemma_rmsnorm_with_gate_cpu(q_gate, k, q_weight, k_weight, eps, head_dim, num_heads):
    """As above for q interleaved with an output gate; returns (q, k, gate)."""
    q, gate = q_gate.reshape(q_gate.shape[0], num_heads, 2 * head_dim).split(head_dim, dim=-1)
    return (
        _gemma_rmsnorm(q, q_weight, eps).reshape(-1, head_dim),
        _gemma_rmsnorm(k.reshape(-1, head_dim), k_weight, eps),
        gate.reshape(-1, head_dim).contiguous(),
    )


def fused_qkvzba_split_reshape_cat_contiguous_cpu(qkvz, ba, num_heads_qk, num_heads_v, head_qk, head_v):
    """Split the projections of a GDN layer; returns (qkv, z [tokens, HV, V], b, a), contiguous."""
    qkv, z = qkvz.split([2 * num_heads_qk * head_qk + num_heads_v * head_v, num_heads_v * head_v], dim=-1)
    b, a = ba.split([num_heads_v, num_heads_v], dim=-1)
    z = z.reshape(qkvz.shape[0], num_heads_v, head_v)
    return qkv.contiguous(), z.contiguous(), b.contiguous(), a.contiguous()
