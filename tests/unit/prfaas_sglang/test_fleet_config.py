"""The fleet file: the smallest one works, and each mistake is named with its path and what is accepted."""

from __future__ import annotations

import json
import socket
import textwrap
from pathlib import Path

import pytest
import yaml

from cache_service.core.errors import ConfigError
from prfaas_sglang import cli
from prfaas_sglang import config as worker_config
from prfaas_sglang.cpu import models
from prfaas_sglang.fleet import config, specs, up
from prfaas_sglang.fleet import ports as ports_module
from prfaas_sglang.fleet.ports import PortPlan
from router import config as router_config

SMALL = """
model: {path: tiny:gdn}
transfer: {tls: auto}
sites:
  - {name: A, workers: [{name: a-p, role: prefill}]}
  - {name: B, workers: [{name: b-p, role: prefill}, {name: b-d, role: decode}]}
links: [{src: A, dst: B, gbps: 10}]
"""


def test_the_smallest_file_gets_sane_defaults() -> None:
    """A few lines describe a fleet; the router stands where decoding is."""
    fleet = config.parse(SMALL)
    assert fleet.router_site() == "B"
    assert fleet.model.served_name == "gdn"
    assert (fleet.engine.device, fleet.engine.page_size, fleet.transfer.backend) == ("cpu", 64, "prfaas")
    assert [w.name for _, w in fleet.workers()] == ["a-p", "b-p", "b-d"]


@pytest.mark.parametrize("name", ["demo", "minimal"])
def test_the_examples_are_accepted(name: str) -> None:
    """What `prfaas up --print-example` prints, and the smallest one, describe two sites."""
    fleet = config.parse(up.example(name))
    assert {site.name for site in fleet.sites} == {"A", "B"}


def test_the_help_shows_the_minimal_example() -> None:
    """The file in `prfaas up --help` is the one that is tested here."""
    shown = cli.UP_EXAMPLE.partition("the smallest fleet file:\n")[2].partition("\n\n")[0]
    assert yaml.safe_load(textwrap.dedent(shown)) == yaml.safe_load(up.example("minimal"))


