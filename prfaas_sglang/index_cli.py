"""`prfaas index`: what an operator asks a running cache service.

Decides how answers look; every figure is the service's (cache_service/admin.py asks). Returns the exit
status: 1 when `check` finds a violation.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from cache_service.admin import IndexAdmin, verify
from cache_service.channels import Encryption
from cache_service.core.addresses import check_plain
from cache_service.core.blocks import block_hashes, event_namespace_seed
from cache_service.core.errors import ConfigError, RemoteProtocolError
from cache_service.core.events import BlocksStored, GroupStored
from cache_service.core.ids import BlockHash, Namespace
from cache_service.core.query import Holder

ADDRESS_VARIABLE = "PRFAAS_INDEX_ADDRESS"
_DEFAULT_ADDRESS = "127.0.0.1:7001"

ABOUT = """\
examples:
  prfaas index stats                                        # is it alive, what does it hold, which streams
  prfaas index match --text "You are a helpful" --tokenizer models/qwen3
  prfaas index match --tokens 1,2,3,4 --explain             # and why not more
  prfaas index match --hashes @hashes.txt                   # one signed 64-bit block hash a line
  prfaas index hot --top 10                                 # most used prefixes, and who holds them
  prfaas index dump > index.jsonl                           # everything, one change a line
  prfaas index check                                        # exit status 1 when something is wrong

