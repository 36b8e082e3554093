"""Layer-wise sending with the real engine: exact, early, and chunk-wise when the engine gives no sign."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from tests.engine.conftest import References, Serve
from tests.engine.test_transfer_backend import Pair, pair

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


def metric(servers: Pair, name: str) -> float:
    """Return a number of the prefill worker."""
    text = requests.get(f"{servers.telemetry}/metrics", timeout=10).text
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))


@pytest.mark.parametrize("family", ["gdn", "dense", "gdn-moe", "swa"])
def test_every_family_is_token_exact_layer_by_layer(
    serve: Serve, references: References, family: str
) -> None:
    """Several chunks, cached prefixes, many at once: exact, and all whole layers went ahead."""
    model, cases = references.get(family)
    with pair(serve, model, family, layerwise=True) as servers:
        for _ in range(2):
            for case in cases:
                answer = servers.generate(case.prompt)
                assert answer["output_ids"] == case.output, f"{len(case.prompt)} tokens"
                (record,) = servers.transfers(answer["room"])
                assert record["outcome"] == "done"
                assert record["ahead_bytes"] > 0, record
        for _ in range(3):
            servers.prefill.flush()  # so that equal prompts are computed together
            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(lambda case: servers.generate(case.prompt), cases * 4))
            assert [a["output_ids"] for a in answers] == [case.output for case in cases * 4]
        assert metric(servers, "prfaas_layerwise_fallbacks_total") == 0