def test_tiny_families_are_those_of_the_builder() -> None:
    """The list in the (import-light) fleet file and the builder's agree."""
    assert tuple(models.FAMILIES) == config.TINY_FAMILIES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("gbps: 10", "gbps: 10, colour: red"), r"links\[0\].*unknown field `colour`"),
        (("gbps: 10", "gbps: 10, colour: red"), "unknown field `colour`; accepted: src, dst, gbps"),
        (
            ("role: decode", "role: boss"),
            r"sites\[1\]\.workers\[1\]\.role: invalid enum value 'boss'; accepted: prefill, decode$",
        ),
        (("links:", "engine: {args: [0.5]}\nlinks:"), r"engine\.args\[0\]: expected `str`, got `float`"),
        (("links:", "engine: {1: 2}\nlinks:"), "engine: expected `str`"),
        (("dst: B", "dst: A"), r"links\[0\]\.dst: is 'A' like src"),
        (("gbps: 10}", "gbps: 10}, {src: A, dst: B, gbps: 1}"), r"links\[1\]: A -> B is also links\[0\]"),
        (
            ("links: [{src: A, dst: B, gbps: 10}]", ""),
            r"sites\[0\]\.workers\[0\]: .*no link from 'A' to 'B'; add",
        ),
        (
            ("{name: a-p, role: prefill}", "{name: a-p, role: prefill}, {name: a-d, role: decode}"),
            r"sites\[1\]\.workers\[0\]: would never be used",  # the router is in A, which decodes
        ),
        (
            ("links:", "  - {name: C, workers: [{name: c-d, role: decode}]}\nlinks:"),
            r"sites\[2\]\.workers\[0\]\.role: decode in site 'C' would never be used",
        ),
        (("name: a-p", "name: router"), r"sites\[0\]\.workers\[0\]\.name: 'router' is the name of a process"),
        (
            ("name: a-p", "name: a-p, args: [--port=1]"),
            r"workers\[0\]\.args\[0\]: --port is set from sites\[\]\.workers\[\]\.port",
        ),
        (
            ("links:", "engine: {args: [--page-size, '1']}\nlinks:"),
            r"engine\.args\[0\]: --page-size is set from engine\.page_size",
        ),
        (("role: decode", "role: decode, bootstrap_port: 9000"), "only prefill workers have one"),
        (("role: decode", "role: decode, gpus: [0]"), r"workers\[1\]\.gpus: engine\.device is cpu"),
        (
            ("role: decode}]}", "role: decode, gpus: [1, 1]}]}\nengine: {device: cuda}"),
            r"gpus: \[1, 1\] is not a list of different GPU indices",
        ),
        (("tls: auto", "tls: auto, frame_bytes: 1"), r"transfer\.frame_bytes: 1 is not in 4096"),
        (
            ("tls: auto", "tls: {ca: /no/ca, cert: /no/c, key: /no/k}"),
            r"transfer\.tls\.ca: no file /no/ca \(for site A\)",
        ),
        (
            ("tls: auto", "tls: {ca: x}"),
            r"transfer\.tls: object missing required field `cert`",
        ),
        (("tls: auto", "tls: auto, connections: 0"), r"transfer\.connections: 0 is not in 1\.\.64"),
        (
            ("tls: auto", "backend: mooncake_tcp, connections: 2"),
            r"transfer\.connections: backend is mooncake_tcp; accepted with prfaas only",
        ),
        (
            ("tls: auto", "connections: 2"),
            r"transfer: give either tls: auto .*insecure: true.*neither is given",
        ),
        (("tls: auto", "tls: auto, insecure: true"), "transfer: .*both are given"),
        (("tls: auto", "tls: please"), r"transfer\.tls: invalid enum value 'please'; accepted: auto"),
        (
            ("tls: auto", "tls: auto, backend: mooncake_tcp"),
            r"transfer\.tls: backend is mooncake_tcp; accepted with prfaas only",
        ),
        (
            ("tls: auto", "backend: mooncake_tcp"),
            r"transfer\.insecure: backend mooncake_tcp has no encryption; accepted with it: true",
        ),
        (
            ("  - {name: B", "  - {name: a, workers: [{name: c-p, role: prefill}]}\n  - {name: B"),
            r"sites\[1\]\.name: 'a' and 'A' are the same to a certificate",
        ),
        (
            ("links:", "engine: {page_size: 64}\nengine: {page_size: 1}\nlinks:"),
            "the key 'engine' is repeated",
        ),
        (("gbps: 10", "gbps: fast"), r"links\[0\]\.gbps: expected `float`, got `str`"),
        (("gbps: 10", "gbps: 0"), r"links\[0\]\.gbps: 0 is not in"),
        (("src: A", "src: X"), r"links\[0\]\.src: no site is named 'X'; sites: A, B"),
        (("name: b-p", "name: a-p"), r"sites\[1\]\.workers\[0\]\.name: 'a-p' is also sites\[0\]"),
        (("name: B, ", "name: A, "), r"sites\[1\]\.name: 'A' is also sites\[0\]\.name"),
        (("name: a-p", "name: 'a p'"), r"sites\[0\]\.workers\[0\]\.name: 'a p' is not a name"),
        (("role: decode", "role: prefill"), "no worker has role decode"),
        (("tiny:gdn", "tiny:huge"), "model.path: 'huge' is not a tiny family; accepted: tiny:dense"),
        (("tiny:gdn", "/nowhere"), "model.path: /nowhere has no config.json"),
        (("model:", "modell:"), "object contains unknown field `modell`|missing required field `model`"),
        (("links:", "engine: {page_size: 0}\nlinks:"), "engine.page_size: 0 is not in 1..65536"),
        (
            ("links:", "engine: {chunked_prefill_size: 100}\nlinks:"),
            "engine.chunked_prefill_size: 100 is not a multiple of page_size 64",
        ),
        (("links:", "router: {site: C}\nlinks:"), "router.site: no site is named 'C'"),
        (("links:", "router: {site: A}\nlinks:"), "router.site: site 'A' has no decode worker"),
        (("links:", "router: {port: 70000}\nlinks:"), "router.port: 70000 is not a port"),
        (
            ("links:", "router: {port: 9000}\ncache_service: {port: 9000}\nlinks:"),
            "cache_service.port: 127.0.0.1:9000 is also router.port",
        ),
        (("tls: auto", "backend: pigeon"), "transfer.backend: invalid enum value 'pigeon'"),
        (
            ("links:", "routing: {policy: fastest}\nlinks:"),
            "accepted: prfaas, ttft, local, remote, round_robin, cache_aware",
        ),
        (
            ("links:", "routing: {policy: ttft}\nlinks:"),
            r"workers\[0\].profile: is missing; routing.policy ttft",
        ),
        (("role: prefill", "role: prefill, profile: /no/such"), r"workers\[0\].profile: no file /no/such"),
        (("links:", "routing: {margin_ratio: 2}\nlinks:"), "routing.margin_ratio: 2 is not in 0..1"),
        (("links:", "admission: {waiting: 0}\nlinks:"), "admission.waiting: 0 is not in 1.."),
        (
            ("links:", "admission: {max_wait_s: {interactive: 0, standard: 1, batch: 1}}\nlinks:"),
            "admission.max_wait_s.interactive: 0 is not in 0.001..",
        ),
        (("links:", "tune: {eager: 1}\nlinks:"), "accepted: enabled, apply, period_s"),
        (("links:", "routing: {threshold_tokens: -1}\nlinks:"), "routing.threshold_tokens: -1 is not in 0.."),
        (("links:", "links: ["), "is not valid YAML"),
    ],
)
def test_each_mistake_is_named(change: tuple[str, str], message: str) -> None:
    """The error has the path of the field and what is accepted."""
    assert change[0] in SMALL
    with pytest.raises(ConfigError, match=message):
        config.parse(SMALL.replace(*change))