The address is that of `listen` in the service's configuration: --address, else $PRFAAS_INDEX_ADDRESS, else
127.0.0.1:7001. Under `prfaas up` it is in the run directory, in cache_service.json. --json prints the whole
answer. Exit status: 0 done, 1 no answer or a violation, 2 wrong arguments.
"""


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands and their options."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--address", metavar="HOST:PORT", help="gRPC address of the cache service")
    common.add_argument("--timeout", type=float, default=30.0, metavar="SECONDS", help="default 30")
    common.add_argument("--json", action="store_true", help="print JSON instead of a table")
    common.add_argument("--insecure", action="store_true", help="plain TCP to an address beyond loopback")
    for name, what in (("ca", "authority"), ("cert", "our certificate"), ("key", "its key")):
        common.add_argument(f"--tls-{name}", default="", metavar="FILE", help=f"PEM: {what}; all three")
    common.add_argument("--tls-name", default="", metavar="NAME", help="name in the service's certificate")
    kinds = parser.add_subparsers(required=True, metavar="WHAT")

    def kind(name: str, what: str, ask: _Ask) -> argparse.ArgumentParser:
        made = kinds.add_parser(
            name, help=what, description=f"{what[:1].upper()}{what[1:]}.", parents=[common]
        )
        made.set_defaults(run=run, ask=ask)
        return made

    match = kind("match", "who holds how much of a prompt", _match)
    prompt = match.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--text", metavar="TEXT|@FILE", help="the prompt as the engine sees it; --tokenizer")
    prompt.add_argument("--tokens", metavar="1,2,3|@FILE", help="token ids")
    prompt.add_argument("--hashes", metavar="1,-2,3|@FILE", help="chained block hashes, first block first")
    match.add_argument("--tokenizer", type=Path, metavar="DIR|FILE", help="model folder, or tokenizer.json")
    match.add_argument("--salt", default="", metavar="SALT", help="the tenant's cache_salt")
    match.add_argument("--explain", action="store_true", help="per holder: tiers, groups, what is missing")
    hot = kind("hot", "the most used prefixes and who holds them", _hot)
    hot.add_argument("--top", type=int, default=20, metavar="N", help="1 to 1000; default 20")
    kind("dump", "everything that the service's workers hold, one change a line (always JSON)", _dump)
    kind("check", "hold the index, and a fresh dump of it, against its invariants and answers", _check)
    kind("stats", "sizes, and how each event stream is doing", _stats)


def run(arguments: argparse.Namespace) -> int:
    """Ask and print; return the exit status. Raises PrfaasError."""
    return asyncio.run(_run(arguments))


_Ask = Callable[[IndexAdmin, argparse.Namespace], Awaitable[int]]


async def _run(arguments: argparse.Namespace) -> int:
    address = arguments.address or os.environ.get(ADDRESS_VARIABLE) or _DEFAULT_ADDRESS
    encryption = None
    if arguments.tls_ca or arguments.tls_cert or arguments.tls_key:
        encryption = Encryption(arguments.tls_ca, arguments.tls_cert, arguments.tls_key, arguments.tls_name)
    check_plain("--address", address, tls=encryption is not None, insecure=arguments.insecure)
    if not 0 < arguments.timeout <= 3600:
        raise ConfigError(f"--timeout: {arguments.timeout:g} is not above 0 and at most 3600 seconds")
    admin = IndexAdmin(address, timeout_s=arguments.timeout, encryption=encryption)
    ask: _Ask = arguments.ask
    try:
        return await ask(admin, arguments)
    finally:
        await admin.close()


async def _match(admin: IndexAdmin, arguments: argparse.Namespace) -> int:
    namespace = (await admin.stats()).namespace
    hashes, total = _prompt(arguments, namespace)
    if not hashes:
        raise ConfigError(
            f"the prompt has {total} tokens, less than one page of {namespace.page_size}: nothing can match"
        )
    if arguments.explain:
        explained = await admin.explain(namespace, hashes, total)
        rows = [
            (
                *_holder(one.holder),
                one.state.name.lower() if one.state else "replicated",
                "yes" if one.offered else "no",
                f"{one.age_s:.1f}" if one.age_s >= 0 else "-",
                "; ".join(
                    f"{group.group or 'full'} {group.present} to {group.deepest * namespace.page_size}"
                    f" ({', '.join(f'{tier.name.lower()} {n}' for tier, n in group.tiers.items())})"
                    for group in one.report.groups
                ),
                one.report.missing or "-",
            )
            for one in explained.holders
        ]
        head = (*_HOLDER, "stream", "offered", "age_s", "groups", "missing")
        revision = explained.revision
    else:
        answer = await admin.match(namespace, hashes, total)
        rows = [_holder(holder) for holder in answer.holders]
        head, revision = _HOLDER, answer.revision
    title = f"{len(hashes)} blocks of {namespace.page_size} tokens, {total} tokens, revision {revision}"
    _show(arguments, title, head, rows, empty="nobody holds its first block")
    return 0


async def _hot(admin: IndexAdmin, arguments: argparse.Namespace) -> int:
    if not 1 <= arguments.top <= 1000:
        raise ConfigError(f"--top: {arguments.top} is not in 1..1000")
    prefixes, observed = await admin.hot((await admin.stats()).namespace, arguments.top)
    rows = [
        (
            one.hot.last,
            one.tokens,
            one.hot.uses,
            one.hot.error,
            ", ".join(f"{holder.worker_id}/{holder.dp_rank}" for holder in one.holders) or "-",
        )
        for one in prefixes
    ]
    head = ("last_block", "tokens", "uses", "at_most_too_high_by", "holders")
    _show(arguments, f"{observed} matches counted", head, rows, empty="no match has found anything yet")
    return 0


async def _dump(admin: IndexAdmin, arguments: argparse.Namespace) -> int:
    namespace = (await admin.stats()).namespace
    async with aclosing(admin.dump(namespace)) as pages:  # type: ignore[type-var]
        async for page in pages:
            for source, event in page.changes:
                if not isinstance(event, BlocksStored | GroupStored):
                    raise RemoteProtocolError("dump: has a change that is none of a dump")
                line = {
                    "worker_id": source.worker_id,
                    "dp_rank": source.dp_rank,
                    "group": event.group if isinstance(event, GroupStored) else "full",
                    "tier": event.tier.name.lower(),
                    "parent": event.parent if isinstance(event, BlocksStored) else None,
                    "hashes": list(event.hashes),
                }
                print(json.dumps(line))
    return 0


async def _check(admin: IndexAdmin, arguments: argparse.Namespace) -> int:
    violations, report, compared = await verify(admin, (await admin.stats()).namespace)
    if arguments.json:
        print(
            json.dumps(
                {
                    "violations": violations,
                    "revision": report.revision,
                    "blocks": report.blocks,
                    "entries": report.entries,
                    "answers_compared": compared,
                }
            )
        )
    else:
        for violation in violations:
            print(f"VIOLATION  {violation}")
        verdict = f"{len(violations)} violations" if violations else "sound"
        print(
            f"{verdict}: {report.blocks} blocks, {report.entries} entries at revision {report.revision}; "
            f"{compared} answers compared with a fresh dump"
        )
    return 1 if violations else 0


async def _stats(admin: IndexAdmin, arguments: argparse.Namespace) -> int:
    stats = await admin.stats()
    rows = [
        (
            f"{one.source.worker_id}/{one.source.dp_rank}",
            one.site,
            one.state.name.lower(),
            one.entries,
            one.next_seq,
            "yes" if one.truncated else "no",
            ", ".join(f"{kind} {number}" for kind, number in sorted(one.counts.items())) or "-",
        )
        for one in stats.sources
    ]
    head = ("source", "site", "state", "entries", "next_seq", "truncated", "counts")
    counts = stats.counts
    title = (
        f"site {stats.site}, model {stats.namespace.model}, page {stats.namespace.page_size}: "
        f"{counts.blocks} blocks, {counts.entries} entries, {counts.group_entries} of states and windows, "
        f"{counts.orphans} orphans, revision {stats.revision}, {stats.watchers} watchers"
    )
    if stats.behind:
        state = "starting" if stats.starting else "ready, answers may be stale"
        title += f"; {state}: has not caught up with {', '.join(stats.behind)}"
    _show(arguments, title, head, rows, empty="no event stream is configured")
    return 0


# -- what was asked --------------------------------------------------------------------------------------


def _prompt(arguments: argparse.Namespace, namespace: Namespace) -> tuple[list[BlockHash], int]:
    """Return the prompt's block hashes and its length in tokens. Raises ConfigError naming the option."""
    if arguments.hashes is not None:
        hashes = [BlockHash(value) for value in _numbers("--hashes", arguments.hashes)]
        for value in hashes:
            if not -(1 << 63) <= value < 1 << 63:
                raise ConfigError(f"--hashes: {value} is not a signed 64-bit hash")
        return hashes, len(hashes) * namespace.page_size + 1
    if arguments.tokens is not None:
        tokens = _numbers("--tokens", arguments.tokens)
    else:
        tokens = _tokenize(_text("--text", arguments.text), arguments.tokenizer)
    seed = event_namespace_seed(arguments.salt or None)
    return block_hashes(tokens, namespace.page_size, seed=seed), len(tokens)


