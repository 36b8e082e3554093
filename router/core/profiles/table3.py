"""The six models of Table 3 of arXiv 2604.15039 on one instance of 8 x H200 (SGLang v0.5.9).

The paper prints only Phi_kv = S_kv / T_prefill. S_kv is counted here from each model's public config.json, in
BF16 with linear state in FP32 (SGLang's default), convolution state included; T_prefill is then S_kv / Phi_kv
at the four printed lengths (1K = 1,024 tokens). So Phi_kv at those lengths is the paper's by construction;
what is ours, and can be wrong, is S_kv and with it T_prefill.
"""

from __future__ import annotations

from router.core.profile import Knots, KvShape, ModelProfile

KI = 1024
LENGTHS = (1 * KI, 8 * KI, 32 * KI, 128 * KI)
_BF16, _FP32 = 2, 4


def _gqa(layers: int, heads: int, key: int, value: int) -> float:
    """Return bytes per token of `layers` with `heads` KV heads of dimensions `key` and `value`."""
    return layers * heads * (key + value) * _BF16


def _mla(layers: int) -> float:
    """Return bytes per token of latent attention: 512 latent and 64 rotary values a layer."""
    return layers * (512 + 64) * _BF16


def _linear(layers: int, heads: int, key: int, value: int, conv_channels: int = 0) -> float:
    """Return bytes of linear state: heads x key x value in FP32, and 3 convolution steps a channel."""
    return layers * (heads * key * value * _FP32 + 3 * conv_channels * _BF16)


#: Model -> (what it caches, Table 3 in Gbps at LENGTHS).
_MODELS: dict[str, tuple[KvShape, tuple[float, float, float, float]]] = {
    # 27 layers: 7 MLA, 20 KDA of 32 heads of 128 x 128, convolutions over q, k and v.
    "Kimi-Linear-48B": (
        KvShape(_mla(7), _linear(20, 32, 128, 128, 3 * 4096)),
        (1.19, 2.29, 3.87, 4.88),
    ),
    # 48 layers: 9 full attention of 4 KV heads, 39 of 8 KV heads with a window of 128; key 192, value 128.
    "MiMo-V2-Flash": (
        KvShape(_gqa(9, 4, 192, 128), window_bytes_per_token=_gqa(39, 8, 192, 128), window_tokens=128),
        (0.82, 2.85, 4.66, 4.71),
    ),
    # 60 layers: 15 full attention of 2 KV heads of 256, 45 GDN of 64 heads of 128 x 128, 12,288 channels.
    "Qwen3.5-397B": (
        KvShape(_gqa(15, 2, 256, 256), _linear(45, 64, 128, 128, 12288)),
        (4.13, 6.28, 8.25, 7.47),
    ),
    # 80 layers: 10 MLA, 70 Lightning of 64 heads of 128 x 128, no convolution.
    "Ring-2.5-1T": (KvShape(_mla(10), _linear(70, 64, 128, 128)), (7.27, 4.47, 2.59, 1.46)),
    # 62 layers of 8 KV heads of 128.
    "MiniMax-M2.5": (KvShape(_gqa(62, 8, 128, 128)), (4.94, 32.87, 59.93, 47.82)),
    # 94 layers of 4 KV heads of 128.
    "Qwen3-235B": (KvShape(_gqa(94, 4, 128, 128)), (4.12, 22.42, 33.35, 21.50)),
}

#: Table 3: model -> Phi_kv in Gbps at LENGTHS.
PHI_GBPS: dict[str, tuple[float, float, float, float]] = {name: phi for name, (_, phi) in _MODELS.items()}
#: Models whose every layer is full attention.
DENSE = ("MiniMax-M2.5", "Qwen3-235B")


def profile(model: str) -> ModelProfile:
    """Return the profile of a model of Table 3. Raises KeyError."""
    kv, phi_gbps = _MODELS[model]
    points = tuple((n, kv.bytes_at(n) * 8 / (phi * 1e9)) for n, phi in zip(LENGTHS, phi_gbps, strict=True))
    return ModelProfile(
        name=f"{model} on 8xH200",
        kv=kv,
        curve=Knots(points),
        measured_tokens=(LENGTHS[0], LENGTHS[-1]),
        source="arXiv 2604.15039, Table 3, with KV sizes from the public config.json",
    )
