"""The `prfaas` command: parses arguments, calls the part that does the work, turns errors into exit statuses.

Exit status: 0 done, 1 something failed at run time, 2 wrong arguments or configuration, 130 interrupted.
Import-light: each subcommand imports what it needs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cache_service.core.errors import ConfigError, PrfaasError
from prfaas_sglang import __version__

DESCRIPTION = """\
Prefill-as-a-Service for SGLang: long prompts are prefilled in a remote, compute-dense site and decoded near
the user; the KV crosses ordinary Ethernet.
"""

UP_EXAMPLE = """\
example:
  prfaas up -f fleet.yaml
  curl http://127.0.0.1:PORT/v1/models        # the port is printed when the fleet is ready

the smallest fleet file:
  model: {path: tiny:gdn}
  transfer: {tls: auto}
  sites:
    - {name: A, workers: [{name: a-prefill, role: prefill}]}
    - {name: B, workers: [{name: b-prefill, role: prefill}, {name: b-decode, role: decode}]}
  links:
    - {src: A, dst: B, gbps: 10}

Every key with its default: prfaas_sglang/fleet/config.py; a commented file: `prfaas up --print-example`.
Ctrl-C stops everything that was started.
"""

DEMO_EXAMPLE = """\
example:
  prfaas demo                              # two sites on this machine, tiny hybrid model, about a minute
  prfaas demo --backend mooncake_tcp       # the same over SGLang's stock TCP backend
  prfaas demo --json result.json

Exit status 0 only when every output equals that of a single SGLang server, token for token, and remote and
local routes and prefix hits in both sites were seen.
"""


CERTS_EXAMPLE = """\
example:
  prfaas certs pki --sites A,B
  scp pki/ca.pem pki/A.pem pki/A.key worker.of.site.A:/etc/prfaas/      # and B's files to B
  prfaas certs pki --sites C               # later: one more site, signed by the same authority

writes, each only when it is not there yet:
  ca.pem             the authority; every worker needs it
  ca.key             signs new sites; keep it away from the workers
  SITE.pem SITE.key  certificate and key of a site's workers; the key goes nowhere else

then in the fleet file:     transfer: {tls: {ca: pki/ca.pem, cert: 'pki/{site}.pem', key: 'pki/{site}.key'}}
or in PRFAAS_CONFIG:        "tls": {"ca": "/etc/prfaas/ca.pem", "cert": "...", "key": "..."}

TLS 1.3, ECDSA P-256. A worker reads its files when it starts: replace a certificate before it expires, then
restart the site's workers. On one machine `tls: auto` in the fleet file does all of this at each start.
"""

PLAN_EXAMPLE = """\
example:
  prfaas plan --print-example > plan.yaml   # sites, chips, counts, links, prices, workload
  prfaas plan -f plan.yaml
  prfaas plan -f plan.yaml --plots plots --json plan.json

Says whether a second site pays and why, the best threshold and prefill/decode ratio, utilisation of every
stage, cost per million tokens with egress, and what other bandwidths, hit ratios and prices would change.
Model output, explained in docs/planning.md.
"""

SIMULATE_EXAMPLE = """\
example:
  prfaas simulate scenario.yaml
  prfaas simulate scenario.yaml --policy prfaas --seed 3 --json result.json --plot result.png
  prfaas simulate scenario.yaml --trace conversation_trace.jsonl

the smallest scenario:
  sites:
    - {name: A, prefill: 4, profile: h200}
    - {name: B, prefill: 3, decode: 5, profile: h20}
  links:
    - {src: A, dst: B, gbps: 100}
  workload: {kind: poisson, rate: 2.7, requests: 4000}
  policy: {name: ttft}

Simulated, in virtual time, repeatable by its seed; what is simulated and what is not: docs/simulation.md.
"""

PROFILE_EXAMPLE = """\
example:
  prfaas profile --url http://prefill:30000 --telemetry http://prefill:9400 --decode http://decode:30000 \\
      --out gdn-h200.yaml
  prfaas profile ... --tokens 512,2048,8192,32768 --repeats 5

