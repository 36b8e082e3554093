"""Launches that cannot work with prfaas stop at once with a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prfaas_sglang.cpu.environment import cpu_arguments
from prfaas_sglang.cpu.zygote import Zygote
from prfaas_sglang.fleet.ports import free_port
from tests.engine.conftest import References

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]


@pytest.mark.parametrize(
    ("arguments", "config", "message"),
    [
        (
            ["--enable-mixed-chunk"],
            {"worker_id": "w", "site": "A", "insecure": True},
            "--enable-mixed-chunk True: mixed chunks",
        ),
        (
            ["--pp-size", "2"],
            {"worker_id": "w", "site": "A", "insecure": True},
            "--pp-size 2: pipeline parallelism",
        ),
        ([], {"worker_id": "w"}, "site"),
        ([], {"worker_id": "w", "site": "A"}, "give either tls"),
        ([], None, "invalid choice: 'prfaas'"),
    ],
    ids=["mixed-chunk", "pipeline", "wrong-config", "no-encryption", "no-config"],
)
def test_a_launch_that_cannot_work_stops(
    zygote: Zygote,
    references: References,
    tmp_path: Path,
    arguments: list[str],
    config: dict[str, object] | None,
    message: str,
) -> None:
    """The process ends with a non-zero status and the reason in its output; it never serves."""
    model, _ = references.get("dense")
    zygote.wait_ready(120)
    argv = [
        *("--model-path", str(model), "--host", "127.0.0.1", "--port", str(free_port()), "--page-size", "64"),
        *("--disaggregation-mode", "prefill", "--disaggregation-transfer-backend", "prfaas"),
        *cpu_arguments(disaggregation_mode="prefill"),
        *arguments,
    ]
    env = {} if config is None else {"PRFAAS_CONFIG": json.dumps(config)}
    pid = zygote.spawn("refused", argv, env, tmp_path / "refused.log")
    status = zygote.wait(pid, 60)
    assert status not in (0, None)
    assert message in (tmp_path / "refused.log").read_text()
