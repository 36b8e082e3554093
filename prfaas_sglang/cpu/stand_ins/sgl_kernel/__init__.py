"""Stand-in for the CPU build of sgl_kernel, which is not published on PyPI.

SGLang's CPU engine binds names of this package at import time. The ones that the supported model families
run are given in plain torch; every other name raises when it is called, so nothing is wrong in silence.
This folder is put on sys.path by `prfaas_sglang.cpu.environment` inside CPU workers only.

`convert_weight_packed` must stay undefined on torch.ops: its presence is part of SGLang's AMX test.
"""

import torch

from sgl_kernel import mamba, small_ops

__version__ = "0.0.0+prfaas.cpu"

causal_conv1d_fn_cpu = mamba.causal_conv1d_fn_cpu
causal_conv1d_update_cpu = mamba.causal_conv1d_update_cpu
chunk_gated_delta_rule_cpu = mamba.chunk_gated_delta_rule_cpu
assign_req_to_token_pool_cpu = small_ops.assign_req_to_token_pool_cpu

#: What SGLang reaches as torch.ops.sgl_kernel.NAME.
TORCH_OPS = {
    "fused_gdn_gating_cpu": mamba.fused_gdn_gating_cpu,
    "fused_sigmoid_gating_delta_rule_update_cpu": mamba.fused_sigmoid_gating_delta_rule_update_cpu,
    "fused_sigmoid_mul_cpu": small_ops.fused_sigmoid_mul_cpu,
    "fused_qk_gemma_rmsnorm_cpu": small_ops.fused_qk_gemma_rmsnorm_cpu,
    "fused_qk_gemma_rmsnorm_with_gate_cpu": small_ops.fused_qk_gemma_rmsnorm_with_gate_cpu,
    "fused_qkvzba_split_reshape_cat_contiguous_cpu": small_ops.fused_qkvzba_split_reshape_cat_contiguous_cpu,
}
for _name, _function in TORCH_OPS.items():
    setattr(torch.ops.sgl_kernel, _name, _function)


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(
            f"sgl_kernel.{name} has no torch stand-in; this model or option needs a GPU, "
            "or SGLang's own CPU build of sgl_kernel"
        )

    missing.__name__ = name
    return missing
