"""`prfaas profile` on real SGLang workers: sizes as transfers have them, times as prompts take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prfaas_sglang import cli
from prfaas_sglang.cpu import models
from router.core.profile import KvShape, Quadratic
from router.plan import config, profile_file
from router.plan.planner import plan
from tests.engine.conftest import Serve
from tests.engine.test_transfer_backend import pair

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


def plan_file(profile: str) -> dict[str, Any]:
    """Return a plan of two sites that both have the measured profile."""
    return {
        "home": {"name": "B", "profile": profile, "instances": 2},
        "remotes": [{"name": "A", "profile": profile, "instances": 1, "link": {"gbps": 1}}],
        "workload": {"output_tokens": 64, "histogram": {"bounds": [64, 512, 2048], "counts": [3, 1]}},
    }


@pytest.mark.parametrize("family", ["gdn", "dense", "swa"])
def test_sizes_are_those_of_a_transfer(
    serve: Serve, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The profile predicts, to the byte, what a prompt's transfer moves; times grow with the length."""
    model = models.build(family, tmp_path / family)
    out = tmp_path / "profile.yaml"
    with pair(serve, model, family) as pair_:
        status = cli.main(
            [
                "profile",
                *("--url", pair_.prefill.url),
                *("--telemetry", pair_.telemetry),
                *("--decode", pair_.decode.url),
                *("--tokens", "128,512,2048"),
                *("--repeats", "1"),
                *("--step-ms", "60000"),
                *("--out", str(out)),
            ]
        )
        assert status == 0, capsys.readouterr().err
        profile = profile_file.read(out)
        for tokens in (100, 640, 1500):
            answer = pair_.generate([5 + i % 90 for i in range(tokens)], 1)
            record = pair_.transfer(answer["room"])
            assert record["bytes"] == profile.kv_bytes(tokens)
        printed = capsys.readouterr().out
    assert "off by" in printed
    question = config.parse(plan_file(str(out)), tmp_path)
    assert plan(question).both.requests_per_s > 0
    assert profile.decode is not None
    assert 2 <= profile.decode.max_batch <= 8  # what the worker runs at once, as far as it has room
    assert 0 < profile.decode.step_s < 10
    assert isinstance(profile.kv, KvShape)
    assert isinstance(profile.curve, Quadratic)
    assert profile.measured_tokens == (128, 2048)
    assert profile.prefill_s(2048) >= profile.prefill_s(128) > 0
    assert (profile.kv.state_bytes > 100_000) == (family == "gdn")
    print(printed, json.dumps(dict(profile.facts), indent=1))