@pytest.mark.parametrize("text", ["", "[]", "just text", "null"])
def test_a_file_that_is_no_mapping_is_refused(text: str) -> None:
    """An empty or scalar document says what is needed."""
    with pytest.raises(ConfigError, match="model and sites"):
        config.parse(text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """The path is in the message."""
    with pytest.raises(ConfigError, match=r"nothing\.yaml: cannot be read: No such file"):
        config.load(tmp_path / "nothing.yaml")


def test_a_taken_port_names_the_field_and_the_process() -> None:
    """A fixed port in use is refused before anything starts."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        plan = PortPlan()
        with pytest.raises(ConfigError, match=rf"router\.port: cannot listen on 127\.0\.0\.1:{port}.*pid"):
            plan.claim("router.port", "127.0.0.1", port)


def test_free_ports_are_distinct_and_released() -> None:
    """Chosen ports differ, are held against everyone, and can be listened on when their field is released."""
    plan = PortPlan()
    ports = [plan.claim("sites[0]", "127.0.0.1", 0) for _ in range(20)]
    other = plan.claim("router.port", "127.0.0.1", 0)
    assert len({*ports, other}) == 21
    with pytest.raises(ConfigError, match="cannot listen"):
        PortPlan().claim("x", "127.0.0.1", other)
    plan.release("router.")
    with socket.create_server(("127.0.0.1", other)):
        pass
    with socket.socket() as probe, pytest.raises(OSError, match="in use"):
        probe.bind(("127.0.0.1", ports[0]))
    plan.release()
    with socket.create_server(("127.0.0.1", ports[0])):
        pass


def test_a_free_port_is_none_that_the_kernel_hands_out() -> None:
    """Nobody who binds port 0 or connects out gets it before its server listens."""
    lowest, highest = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert all(not lowest <= ports_module.free_port() <= highest for _ in range(20))


def test_reserved_ports_are_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that the file gives to a process is not handed to another one that wants any."""
    spare = PortPlan()
    first, second = (spare.claim("x", "127.0.0.1", 0) for _ in range(2))
    spare.release()
    monkeypatch.setattr(ports_module, "_candidates", lambda: iter([first, second]))
    plan = PortPlan(reserved=[first])
    assert plan.claim("x", "127.0.0.1", 0) == second
    plan.release()


def test_every_worker_has_a_gpu_of_its_own() -> None:
    """By default the n-th worker has the n-th; a restricted launcher counts in what it may see."""
    text = SMALL + "engine: {device: cuda}\n"
    assert specs.visible_gpus(config.parse(SMALL), None) == {}
    assert specs.visible_gpus(config.parse(text), None) == {"a-p": "0", "b-p": "1", "b-d": "2"}
    assert specs.visible_gpus(config.parse(text), "5,6,GPU-x") == {"a-p": "5", "b-p": "6", "b-d": "GPU-x"}
    shared = text.replace("name: a-p", "gpus: [2, 3], name: a-p")
    assert specs.visible_gpus(config.parse(shared), None)["a-p"] == "2,3"
    with pytest.raises(ConfigError, match="worker b-d: GPU 2 is not visible; CUDA_VISIBLE_DEVICES is 0,1"):
        specs.visible_gpus(config.parse(text), "0,1")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"layer_types": ["linear_attention", "full_attention"]}, True),
        ({"text_config": {"layer_types": ["full_attention"]}}, False),
        ({"full_attention_interval": 4}, True),
        ({"linear_attn_config": {"kda_layers": [1]}}, True),
        ({}, False),
    ],
)
def test_linear_state_is_recognised(tmp_path: Path, content: dict[str, object], expected: bool) -> None:
    """In the three ways in which configurations speak of it."""
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert specs.has_linear_state(tmp_path) is expected


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"full_attention_interval": "x"}'])
def test_a_model_without_a_real_configuration_is_refused(tmp_path: Path, text: str) -> None:
    """The message has the field and the file."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"model\.path: .*config\.json is not a model's configuration"):
        specs.has_linear_state(tmp_path)


def test_specs_wire_the_parts_together(tmp_path: Path) -> None:
    """The generated configurations name the same ports on both sides."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"layer_types": ["linear_attention", "full_attention"]}))
    fleet = config.parse(SMALL.replace("tls: auto", "tls: auto, connections: 7"))
    plan = specs.build(fleet, model, tmp_path, specs.claim_ports(fleet, PortPlan()))
    by_name = {spec.name: spec for spec in (*plan.engines, *plan.services)}
    router = json.loads(by_name["router"].files["router.json"])
    cache = json.loads(by_name["cache-service"].files["cache_service.json"])
    assert router["index"] == cache["listen"]
    argv = dict(zip(by_name["a-p"].argv, by_name["a-p"].argv[1:], strict=False))
    worker = next(w for w in router["workers"] if w["worker_id"] == "a-p")
    assert worker["bootstrap_port"] == int(argv["--disaggregation-bootstrap-port"])
    assert worker["url"].endswith(argv["--port"])
    source = next(w for w in cache["workers"] if w["worker_id"] == "a-p")
    assert "--kv-events-config" in argv
    assert argv["--mamba-radix-cache-strategy"] == "extra_buffer"
    assert "--kv-events-config" not in by_name["b-d"].argv
    assert by_name["a-p"].env["PRFAAS_CONFIG"] == f"@{tmp_path / 'a-p.transfer.json'}"
    transfer = json.loads(by_name["a-p"].files["a-p.transfer.json"])
    assert (transfer["worker_id"], transfer["site"], transfer["connections"]) == ("a-p", "A", 7)
    streams = transfer["state_events"]
    assert [source["format"], source["events"], source["replay"]] == ["prfaas", *streams.values()]
    assert "needs_state" not in source
    assert transfer["tls"] == {
        "ca": str(tmp_path / "certificates" / "ca.pem"),
        "cert": str(tmp_path / "certificates" / "A.pem"),
        "key": str(tmp_path / "certificates" / "A.key"),
    }
    assert (transfer["peer_sites"], "insecure" in transfer) == (["B"], False)
    decode = json.loads(by_name["b-d"].files["b-d.transfer.json"])
    assert decode["peer_sites"] == ["A", "B"]
    assert "state_events" not in decode


