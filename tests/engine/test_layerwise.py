"""Layer-wise sending with the real engine: exact, early, and chunk-wise when the engine gives no sign."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from prfaas_sglang.cpu.zygote import Zygote
from tests.engine.conftest import ROOT, References, Serve, server_of
from tests.engine.layer_faults import TWICE_TOKENS
from tests.engine.test_transfer_backend import Pair, pair, post

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


def metric(servers: Pair, name: str) -> float:
    """Return a number of the prefill worker."""
    text = requests.get(f"{servers.telemetry}/metrics", timeout=10).text
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))


@pytest.mark.parametrize("family", ["gdn", "dense", "gdn-moe", "swa"])
def test_every_family_is_token_exact_layer_by_layer(
    serve: Serve, references: References, family: str
) -> None:
    """Several chunks, cached prefixes, many at once: exact, and every transfer had layers go ahead."""
    model, cases = references.get(family)
    with pair(serve, model, family, layerwise=True) as servers:
        for _ in range(2):
            for case in cases:
                answer = servers.generate(case.prompt)
                assert answer["output_ids"] == case.output, f"{len(case.prompt)} tokens"
                record = servers.transfer(answer["room"])
                assert record["outcome"] == "done"
                assert record["ahead_bytes"] > 0, record
        for _ in range(3):
            servers.prefill.flush()  # so that equal prompts are computed together
            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(lambda case: servers.generate(case.prompt), cases * 4))
            assert [a["output_ids"] for a in answers] == [case.output for case in cases * 4]
        assert metric(servers, "prfaas_layerwise_fallbacks_total") == 0


@pytest.mark.parametrize("layerwise", [True, False])
def test_layers_leave_before_their_chunk_is_computed(
    serve: Serve, references: References, layerwise: bool
) -> None:
    """A prompt of one chunk that decode waits for: TCP had bytes of it when prefill ended, or had none."""
    model, cases = references.get("dense")
    case = max(cases, key=lambda c: len(c.prompt))
    with pair(serve, model, "dense", layerwise=layerwise, chunk=1024) as servers:
        early = []
        for _ in range(5):
            servers.prefill.flush()
            body = servers.body(case.prompt)
            with ThreadPoolExecutor(1) as pool:
                answer = pool.submit(post, servers.decode, body)
                deadline = time.monotonic() + 20
                while metric(servers, "prfaas_transfer_open_count") == 0:  # until the grant is there
                    assert time.monotonic() < deadline, answer
                post(servers.prefill, body)
                assert answer.result(60)["output_ids"] == case.output
            record = servers.transfer(body["bootstrap_room"])
            early.append(record["early_bytes"])
        assert any(early) == layerwise, early


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Servers that also load tests/engine/layer_faults.py, as an installed plugin."""
    site = tmp_path_factory.mktemp("site")
    info = site / "layer_faults-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: layer-faults\nVersion: 0\n")
    plugin = "[sglang.srt.plugins]\nlayer_faults = tests.engine.layer_faults:register\n"
    (info / "entry_points.txt").write_text(plugin)
    with pytest.MonkeyPatch.context() as patch:
        others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(ROOT), *filter(None, others)]))
        zygote = Zygote.start(site / "zygote.log")
    with contextlib.closing(contextlib.ExitStack()) as ends:
        ends.callback(zygote.stop, 0)
        yield server_of(zygote, site)


def test_a_layer_that_does_not_report_goes_with_its_chunk(faulty: Serve, references: References) -> None:
    """Nothing is sent ahead while a layer is missing; answers stay exact, and it is counted and said once."""
    model, cases = references.get("dense")
    with pair(faulty, model, "dense", layerwise=True, fault="missing") as servers:
        for case in cases:
            answer = servers.generate(case.prompt)
            assert answer["output_ids"] == case.output
            record = servers.transfer(answer["room"])
            assert (record["outcome"], record["ahead_bytes"]) == ("done", 0)
        assert metric(servers, "prfaas_layerwise_fallbacks_total") >= len(cases)
        log = servers.prefill.log_path.read_text(errors="replace")
        assert log.count("layerwise_fallback reason=1 of 4 layers did not report") == 1


def test_a_layer_that_is_computed_again_fails_its_request(faulty: Serve, references: References) -> None:
    """What went ahead was not final: the request fails and says so; the next ones go chunk-wise, exact."""
    model, cases = references.get("dense")
    (fine, wrong) = (cases[0], next(c for c in cases if len(c.prompt) == TWICE_TOKENS))
    with pair(faulty, model, "dense", layerwise=True, fault="twice") as servers:
        assert servers.generate(fine.prompt)["output_ids"] == fine.output
        assert "computed twice" in json.dumps(post(servers.prefill, servers.body(wrong.prompt)))
        for case in cases:
            answer = servers.generate(case.prompt)
            assert answer["output_ids"] == case.output
            record = servers.transfer(answer["room"])
            assert record["ahead_bytes"] == 0
