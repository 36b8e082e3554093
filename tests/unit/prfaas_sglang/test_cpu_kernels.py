"""The torch stand-ins for SGLang's CPU kernels, against token-by-token references."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from prfaas_sglang.cpu.environment import STAND_INS


def load(name: str) -> ModuleType:
    """Load one file of the stand-in without making `sgl_kernel` importable."""
    path = STAND_INS / "sgl_kernel" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"stand_in_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mamba = load("mamba")
small_ops = load("small_ops")

SLOTS, KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM = 6, 2, 4, 16, 8


def unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """S_t = a_t S_{t-1} (I - b_t k_t k_t') + b_t v_t k_t', o_t = S_t q_t, in float64, one token at a time.

    q, k: [T, H, K]; v: [T, HV, V]; log_decay, beta: [T, HV]; state: [HV, V, K]. Also returns the state before
    every 64th token.
    """
    repeat = v.shape[1] // q.shape[1]
    q = unit(q.double()).repeat_interleave(repeat, 1) * q.shape[-1] ** -0.5
    k = unit(k.double()).repeat_interleave(repeat, 1)
    v, log_decay, beta, state = v.double(), log_decay.double(), beta.double(), state.double()
    out, snapshots = [], []
    for t in range(q.shape[0]):
        if t % 64 == 0:
            snapshots.append(state)
        state = state * log_decay[t].exp()[:, None, None]
        error = v[t] - torch.einsum("hvk,hk->hv", state, k[t])
        state = state + beta[t][:, None, None] * torch.einsum("hv,hk->hvk", error, k[t])
        out.append(torch.einsum("hvk,hk->hv", state, q[t]))
    return torch.stack(out), state, snapshots


def sequence(tokens: int, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "q": torch.randn(tokens, KEY_HEADS, KEY_DIM, generator=g),
        "k": torch.randn(tokens, KEY_HEADS, KEY_DIM, generator=g),
        "v": torch.randn(tokens, VALUE_HEADS, VALUE_DIM, generator=g),
        "a": torch.randn(tokens, VALUE_HEADS, generator=g),
        "b": torch.randn(tokens, VALUE_HEADS, generator=g),
    }


A_LOG = torch.tensor([0.3, -1.0, 0.0, -3.0])
DT_BIAS = torch.tensor([0.5, 1.0, -1.0, 0.0])


def pool(seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(SLOTS, VALUE_HEADS, VALUE_DIM, KEY_DIM, generator=g)


def packed(parts: list[dict[str, torch.Tensor]]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Concatenate sequences; return them with their start offsets."""
    lengths = [part["q"].shape[0] for part in parts]
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, starts


@pytest.mark.parametrize("lengths", [[1], [63], [64], [65], [200], [5, 130, 64], [1, 1, 300]])
def test_chunked_prefill_equals_recurrence(lengths: list[int]) -> None:
    """Outputs, final states and the state at every 64-token boundary, for packed sequences of any length."""
    slots = [4, 1, 3][: len(lengths)]
    parts = [sequence(n, seed) for seed, n in enumerate(lengths)]
    whole, starts = packed(parts)
    before = pool(9)
    states = before.clone()
    g, beta = mamba.fused_gdn_gating_cpu(A_LOG, whole["a"], whole["b"], DT_BIAS)
    out, last, snapshots = mamba.chunk_gated_delta_rule_cpu(
        q=whole["q"][None],
        k=whole["k"][None],
        v=whole["v"][None],
        g=g,
        beta=beta,
        initial_state=states,
        initial_state_indices=torch.tensor(slots, dtype=torch.int32),
        cu_seqlens=starts,
        head_first=False,
        use_qk_l2norm_in_kernel=True,
    )
    assert last is None
    want_out, want_snapshots = [], []
    for i, (part, slot) in enumerate(zip(parts, slots, strict=True)):
        rows = slice(int(starts[i]), int(starts[i + 1]))
        o, final, chunks = recurrent(part["q"], part["k"], part["v"], g[0, rows], beta[0, rows], before[slot])
        want_out.append(o)
        want_snapshots += chunks
        torch.testing.assert_close(states[slot].double(), final, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out[0].double(), torch.cat(want_out), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(snapshots[0].double(), torch.stack(want_snapshots), rtol=1e-4, atol=1e-5)
    untouched = [slot for slot in range(SLOTS) if slot not in slots]
    assert torch.equal(states[untouched], before[untouched])


def test_gating_is_the_published_formula() -> None:
    """Log decay is -exp(A) softplus(a + bias); the write strength is sigmoid(b)."""
    part = sequence(7, 3)
    g, beta = mamba.fused_gdn_gating_cpu(A_LOG, part["a"], part["b"], DT_BIAS)
    want = -A_LOG.exp() * torch.log1p((part["a"] + DT_BIAS).exp())
    torch.testing.assert_close(g[0], want)
    torch.testing.assert_close(beta[0], 1 / (1 + (-part["b"]).exp()))
    assert (g < 0).all()


def decode(states: torch.Tensor, slots: list[int], parts: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    whole, starts = packed(parts)
    result: torch.Tensor = mamba.fused_sigmoid_gating_delta_rule_update_cpu(
        A_log=A_LOG,
        dt_bias=DT_BIAS,
        q=whole["q"][None],
        k=whole["k"][None],
        v=whole["v"][None],
        a=whole["a"],
        b=whole["b"],
        initial_state_source=states,
        initial_state_indices=torch.tensor(slots, dtype=torch.int32),
        cu_seqlens=starts,
        use_qk_l2norm_in_kernel=True,
        softplus_beta=1.0,
        softplus_threshold=20.0,
    )
    return result[0]


@pytest.mark.parametrize("slots", [[2], [3, 0, 5], [0, 1, 2, 3, 4, 5]])
def test_decode_step_equals_recurrence(slots: list[int]) -> None:
    """One token for each of several requests, each in its own state row."""
    parts = [sequence(1, 20 + slot) for slot in slots]
    before = pool(8)
    states = before.clone()
    out = decode(states, slots, parts)
    for i, (part, slot) in enumerate(zip(parts, slots, strict=True)):
        g, beta = mamba.fused_gdn_gating_cpu(A_LOG, part["a"], part["b"], DT_BIAS)
        o, final, _ = recurrent(part["q"], part["k"], part["v"], g[0], beta[0], before[slot])
        torch.testing.assert_close(out[i].double(), o[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(states[slot].double(), final, rtol=1e-4, atol=1e-5)


def test_decode_leaves_padded_rows_alone() -> None:
    """Slot -1 marks padding: no state row changes, not even row 0."""
    states = pool(8)
    before = states.clone()
    decode(states, [2, -1], [sequence(1, 1), sequence(1, 2)])
    assert not torch.equal(states[2], before[2])
    rest = [0, 1, 3, 4, 5]
    assert torch.equal(states[rest], before[rest])


def test_decode_continues_prefill() -> None:
    """Prefill of n tokens, then decode steps, equals prefill of all of them."""
    whole = sequence(100, 5)
    states = torch.zeros(SLOTS, VALUE_HEADS, VALUE_DIM, KEY_DIM)
    g, beta = mamba.fused_gdn_gating_cpu(A_LOG, whole["a"], whole["b"], DT_BIAS)
    want, final, _ = recurrent(whole["q"], whole["k"], whole["v"], g[0], beta[0], states[1])
    mamba.chunk_gated_delta_rule_cpu(
        q=whole["q"][None, :97],
        k=whole["k"][None, :97],
        v=whole["v"][None, :97],
        g=g[:, :97],
        beta=beta[:, :97],
        initial_state=states,
        initial_state_indices=torch.tensor([1]),
        cu_seqlens=torch.tensor([0, 97]),
    )
    for t in range(97, 100):
        out = decode(states, [1], [{name: x[t : t + 1] for name, x in whole.items()}])
        torch.testing.assert_close(out[0].double(), want[t], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states[1].double(), final, rtol=1e-4, atol=1e-5)


DIM, WIDTH = 10, 4


def naive_convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, left: torch.Tensor
) -> torch.Tensor:
    """x: [dim, T], left: [dim, width - 1]; y_t = silu(sum_j w_j x_{t-width+1+j} + bias)."""
    full = torch.cat([left, x], dim=1)
    y = torch.stack([(full[:, t : t + WIDTH] * weight).sum(1) for t in range(x.shape[1])], dim=1)
    y = y if bias is None else y + bias[:, None]
    return y * torch.sigmoid(y)


@pytest.mark.parametrize("with_bias", [True, False])
def test_convolution_of_packed_sequences(with_bias: bool) -> None:
    """New and continued sequences, also shorter than the window; the state keeps the last inputs."""
    g = torch.Generator().manual_seed(0)
    lengths, slots, continued = [9, 1, 2, 30], [5, 0, 2, 3], [False, True, False, True]
    weight = torch.randn(DIM, WIDTH, generator=g)
    bias = torch.randn(DIM, generator=g) if with_bias else None
    states = torch.randn(SLOTS, DIM, WIDTH - 1, generator=g)
    before = states.clone()
    x = torch.randn(DIM, sum(lengths), generator=g)
    starts = [0, 9, 10, 12, 42]
    out = mamba.causal_conv1d_fn_cpu(
        x,
        weight,
        bias,
        activation="silu",
        conv_states=states,
        has_initial_state=torch.tensor(continued),
        cache_indices=torch.tensor(slots, dtype=torch.int32),
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        seq_lens_cpu=lengths,
    )
    for i, slot in enumerate(slots):
        part = x[:, starts[i] : starts[i + 1]]
        left = before[slot] if continued[i] else torch.zeros(DIM, WIDTH - 1)
        torch.testing.assert_close(
            out[:, starts[i] : starts[i + 1]],
            naive_convolution(part, weight, bias, left),
            rtol=1e-4,
            atol=1e-5,
        )
        assert torch.equal(states[slot], torch.cat([left, part], dim=1)[:, -(WIDTH - 1) :])
    assert torch.equal(states[[1, 4]], before[[1, 4]])


def test_convolution_step_continues_a_sequence() -> None:
    """A batch of single tokens, with padding, equals the convolution of the longer sequence."""
    g = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(DIM, WIDTH, generator=g), torch.randn(DIM, generator=g)
    states = torch.randn(SLOTS, DIM, WIDTH - 1, generator=g)
    before = states.clone()
    x = torch.randn(3, DIM, generator=g)
    slots = [4, -1, 1]
    out = mamba.causal_conv1d_update_cpu(
        x, states, weight, bias, "silu", conv_state_indices=torch.tensor(slots, dtype=torch.int32)
    )
    for i in (0, 2):
        want = naive_convolution(x[i][:, None], weight, bias, before[slots[i]])[:, 0]
        torch.testing.assert_close(out[i], want, rtol=1e-4, atol=1e-5)
        assert torch.equal(states[slots[i]], torch.cat([before[slots[i]], x[i][:, None]], dim=1)[:, 1:])
    assert torch.equal(states[[0, 2, 3, 5]], before[[0, 2, 3, 5]])


def test_kernels_refuse_arguments_they_do_not_implement() -> None:
    """An option of speculative decoding must not be ignored in silence."""
    with pytest.raises(TypeError):
        mamba.fused_sigmoid_gating_delta_rule_update_cpu(disable_state_update=True)
    with pytest.raises(TypeError):
        mamba.chunk_gated_delta_rule_cpu(inplace_update=False)
    with pytest.raises(TypeError):
        mamba.causal_conv1d_update_cpu(intermediate_conv_window=None)


def test_token_slots_are_written_row_by_row() -> None:
    """Each request's new slots go to its own row at its own offset."""
    table = torch.zeros(4, 10, dtype=torch.int32)
    small_ops.assign_req_to_token_pool_cpu(
        torch.tensor([3, 1]), table, torch.tensor([2, 0]), torch.tensor([4, 3]), torch.arange(70, 75), 10
    )
    want = torch.zeros(4, 10, dtype=torch.int32)
    want[3, 2:4] = torch.tensor([70, 71], dtype=torch.int32)
    want[1, 0:3] = torch.tensor([72, 73, 74], dtype=torch.int32)
    assert torch.equal(table, want)


def gemma_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight)


def test_query_key_norms() -> None:
    """Every head is normalised on its own, with weight 1 + w; the gated form also splits the gate off."""
    g = torch.Generator().manual_seed(2)
    heads, dim, tokens = 3, 8, 5
    q, k = torch.randn(tokens, heads * dim, generator=g), torch.randn(tokens, dim, generator=g)
    wq, wk = torch.randn(dim, generator=g), torch.randn(dim, generator=g)
    out_q, out_k = small_ops.fused_qk_gemma_rmsnorm_cpu(q, k, wq, wk, 1e-6, dim)
    torch.testing.assert_close(out_q, gemma_norm(q.view(-1, dim), wq))
    torch.testing.assert_close(out_k, gemma_norm(k, wk))
    gate = torch.randn(tokens, heads, dim, generator=g)
    q_gate = torch.cat([q.view(tokens, heads, dim), gate], dim=-1).reshape(tokens, -1)
    gated = small_ops.fused_qk_gemma_rmsnorm_with_gate_cpu(q_gate, k, wq, wk, 1e-6, dim, heads)
    for got, want in zip(gated, (out_q, out_k, gate.reshape(-1, dim)), strict=True):
        torch.testing.assert_close(got, want)


def test_projection_split() -> None:
    """qkv, then z; b, then a: the contiguous layout of Qwen3.5."""
    tokens, nk, nv, dk, dv = 2, 2, 4, 3, 5
    qkv, z = torch.randn(tokens, 2 * nk * dk + nv * dv), torch.randn(tokens, nv * dv)
    b, a = torch.randn(tokens, nv), torch.randn(tokens, nv)
    out: tuple[Any, ...] = small_ops.fused_qkvzba_split_reshape_cat_contiguous_cpu(
        torch.cat([qkv, z], 1), torch.cat([b, a], 1), nk, nv, dk, dv
    )
    for got, want in zip(out, (qkv, z.view(tokens, nv, dv), b, a), strict=True):
        assert torch.equal(got, want)
        assert got.is_contiguous()


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_unknown_kernels_raise_when_called() -> None:
    """SGLang binds names at import; calling one that has no stand-in says which, and is an error."""
    code = (
        "from sgl_kernel import fused_experts_cpu as f\ntry: f(1)\nexcept NotImplementedError as e: print(e)"
    )
    done = run(code, PYTHONPATH=str(STAND_INS))
    assert "sgl_kernel.fused_experts_cpu has no torch stand-in" in done.stdout, done.stderr


def test_not_importable_outside_a_worker() -> None:
    """Neither installing nor importing the project makes a `sgl_kernel` appear."""
    done = run("import prfaas_sglang.cpu.environment, importlib.util as u; print(u.find_spec('sgl_kernel'))")
    assert done.stdout.strip() == "None", done.stderr


def test_never_shadows_a_real_sgl_kernel(tmp_path: Any) -> None:
    """Where one is installed, activation adds nothing to the path."""
    (tmp_path / "sgl_kernel.py").write_text("REAL = True\n")
    code = (
        "from prfaas_sglang.cpu import environment as e; e.activate(); import sgl_kernel, sys;"
        "print(sgl_kernel.REAL, str(e.STAND_INS) in sys.path)"
    )
    done = run(code, PYTHONPATH=str(tmp_path))
    assert done.stdout.split() == ["True", "False"], done.stderr
