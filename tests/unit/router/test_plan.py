"""Plans: files, answers, reasons, reports."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from cache_service.core.errors import ConfigError
from prfaas_sglang import cli
from router.core.optimum import by_grid, ratios
from router.core.profile import Knots, ModelProfile
from router.core.profiles import case_study, table3
from router.core.throughput import Stage
from router.core.workload import PAPER, Histogram, Sample
from router.plan import config, profile_file, report
from router.plan.command import EXAMPLE
from router.plan.planner import GRID, Home, Offer, Question, plan, sensitivity

GBPS = 1e9 / 8
CASE = config.load(EXAMPLE)


def example(**changes: Any) -> dict[str, Any]:
    """Return the example as values, with dotted keys changed: {"home.name": "X"}."""
    value: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())
    for path, new in changes.items():
        *way, last = path.split("__")
        place: Any = value
        for key in way:
            place = place[int(key) if key.isdigit() else key]
        if new is None:
            del place[last]
        else:
            place[last] = new
    return value


def slower(profile: ModelProfile, times: float) -> ModelProfile:
    """Return a profile of a chip so many times slower, with the case study's decode rate."""
    assert isinstance(profile.curve, Knots)
    points = tuple((n, s * times) for n, s in profile.curve.points)
    return replace(profile, curve=Knots(points), decode=case_study.DECODE)


def test_the_case_study_pays() -> None:
    """12 % cheaper tokens than the same money at home: the paper's gain at equal cost."""
    answer = plan(CASE)
    assert answer.pays
    assert answer.grown is not None
    assert answer.grown.found.system.prefill + answer.grown.found.system.decode == 16
    assert answer.both.requests_per_s / answer.grown.requests_per_s == pytest.approx(1.15, rel=0.02)
    assert answer.both.dollars_per_mtok == pytest.approx(answer.grown.dollars_per_mtok / 1.137, rel=0.01)
    assert answer.both.transfer_s[0] == pytest.approx(0.0811, rel=0.01)


@pytest.mark.parametrize(
    ("model", "dense"), [("MiniMax-M2.5", True), ("Qwen3-235B", True), ("Ring-2.5-1T", False)]
)
def test_dense_models_lose_on_thin_links(model: str, dense: bool) -> None:
    """By arithmetic: what four instances make is many times what 10 Gbps carry."""
    fast = table3.profile(model)
    home = Home("B", slower(fast, 2.5), 8, dollars_per_hour=8.0)
    offer = Offer("A", fast, 4, 10 * GBPS, dollars_per_hour=16.0)
    answer = plan(Question(home, (offer,), PAPER, 1024))
    assert answer.pays is not dense
    assert any("the link binds" in reason and "Gbps" in reason for reason in answer.reasons) is dense


@pytest.mark.parametrize(
    ("offer", "reason"),
    [
        ({"dollars_per_byte": 0.05 / 1e9}, "spends more than it saves"),
        ({"dollars_per_byte": 0.005 / 1e9}, "without it the second site would pay"),
        ({"dollars_per_hour": 60.0}, "costs 7.50 times one in B and prefills"),
        ({"link_bytes_per_s": 0.0}, "the link from A carries nothing"),
        ({"link_bytes_per_s": 0.001 * GBPS}, "the link binds"),
        ({"link_dollars_per_hour": 500.0}, "binds with the second site"),
    ],
)
def test_it_says_no_and_why(offer: dict[str, float], reason: str) -> None:
    """Egress, chip price, a dead link, a thin one, a dear line."""
    answer = plan(replace(CASE, offers=(replace(CASE.offers[0], **offer),)))
    assert not answer.pays
    assert any(re.search(reason, line) for line in answer.reasons), answer.reasons


def test_decode_bound_homes_gain_nothing() -> None:
    """With short prompts and long answers, prefill elsewhere relieves nobody."""
    home = replace(case_study.H20, curve=Knots(((1, 1e-6), (1e6, 1e-5))))
    question = Question(Home("B", home, 8, 8.0), CASE.offers, Sample((200.0, 300.0)), 20_000)
    answer = plan(question)
    assert not answer.pays
    assert answer.both.found.bottleneck is Stage.DECODE


def test_a_home_of_one_instance_serves_only_with_a_second_site() -> None:
    """It cannot both prefill and decode."""
    answer = plan(replace(CASE, home=Home("B", case_study.H20, 1)))
    assert answer.pays
    assert answer.alone.requests_per_s == 0
    assert "home alone serves nothing" in " ".join(answer.reasons)


def test_without_prices_or_growth_throughput_decides() -> None:
    """And the price of the further tokens is told."""
    full = plan(replace(CASE, home=replace(CASE.home, can_grow=False)))
    assert full.pays
    assert full.grown is None
    assert "each further million tokens costs" in " ".join(full.reasons)
    free = plan(replace(CASE, home=replace(CASE.home, dollars_per_hour=0.0)))
    assert "home has no price" in " ".join(free.reasons)
    assert not plan(replace(CASE, offers=())).pays


