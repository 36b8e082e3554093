"""The fleet file: the smallest one works, and each mistake is named with its path and what is accepted."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cache_service.core.errors import ConfigError
from prfaas_sglang.cpu import models
from prfaas_sglang.fleet import config, specs, up
from prfaas_sglang.fleet.ports import PortPlan

SMALL = """
model: {path: tiny:gdn}
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


def test_the_example_is_valid_and_says_so_itself() -> None:
    """`prfaas up --print-example` prints a file that is accepted."""
    fleet = config.parse(up.example())
    assert {site.name for site in fleet.sites} == {"A", "B"}


def test_tiny_families_are_those_of_the_builder() -> None:
    """The list in the (import-light) fleet file and the builder's agree."""
    assert tuple(models.FAMILIES) == config.TINY_FAMILIES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("gbps: 10", "gbps: 10, colour: red"), r"links\[0\].*unknown field `colour`"),
        (("role: decode", "role: boss"), r"sites\[1\]\.workers\[1\]\.role: invalid enum value 'boss'"),
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
        (("links:", "transfer: {backend: pigeon}\nlinks:"), "transfer.backend: invalid enum value 'pigeon'"),
        (("links:", "routing: {threshold_tokens: -1}\nlinks:"), "routing.threshold_tokens: -1 is below 0"),
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
    """Chosen ports differ while they are held, and can be listened on afterwards."""
    plan = PortPlan()
    ports = [plan.claim("x", "127.0.0.1", 0) for _ in range(20)]
    assert len(set(ports)) == 20
    plan.release()
    with socket.create_server(("127.0.0.1", ports[0])):
        pass


def test_specs_wire_the_parts_together(tmp_path: Path) -> None:
    """The generated configurations name the same ports on both sides."""
    import json

    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"layer_types": ["linear_attention", "full_attention"]}))
    plan = specs.build(config.parse(SMALL), model, tmp_path, PortPlan())
    by_name = {spec.name: spec for spec in (*plan.engines, *plan.services)}
    router = json.loads(by_name["router"].files["router.json"])
    cache = json.loads(by_name["cache-service"].files["cache_service.json"])
    assert router["index"] == cache["listen"]
    argv = dict(zip(by_name["a-p"].argv, by_name["a-p"].argv[1:], strict=False))
    worker = next(w for w in router["workers"] if w["worker_id"] == "a-p")
    assert worker["bootstrap_port"] == int(argv["--disaggregation-bootstrap-port"])
    assert worker["url"].endswith(argv["--port"])
    events = json.loads(argv["--kv-events-config"])
    source = next(w for w in cache["workers"] if w["worker_id"] == "a-p")
    assert events["endpoint"].rpartition(":")[2] == source["events"].rpartition(":")[2]
    assert argv["--mamba-radix-cache-strategy"] == "extra_buffer"
    assert "--kv-events-config" not in by_name["b-d"].argv
    assert by_name["a-p"].env["PRFAAS_CONFIG"] == f"@{tmp_path / 'a-p.transfer.json'}"
