"""The case study of arXiv 2604.15039, section 5: an unpublished 1T hybrid model on H200 and on H20.

Table 5 (8 x H200) is printed in the paper: S_kv in MiB, T_prefill in seconds, 1K = 1,024 tokens. The H20
curve is not; it is the one thing fitted here, to Table 6: eq. 4 turned round gives T(26.84K) = 9 / 2.11 s
from the homogeneous row and T(9.98K) = 3 / 1.64 s from the PrfaaS row; P90 of the homogeneous TTFT is
T(60.95K); the two mean TTFT fix the ends. Decode is BS_max / T_decode = 800 tokens/s, which Theta_pd-d of all
three rows gives; 20 requests at the 25 ms of the 40 tokens/s objective is one such pair.
"""

from __future__ import annotations

from router.core.profile import DecodeRate, Knots, KvTable, ModelProfile

KI = 1024
MIB = 1 << 20

#: Table 5: tokens, S_kv in bytes.
KV = KvTable(tuple((n * KI, s * MIB) for n, s in ((1, 190.8), (8, 308.9), (32, 701.3), (128, 2316.3))))
DECODE = DecodeRate(max_batch=20, step_s=0.025)

H200 = ModelProfile(
    name="1T KDA:MLA 3:1 on 8xH200",
    kv=KV,
    curve=Knots(tuple((n * KI, t) for n, t in ((1, 0.44), (8, 0.72), (32, 1.84), (128, 7.40)))),
    measured_tokens=(1 * KI, 128 * KI),
    source="arXiv 2604.15039, Table 5",
)

H20 = ModelProfile(
    name="1T KDA:MLA 3:1 on 8xH20",
    kv=KV,
    curve=Knots(tuple((n * KI, t) for n, t in ((1, 0.71), (8, 1.514), (32, 4.958), (128, 21.15)))),
    decode=DECODE,
    source="fitted to arXiv 2604.15039, Table 6 (the paper prints no H20 curve)",
)