def _tokenize(text: str, where: Path | None) -> Sequence[int]:
    if where is None:
        raise ConfigError("--tokenizer: is missing; --text needs the model's folder or its tokenizer.json")
    from tokenizers import Tokenizer

    path = where / "tokenizer.json" if where.is_dir() else where
    if not path.is_file():
        raise ConfigError(f"--tokenizer: {path} is not there; give the model's folder or its tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise ConfigError(f"--tokenizer: {path} cannot be used: {error}") from error
    ids: list[int] = tokenizer.encode(text).ids
    return ids


def _text(option: str, value: str) -> str:
    if not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option}: {value[1:]} cannot be read: {error}") from error


def _numbers(option: str, value: str) -> list[int]:
    words = _text(option, value).replace(",", " ").split()
    try:
        return [int(word) for word in words]
    except ValueError as error:
        raise ConfigError(f"{option}: {error}; give integers separated by commas or white space") from error


# -- what is shown ---------------------------------------------------------------------------------------

_HOLDER = ("worker", "site", "matched_tokens", "usable_tokens")


def _holder(holder: Holder) -> tuple[Any, ...]:
    return (
        f"{holder.worker_id}/{holder.dp_rank}",
        holder.site,
        holder.matched_tokens,
        holder.usable_tokens,
    )


def _show(
    arguments: argparse.Namespace, title: str, head: Sequence[str], rows: Sequence[Sequence[Any]], empty: str
) -> None:
    if arguments.json:
        print(json.dumps({"about": title, "rows": [dict(zip(head, row, strict=True)) for row in rows]}))
        return
    print(title)
    if not rows:
        print(empty)
        return
    cells = [list(head), *([str(value) for value in row] for row in rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(head))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