def test_the_router_accepts_what_is_passed_on(tmp_path: Path) -> None:
    """Policy, profile, admission, long loop, ceiling and price arrive; decode has its pool as a budget."""
    (tmp_path / "config.json").write_text("{}")
    shape = "{format: 1, name: x, kv: {bytes_per_token: 1}, prefill: {fixed_s: 0, per_token_s: 1}}"
    (tmp_path / "x.yaml").write_text(shape)
    text = SMALL.replace("role: prefill", f"role: prefill, profile: {tmp_path}/x.yaml")
    text = text.replace("gbps: 10", "gbps: 10, ceiling_gbps: 8, price_per_gb: 0.02") + (
        "routing: {policy: ttft, margin_s: 0.5, balance_abs: 3}\n"
        "admission: {waiting: 7, max_wait_s: {interactive: 1, standard: 2, batch: 3}}\n"
        "tune: {enabled: true, period_s: 5}\n"
    )
    fleet = config.parse(text)
    plan = specs.build(fleet, tmp_path, tmp_path, specs.claim_ports(fleet, PortPlan()))
    (file,) = (s.files["router.json"] for s in plan.services if s.name == "router")
    found = router_config.parse(json.loads(file))
    assert (found.policy.name, found.policy.margin_s, found.policy.balance_abs) == ("ttft", 0.5, 3)
    assert (found.admission.waiting, found.admission.max_wait_s.batch) == (7, 3)
    assert (found.tune.enabled, found.tune.period_s, found.tune.min_requests) == (True, 5, 200)
    assert (found.links[0].ceiling_gbps, found.links[0].price_per_gb) == (8, 0.02)
    assert [(w.profile, w.kv_tokens) for w in found.workers] == [
        ("profile-0", 0),
        ("profile-0", 0),
        ("", fleet.engine.max_total_tokens),
    ]


