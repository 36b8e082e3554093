"""Compressed KV between real SGLang servers: lossless is token-exact; what FP8 changes is measured."""

from __future__ import annotations

import re

import pytest
import requests

from tests.engine.conftest import References, Serve
from tests.engine.test_transfer_backend import Pair, pair

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


def sent(servers: Pair) -> dict[str, tuple[float, float]]:
    """Return row bytes and bytes as coded that the prefill server has sent, by codec."""
    text = requests.get(f"{servers.telemetry}/metrics", timeout=10).text
    found: dict[str, dict[str, float]] = {"raw": {}, "wire": {}}
    pattern = r'prfaas_transfer_(raw|wire)_bytes_total\{codec="(\w+)"[^}]*\} (\S+)'
    for form, codec, value in re.findall(pattern, text):
        found[form][codec] = float(value)
    return {codec: (raw, found["wire"][codec]) for codec, raw in found["raw"].items()}


def report(record_property: object, name: str, value: float) -> None:
    """Keep a measured value with the test's result."""
    assert callable(record_property)
    record_property(name, value)
    print(f"{name}: {value:.3f}")


@pytest.mark.parametrize("family", ["gdn", "dense", "gdn-moe", "swa"])
def test_lossless_is_token_exact(serve: Serve, references: References, family: str, record_property) -> None:  # type: ignore[no-untyped-def]
    """Coded frames of KV, window and linear state give the very tokens of transformers."""
    model, cases = references.get(family)
    with pair(serve, model, family, compression="lossless") as servers:
        for case in cases:
            assert servers.generate(case.prompt)["output_ids"] == case.output
        raw, wire = sent(servers)["lossless"]
        report(record_property, f"{family}: lossless ratio of the coded frames", raw / wire)
        assert wire < raw


@pytest.mark.parametrize("family", ["gdn", "dense", "gdn-moe", "swa"])
def test_fp8_answers_from_rounded_kv(
    serve: Serve, references: References, family: str, record_property
) -> None:  # type: ignore[no-untyped-def]
    """KV is under a quarter of its float32 bytes, the first token prefill's own; the rest is only reported.

    Random weights turn any rounding into other tokens: docs/compression.md has the figures and a peer's.
    """
    model, cases = references.get(family)
    with pair(serve, model, family, compression="fp8") as servers:
        same = total = together = 0
        for case in cases:
            output = servers.generate(case.prompt)["output_ids"]
            assert output[0] == case.output[0]
            equal = [a == b for a, b in zip(output, case.output, strict=True)]
            same, total = same + sum(equal), total + len(equal)
            together += equal.index(False) if False in equal else len(equal)
        raw, wire = sent(servers)["fp8"]
        report(record_property, f"{family}: fp8 ratio", raw / wire)
        report(record_property, f"{family}: fp8 equal greedy tokens", same / total)
        report(record_property, f"{family}: fp8 equal until the first difference", together / total)
        assert raw / wire > 4
