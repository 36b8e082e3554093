"""Command line of the WAN emulator, for people: a link that stays until it is taken down.

python -m tests.wan up --profile continental          sides a = 10.77.0.1 and b = 10.77.0.2
python -m tests.wan exec b -- iperf3 -s
python -m tests.wan exec a -- iperf3 -c 10.77.0.2
python -m tests.wan set a2b rate=100mbit loss=1%      while it runs
python -m tests.wan set both up=0                     a partition; up=1 ends it
python -m tests.wan stats
python -m tests.wan down
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from cache_service.core.errors import ConfigError
from tests.wan import teardown
from tests.wan.link import SIDES, WAYS, Wan, missing, running
from tests.wan.namespaces import command_in
from tests.wan.profiles import PROFILES, profile
from tests.wan.settings import SHORT, parse

NAME = "lab"
KEYS = f"keys: {', '.join(SHORT)}; units: bit kbit mbit gbit, s ms us, b kb mb kib mib, %"


def _settings(words: Sequence[str]) -> dict[str, float]:
    return dict(parse(word) for word in words)


def _up(options: argparse.Namespace) -> None:
    chosen = profile(options.profile).with_(**_settings(options.settings))
    names = tuple(options.namespaces.split(",")) if options.namespaces else None
    if names is not None and len(names) != 2:
        raise ConfigError("--namespaces: two names with a comma between, as in site1,site2")
    link = Wan(
        chosen, name=options.name, namespaces=names, subnet=options.subnet, ipv6=options.ipv6, detached=True
    ).up()
    for side in SIDES:
        print(f"{side}: namespace {link.namespaces[side]}, address {link.address(side)}")


def _set(options: argparse.Namespace) -> None:
    Wan.attach(options.name).set(options.way, **_settings(options.settings))


def _stats(options: argparse.Namespace) -> None:
    link = Wan.attach(options.name)
    stats = link.stats()
    print(json.dumps({**asdict(stats), "reliable": stats.reliable}, indent=1))


def _exec(options: argparse.Namespace) -> None:
    link = Wan.attach(options.name)
    argv = command_in(link.namespaces[options.side], options.command)
    os.execvp(argv[0], argv)


def _down(options: argparse.Namespace) -> None:
    for name in running() if options.all else [options.name]:
        Wan.attach(name).down()


def _list(options: argparse.Namespace) -> None:
    for name in running():
        record = teardown.read_record(teardown.STATE / name) or {}
        print(f"{name}: {record.get('profile')}, namespaces {', '.join(record.get('sides', ()))}")


def _profiles(options: argparse.Namespace) -> None:
    for name, one in PROFILES.items():
        print(f"{name:17}{one.about}")


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(
        "python -m tests.wan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="what", required=True)

    def add(name: str, run: object, about: str, epilog: str | None = None) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=about, epilog=epilog)
        command.set_defaults(run=run)
        return command

    def named(command: argparse.ArgumentParser) -> None:
        command.add_argument("--name", default=NAME, help="of the link (default: %(default)s)")

    up = add("up", _up, "make a link between two new namespaces", KEYS)
    named(up)
    up.add_argument("--profile", default="continental", help=f"one of {', '.join(PROFILES)}")
    up.add_argument("--namespaces", metavar="A,B", help="use these; those that exist are joined, not removed")
    up.add_argument("--subnet", default="10.77.0", help="first three numbers of the addresses")
    up.add_argument("--ipv6", action="store_true", help="IPv6 addresses too")
    up.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="both directions, over the profile's")
    change = add("set", _set, "change a running link", KEYS)
    named(change)
    change.add_argument("way", choices=WAYS)
    change.add_argument("settings", nargs="+", metavar="KEY=VALUE")
    named(add("stats", _stats, "counters and settings as JSON; `reliable` says whether to believe them"))
    run = add("exec", _exec, "run a command on one side")
    named(run)
    run.add_argument("side", choices=SIDES)
    run.add_argument("command", nargs="+", help="after --")
    down = add("down", _down, "remove a link, its namespaces and what runs in them")
    named(down)
    down.add_argument("--all", action="store_true", help="every link of this machine, test runs' included")
    add("list", _list, "show the running links")
    add("profiles", _profiles, "show the profiles")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = parser().parse_args(argv)
    reason = missing()
    if reason and options.what != "profiles":
        print(reason, file=sys.stderr)
        return 2
    try:
        options.run(options)
    except (ConfigError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