KV sizes come from the worker's own pools, the prefill curve from prompts of several lengths, sent to both
workers with their caches flushed before each. They should serve nothing else meanwhile; their caches go.
"""


INDEX_HELP = "ask a running cache service what it holds, and check it"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser(words[:1]).parse_args(words)
    try:
        return int(arguments.run(arguments))
    except ConfigError as error:
        print(f"prfaas: {error}", file=sys.stderr)
        return 2
    except PrfaasError as error:
        print(f"prfaas: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prfaas: interrupted", file=sys.stderr)
        return 130


def _parser(command: Sequence[str] = ()) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prfaas", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"prfaas-sglang {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    up = _command(commands, "up", "start a fleet from a file and keep it running", UP_EXAMPLE)
    up.add_argument("-f", "--file", type=Path, metavar="FILE", help="the fleet file (YAML)")
    up.add_argument("--run-dir", type=Path, metavar="DIR", help="logs go here (default: runs/DATE-TIME)")
    up.add_argument("--check", action="store_true", help="only check the file")
    up.add_argument("--print-example", action="store_true", help="print a commented fleet file and exit")
    up.set_defaults(run=_up)

    demo = _command(commands, "demo", "watch prompts cross between two sites on this machine", DEMO_EXAMPLE)
    demo.add_argument(
        "-f", "--file", "--config", type=Path, metavar="FILE", help="another fleet file than the demo's"
    )
    demo.add_argument("--backend", choices=["prfaas", "mooncake_tcp"], help="how KV moves")
    demo.add_argument("--run-dir", type=Path, metavar="DIR", help="logs go here (default: runs/DATE-TIME)")
    demo.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    demo.add_argument("--keep", action="store_true", help="keep the fleet running afterwards, until Ctrl-C")
    demo.set_defaults(run=_demo)

    doctor = _command(
        commands,
        "doctor",
        "check this machine and say what is missing",
        "example:\n  prfaas doctor\n\nExit status 1 when something needed is missing.\n",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table")
    doctor.set_defaults(run=_doctor)

    certs = _command(commands, "certs", "make the certificates that encrypt KV between sites", CERTS_EXAMPLE)
    certs.add_argument("folder", type=Path, metavar="DIR", help="where the PEM files go")
    certs.add_argument(
        "--sites", required=True, metavar="A,B", help="names of the sites, as in the fleet file"
    )
    certs.add_argument("--days", type=int, default=365, metavar="N", help="validity, 1 to 3650; default 365")
    certs.set_defaults(run=_certs)

    plan = _command(commands, "plan", "is a second site worth it, and how to run it", PLAN_EXAMPLE)
    plan.add_argument("-f", "--file", type=Path, metavar="FILE", help="the plan file (YAML)")
    plan.add_argument("--json", type=Path, metavar="FILE", help="also write the plan here")
    plan.add_argument("--plots", type=Path, metavar="DIR", help="also draw plots (needs matplotlib)")
    plan.add_argument("--print-example", action="store_true", help="print a commented plan file and exit")
    plan.set_defaults(run=_plan)

    _simulate_arguments(commands)

    profile = _command(commands, "profile", "measure what prompts cost on a live worker", PROFILE_EXAMPLE)
    profile.add_argument(
        "--url", required=True, metavar="URL", help="of the prefill worker, as SGLang serves"
    )
    profile.add_argument("--telemetry", required=True, metavar="URL", help="of its telemetry_listen")
    profile.add_argument(
        "--decode", required=True, metavar="URL", help="of a decode worker of the same model"
    )
    profile.add_argument(
        "--bootstrap",
        default="",
        metavar="HOST:PORT",
        help="where decode reaches prefill; default: the host of --url and the port that the worker tells",
    )
    profile.add_argument("--out", required=True, type=Path, metavar="FILE", help="the profile (YAML)")
    profile.add_argument("--name", default="", metavar="NAME", help="model and chip; default: as served")
    profile.add_argument(
        "--tokens", default="", metavar="A,B,...", help="prompt lengths; default: 8 up to the worker's limit"
    )
    profile.add_argument("--repeats", type=int, default=3, metavar="N", help="of each length; default 3")
    profile.add_argument(
        "--step-ms",
        type=float,
        default=0.0,
        metavar="MS",
        help="also measure the decode rate: the largest batch whose steps stay within this",
    )
    profile.set_defaults(run=_profile)
    _index(commands, used="index" in command)

    models = _command(commands, "models", "make checkpoints", "example:\n  prfaas models tiny --help\n")
    kinds = models.add_subparsers(required=True, metavar="KIND")
    tiny = _command(
        kinds,
        "tiny",
        "a tiny random checkpoint with a tokenizer, no network",
        "example:\n  prfaas models tiny --family gdn --out /tmp/tiny-gdn\n\n"
        "families: dense (Qwen3), gdn (Qwen3.5: gated delta net + full attention),\n"
        "gdn-moe (Qwen3-Next), swa (Gemma 3: sliding window). The same seed gives the same bytes.\n",
    )
    tiny.add_argument("--family", required=True, metavar="{dense,gdn,gdn-moe,swa}")
    tiny.add_argument("--out", required=True, type=Path, metavar="DIR")
    tiny.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    tiny.set_defaults(run=_tiny)
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, what: str, example: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=what,
        description=what[:1].upper() + what[1:] + ".",
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _index(commands: argparse._SubParsersAction[argparse.ArgumentParser], *, used: bool) -> None:
    """Add `index`; its own module, and gRPC, are loaded only when it is used."""
    if not used:
        commands.add_parser("index", help=INDEX_HELP)
        return
    from prfaas_sglang import index_cli

    index_cli.add_to(_command(commands, "index", INDEX_HELP, index_cli.ABOUT))


def _simulate_arguments(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    simulate = _command(
        commands, "simulate", "simulate a fleet under the router's own decisions", SIMULATE_EXAMPLE
    )
    simulate.add_argument("config", type=Path, metavar="CONFIG", help="the scenario (YAML)")
    simulate.add_argument("--trace", type=Path, metavar="PATH", help="use this trace (Mooncake's JSONL)")
    simulate.add_argument("--policy", metavar="NAME", help="use this rule (docs/routing.md)")
    simulate.add_argument("--seed", type=int, metavar="N", help="use this seed")
    simulate.add_argument("--json", type=Path, metavar="OUT", help="write the scenario and all figures here")
    simulate.add_argument("--plot", type=Path, metavar="OUT", help="write a picture here (needs matplotlib)")
    simulate.set_defaults(run=_simulate)


def _up(arguments: argparse.Namespace) -> int:
    from prfaas_sglang.fleet import up

    if arguments.print_example:
        print(up.example(), end="")
        return 0
    if arguments.file is None:
        raise ConfigError("-f FILE is missing; `prfaas up --print-example` prints a fleet file")
    return up.run(arguments.file, arguments.run_dir, check_only=arguments.check)


def _demo(arguments: argparse.Namespace) -> int:
    from prfaas_sglang.fleet import demo

    return demo.run(
        file=arguments.file,
        backend=arguments.backend,
        run_dir=arguments.run_dir,
        json_file=arguments.json,
        keep=arguments.keep,
    )


def _doctor(arguments: argparse.Namespace) -> int:
    from prfaas_sglang.fleet import doctor

    return doctor.run(as_json=arguments.json)


def _certs(arguments: argparse.Namespace) -> int:
    from prfaas_sglang.fleet import certs

    sites = [name.strip() for name in arguments.sites.split(",") if name.strip()]
    certs.make(arguments.folder, sites, days=arguments.days)
    for site in sites:
        files = certs.files_of(arguments.folder, site)
        print(f"site {site}: {files.ca} {files.cert} {files.key}")
    print(f"keep {arguments.folder / 'ca.key'} away from the workers: it signs new sites")
    return 0


def _simulate(arguments: argparse.Namespace) -> int:
    from router.simulate import cli

    return cli.run(
        arguments.config,
        sys.stdout,
        trace=arguments.trace,
        policy=arguments.policy,
        seed=arguments.seed,
        json_file=arguments.json,
        plot_file=arguments.plot,
    )


def _plan(arguments: argparse.Namespace) -> int:
    from router.plan import command

    if arguments.print_example:
        print(command.EXAMPLE.read_text(encoding="utf-8"), end="")
        return 0
    if arguments.file is None:
        raise ConfigError("-f FILE is missing; `prfaas plan --print-example` prints a plan file")
    return command.run(arguments.file, json_file=arguments.json, plot_folder=arguments.plots)


def _profile(arguments: argparse.Namespace) -> int:
    from router.plan import measure

    return measure.run(
        measure.Options(
            url=arguments.url.rstrip("/"),
            telemetry_url=arguments.telemetry.rstrip("/"),
            decode_url=arguments.decode.rstrip("/"),
            bootstrap=arguments.bootstrap,
            out=arguments.out,
            name=arguments.name,
            tokens=measure.lengths(arguments.tokens),
            repeats=arguments.repeats,
            step_s=arguments.step_ms / 1e3,
        )
    )


def _tiny(arguments: argparse.Namespace) -> int:
    from prfaas_sglang.cpu import models

    try:
        path = models.build(arguments.family, arguments.out, seed=arguments.seed)
    except OSError as error:
        raise ConfigError(f"--out: cannot write {arguments.out}: {error.strerror}") from error
    print(path)
    return 0
