"""Workers on shared cores: who computes at once takes longer, by what was measured and no more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from cache_service.core.errors import ConfigError
from cache_service.core.ids import SiteId
from router.core.profile import DecodeRate, KvShape, ModelProfile, Quadratic, to_dict
from router.simulate.job import Job
from router.simulate.report import Records
from router.simulate.run import simulate
from router.simulate.spec import parse

CORES = {"prefill": 1.5, "decode": 1.2, "both": 2.0}
PROFILE = ModelProfile("m", KvShape(1000.0), Quadratic(0.02, 2e-4), DecodeRate(16, 0.01))
#: Prefill of 1,000 tokens alone, and of 100.
LONG_S, SHORT_S = 0.22, 0.04
FLEET: dict[str, Any] = {
    "sites": [{"name": "B", "prefill": 2, "decode": 1, "profile": to_dict(PROFILE)}],
    "engine": {"block_tokens": 50, "chunk_tokens": 8192},
    "policy": {"name": "round_robin"},
}


class Given:
    """A workload: (arrival in s, tokens, output tokens)."""

    def __init__(self, asked: Sequence[tuple[float, int, int]]) -> None:
        self._asked = asked

    def arrivals(self) -> Iterator[Job]:
        for number, (at_s, tokens, output) in enumerate(self._asked):
            blocks = range(1000 * number, 1000 * number + tokens // 50)
            yield Job(number, at_s, tokens, output, SiteId("B"), list(blocks))

    def after(self, job: Job, now_s: float) -> Sequence[Job]:
        return ()


def run(asked: Sequence[tuple[float, int, int]], **changes: Any) -> Records:
    return simulate(parse({**FLEET, **changes}), Given(asked))


def test_two_prefills_at_once_slow_each_other_and_one_alone_nobody() -> None:
    records = run([(0.0, 1000, 1), (0.0, 1000, 1), (10.0, 1000, 1)], shared_cores=CORES)
    assert list(records.ttft_s) == pytest.approx([1.5 * LONG_S, 1.5 * LONG_S, LONG_S])


def test_a_prefill_beside_decoding_and_the_decoding_beside_it() -> None:
    """100 steps of 10 ms are under way when the prompt comes; each takes 1.2 times as long meanwhile."""
    records = run([(0.0, 100, 100), (0.5, 1000, 1)], shared_cores=CORES)
    assert max(records.ttft_s) == pytest.approx(1.2 * LONG_S)
    assert max(records.done_s) == pytest.approx(SHORT_S + 1.0 + 0.2 * LONG_S)


def test_a_prefill_beside_both() -> None:
    """Decoding goes on through both prefills."""
    records = run([(0.0, 100, 200), (0.5, 1000, 1), (0.5, 1000, 1)], shared_cores=CORES)
    assert sorted(records.ttft_s)[1:] == pytest.approx([2.0 * LONG_S] * 2)


def test_what_joins_on_the_way_slows_only_the_rest() -> None:
    """Half of the first is done when the second comes: 0.11 s alone, then both at 2/3 of the speed."""
    records = run([(0.0, 1000, 1), (0.11, 1000, 1)], shared_cores={"prefill": 1.5})
    assert records.ttft_s[0] == pytest.approx(0.11 + 1.5 * 0.11)
    assert records.ttft_s[1] == pytest.approx(1.5 * 0.11 + 0.11)


def test_what_a_request_takes_beside_is_slowed_by_who_computes_and_slows_nobody() -> None:
    """The short prompt's 0.1 s of HTTP runs into the long prompt's prefill."""
    asked = [(0.0, 100, 1), (SHORT_S, 1000, 1)]
    records = run(asked, shared_cores={"prefill": 1.5}, request_s=0.1)
    assert records.ttft_s[0] == pytest.approx(SHORT_S + 1.5 * 0.1)
    assert records.ttft_s[1] == pytest.approx(LONG_S + 0.1)


@pytest.mark.parametrize("policy", ["prfaas", "ttft", "round_robin"])
def test_cores_where_nobody_slows_anybody_change_nothing(policy: str) -> None:
    changes: dict[str, Any] = {
        "sites": [{"name": name, "prefill": 1, "decode": 1, "profile": to_dict(PROFILE)} for name in "AB"],
        "links": [{"src": "A", "dst": "B", "gbps": 0.1, "both": True}],
        "workload": {"kind": "poisson", "rate": 4.0, "requests": 300, "mu": 6.9, "sigma": 0.5, "high": 8192},
        "policy": {"name": policy, "threshold_tokens": 1000},
        "request_s": 0.01,
    }
    plain, shared, slow = (
        simulate(parse({**FLEET, **changes, **cores}))
        for cores in ({}, {"shared_cores": {}}, {"shared_cores": CORES})
    )
    assert list(shared.ttft_s) == pytest.approx(list(plain.ttft_s))
    assert sum(slow.ttft_s) > sum(plain.ttft_s)
    assert len(slow.ttft_s) == 300


def test_a_worker_that_changes_its_role_stays_on_the_cores() -> None:
    changes: dict[str, Any] = {
        "sites": [{"name": "B", "prefill": 3, "decode": 1, "profile": to_dict(PROFILE)}],
        "workload": {"kind": "poisson", "rate": 4.0, "requests": 200, "mu": 6.9, "sigma": 0.5, "high": 8192},
        "role_changes": [{"at_s": 5.0, "site": "B", "to": "decode", "cost_s": 1.0}],
    }
    records = simulate(parse({**FLEET, **changes, "shared_cores": CORES}))
    assert len(records.ttft_s) == 200


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"shared_cores": {"prefill": 0.9}}, "shared_cores.prefill"),
        ({"shared_cores": {"cores": 2}}, "cores"),
        ({"shared_cores": CORES, "engine": {"kind": "mixed"}}, "shared_cores"),
    ],
)
def test_wrong_values_are_refused_by_name(value: dict[str, Any], said: str) -> None:
    sites = [{"name": "B", "prefill": 2, "profile": "dynamo"}] if "engine" in value else FLEET["sites"]
    with pytest.raises(ConfigError, match=said):
        parse({**FLEET, "sites": sites, **value})