def test_dear_egress_raises_the_threshold() -> None:
    """The cheapest tokens are not those of most throughput."""
    dear = replace(CASE.offers[0], dollars_per_byte=0.01 / 1e9)
    answer, free = plan(replace(CASE, offers=(dear,))), plan(CASE)
    assert answer.both.found.at.threshold > free.both.found.at.threshold
    assert sum(answer.both.found.egress_bytes_per_s) < sum(free.both.found.egress_bytes_per_s)


def test_large_homes_are_planned_by_the_crossings() -> None:
    """Eight times everything sustains eight times as much (ratios are finer, so a little more)."""
    offer = replace(CASE.offers[0], instances=32, link_bytes_per_s=800 * GBPS)
    large = plan(replace(CASE, home=replace(CASE.home, instances=64), offers=(offer,)))
    assert large.question.home.instances > GRID
    small = plan(CASE).both.requests_per_s
    assert 8 * small * 0.99 <= large.both.requests_per_s <= 8 * small * 1.1
    exact = by_grid(ratios(large.both.found.system), PAPER).requests_per_s
    assert large.both.requests_per_s == pytest.approx(exact, rel=0.005)


def test_cached_prefixes_lighten_prefill() -> None:
    """A higher hit ratio never sustains less."""
    rates = [plan(replace(CASE, hit_ratio=hit)).both for hit in (0.0, 0.3, 0.6, 0.9)]
    for low, high in pairwise(rates):
        assert high.requests_per_s >= low.requests_per_s * (1 - 1e-9)


def test_report_and_json() -> None:
    """Both carry the verdict, the stages, the sensitivities and what the numbers are not."""
    answer = plan(CASE)
    changed = sensitivity(CASE)
    assert {item.what for item in changed} == {"bandwidth", "hit ratio", "egress price", "remote price"}
    text = report.text(answer, changed)
    for part in (
        "second site: YES",
        "bottleneck",
        "sensitivity: bandwidth",
        "model output",
        "not measured",
        "3/5",
    ):
        assert part in text
    value = json.loads(json.dumps(report.as_json(answer, changed)))
    assert value["pays"] is True
    assert value["both"]["utilisation"]["remote prefill"] == pytest.approx(1)
    assert value["kind"] == "model"
    alone = replace(CASE, offers=())
    assert "second site: NO" in report.text(plan(alone), sensitivity(alone))