def test_stock_events_are_followed_without_our_backend(tmp_path: Path) -> None:
    """Another backend's workers publish SGLang's events only; the service is told what the model needs."""
    layers = ["linear_attention", "sliding_attention", "full_attention"]
    (tmp_path / "config.json").write_text(json.dumps({"layer_types": layers, "sliding_window": 130}))
    fleet = config.parse(SMALL.replace("{tls: auto}", "{backend: mooncake_tcp, insecure: true}"))
    plan = specs.build(fleet, tmp_path, tmp_path, specs.claim_ports(fleet, PortPlan()))
    (cache,) = (json.loads(s.files["cache_service.json"]) for s in plan.services if s.name == "cache-service")
    source = next(w for w in cache["workers"] if w["worker_id"] == "a-p")
    (argv,) = (spec.argv for spec in plan.engines if spec.name == "a-p")
    events = json.loads(argv[argv.index("--kv-events-config") + 1])
    assert events["endpoint"].rpartition(":")[2] == source["events"].rpartition(":")[2]
    assert events["replay_endpoint"].rpartition(":")[2] == source["replay"].rpartition(":")[2]
    window_blocks = -(-130 // fleet.engine.page_size)
    assert (source["topic"], source["needs_state"], source["swa_window_blocks"]) == (
        "kv",
        True,
        window_blocks,
    )


def test_every_generated_worker_configuration_is_accepted(tmp_path: Path) -> None:
    """What the launcher writes is what a worker loads, encrypted or not."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    for text in (SMALL, SMALL.replace("tls: auto", "insecure: true")):
        fleet = config.parse(text)
        plan = specs.build(fleet, model, tmp_path, specs.claim_ports(fleet, PortPlan()))
        for engine in plan.engines:
            loaded = worker_config.load({"PRFAAS_CONFIG": engine.files[f"{engine.name}.transfer.json"]})
            assert loaded is not None
            assert loaded.insecure == fleet.transfer.insecure


def test_the_stock_backend_is_in_the_clear_and_ours_stays_as_it_was() -> None:
    """`prfaas demo --backend` changes a whole section that is valid again."""
    ours = config.parse(SMALL).transfer
    stock = ours.over("mooncake_tcp")
    assert (stock.backend, stock.tls, stock.insecure) == ("mooncake_tcp", None, True)
    assert ours.over("prfaas") == ours
    assert stock.over("prfaas").insecure