def test_extrapolation_is_told() -> None:
    """A profile measured on short prompts says so."""
    short = replace(CASE.offers[0], profile=replace(case_study.H200, measured_tokens=(128, 2048)))
    assert "extrapolated" in report.text(plan(replace(CASE, offers=(short,))), ())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"home__name": "a b"}, r"home\.name"),
        ({"home__instances": 0}, r"home\.instances: 0 is not in 1\.\.100000"),
        ({"home__instances": "8"}, r"home\.instances: expected `int`"),
        (
            {"home__profile": "paper:none"},
            r"home\.profile: 'paper:none'; built-in profiles are paper:1T/H200",
        ),
        ({"home__profile": "none.yaml"}, r"home\.profile: .*none\.yaml: cannot be read"),
        ({"home__profile": "paper:MiniMax-M2.5"}, r"home\.decode: is missing"),
        ({"home__decode": {"max_batch": 0, "step_s": 1}}, r"home\.decode\.max_batch: 0 is not in"),
        ({"remotes__0__name": "B"}, r"home\.name: 'B' is given twice"),
        ({"remotes__0__link__gbps": -1}, r"remotes\[0\]\.link\.gbps: -1 is not in 0"),
        ({"remotes__0__link__gpbs": 1}, r"remotes\[0\]\.link: object contains unknown field `gpbs`"),
        ({"workload__hit_ratio": 1.0}, r"workload\.hit_ratio: 1 is not in 0\.\.0\.999"),
        ({"workload__lognormal": None}, r"workload: 0 of lognormal, trace, histogram are given"),
        ({"workload__lognormal__sigma": -1}, r"workload\.lognormal: .*sigma > 0"),
        ({"workload": 5}, r"workload: expected `object`"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """The field and what is accepted."""
    with pytest.raises(ConfigError, match=message):
        config.parse(example(**changes), tmp_path)


def test_decode_rate_of_the_file_counts(tmp_path: Path) -> None:
    """It replaces the profile's."""
    question = config.parse(
        example(home__profile="paper:Ring-2.5-1T", home__decode={"max_batch": 40, "step_s": 0.02}), tmp_path
    )
    assert question.home.profile.decode is not None
    assert question.home.profile.decode.tokens_per_s == 2000


METRICS = """\
# TYPE lengths histogram
lengths_bucket{route="local",le="1000"} 10
lengths_bucket{route="local",le="8000"} 30
lengths_bucket{route="local",le="+Inf"} 30
lengths_bucket{route="remote",le="1000"} 0
lengths_bucket{route="remote",le="8000"} 5
lengths_bucket{route="remote",le="+Inf"} 10
lengths_count{route="local"} 30
lengths_sum{route="local"} 90000
"""


def with_workload(kind: str, value: dict[str, Any]) -> dict[str, Any]:
    """Return the example with another workload."""
    changed = example(workload__lognormal=None)
    changed["workload"][kind] = value
    return changed


def test_workloads_from_files(tmp_path: Path) -> None:
    """A trace, a router's histogram, buckets in the file itself."""
    (tmp_path / "trace.jsonl").write_text('{"input_length": 5}\n\n{"other": 1}\n{"input_length": 70.0}\n')
    (tmp_path / "metrics.txt").write_text(METRICS)
    trace = config.parse(with_workload("trace", {"file": "trace.jsonl"}), tmp_path)
    assert trace.lengths == Sample((5.0, 70.0))
    router = config.parse(with_workload("histogram", {"file": "metrics.txt", "metric": "lengths"}), tmp_path)
    assert router.lengths == Histogram((0.0, 1000.0, 8000.0, 16000.0), (10.0, 25.0, 5.0))
    inline = config.parse(with_workload("histogram", {"bounds": [0, 10, 100], "counts": [1, 2]}), tmp_path)
    assert inline.lengths == Histogram((0.0, 10.0, 100.0), (1.0, 2.0))
    assert plan(router).both.requests_per_s > 0


@pytest.mark.parametrize(
    ("kind", "value", "content", "message"),
    [
        ("trace", {"file": "f"}, None, r"workload\.trace\.file: .*cannot be read"),
        ("trace", {"file": "f"}, "{", r"workload\.trace\.file: .*line 1: is not JSON"),
        ("trace", {"file": "f"}, '{"input_length": -1}', r"line 1: input_length is not a number >= 0"),
        ("trace", {"file": "f", "field": "x"}, "{}", r"workload\.trace\.field: no line of .* has 'x'"),
        ("histogram", {"file": "f", "metric": "x"}, None, r"workload\.histogram\.file: .*cannot be read"),
        (
            "histogram",
            {"file": "f", "metric": "x"},
            METRICS,
            r"metric: no histogram 'x' in .*; it has lengths",
        ),
        ("histogram", {"file": "f", "metric": "x"}, "{{{ 1", r"is not in Prometheus text format"),
        ("histogram", {"bounds": [1], "counts": []}, None, r"workload\.histogram: counts must be"),
    ],
)
def test_broken_workload_files_are_named(
    kind: str, value: dict[str, Any], content: str | None, message: str, tmp_path: Path
) -> None:
    """File, line, field."""
    if content is not None:
        (tmp_path / "f").write_text(content)
    with pytest.raises(ConfigError, match=message):
        config.parse(with_workload(kind, value), tmp_path)


def test_profiles_from_files(tmp_path: Path) -> None:
    """Written and read back; what is no profile is named."""
    profile_file.write(case_study.H20, tmp_path / "p.yaml")
    question = config.parse(example(home__profile="p.yaml"), tmp_path)
    assert question.home.profile == case_study.H20
    for content, message in (
        ("a: [", "is not YAML"),
        ("a: 1", "unknown; accepted are format"),
        ("x" * 2_000_000, "longer"),
    ):
        (tmp_path / "p.yaml").write_text(content)
        with pytest.raises(ConfigError, match=message):
            profile_file.read(tmp_path / "p.yaml")
    with pytest.raises(ConfigError, match="cannot be written"):
        profile_file.write(case_study.H20, tmp_path / "none" / "p.yaml")
    for name in profile_file.BUILT_IN:
        assert profile_file.load(name, tmp_path, field="x").prefill_s(1000) > 0


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints the example, plans it, writes JSON; mistakes end in status 2."""
    assert cli.main(["plan", "--print-example"]) == 0
    file = tmp_path / "plan.yaml"
    file.write_text(capsys.readouterr().out)
    assert cli.main(["plan", "-f", str(file), "--json", str(tmp_path / "plan.json")]) == 0
    assert capsys.readouterr().out.startswith("second site: YES")
    assert json.loads((tmp_path / "plan.json").read_text())["pays"] is True
    assert cli.main(["plan"]) == 2
    assert cli.main(["plan", "-f", str(tmp_path / "none.yaml")]) == 2
    assert cli.main(["plan", "-f", str(file), "--json", str(tmp_path / "no" / "x")]) == 2
    file.write_text("home: [")
    assert cli.main(["plan", "-f", str(file)]) == 2
    file.write_text("x" * 2_000_000)
    assert cli.main(["plan", "-f", str(file)]) == 2


def test_plots(tmp_path: Path) -> None:
    """A picture of the threshold and one of each sensitivity, where matplotlib is installed."""
    answer, changed = plan(CASE), sensitivity(CASE)
    from router.plan import plots

    try:
        import matplotlib  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="prfaas-sglang\\[plots\\]"):
            plots.draw(answer, changed, tmp_path)
        return
    files = plots.draw(answer, changed, tmp_path / "plots")
    assert [path.name for path in files] == [
        "threshold.png",
        "bandwidth.png",
        "hit-ratio.png",
        "egress-price.png",
        "remote-price.png",
    ]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in files)
