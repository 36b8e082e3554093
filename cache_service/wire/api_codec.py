"""Between the gRPC messages and the core's values: all but Match and Stats (wire/codec.py).

Decides what a message means and the bounds of its fields; a message that cannot be meant raises
RemoteProtocolError naming the field.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cache_service.core.errors import RemoteProtocolError
from cache_service.core.events import (
    AllCleared,
    BlocksRemoved,
    BlocksStored,
    Event,
    Group,
    GroupRemoved,
    GroupStored,
    Tier,
)
from cache_service.core.explain import GroupReport, HolderReport
from cache_service.core.history import Change
from cache_service.core.hot import HotPrefix
from cache_service.core.ids import BlockHash, Namespace, SourceId, WorkerId
from cache_service.core.query import MAX_HASHES, Holder, MatchResult, Query
from cache_service.wire import cache_pb2 as pb
from cache_service.wire.codec import (
    SourceState,
    decode_holder,
    decode_query,
    decode_result,
    encode_holder,
    encode_namespace,
    encode_query,
    encode_result,
    read_namespace,
)

MAX_QUERIES = 256
MAX_TOP = 1000
PAGE_BLOCKS = range(64, 65536 + 1)
_DEFAULT_TOP, _DEFAULT_PAGE_BLOCKS = 20, 16384
_GROUPS: dict[Group | None, pb.Group] = {
    None: pb.GROUP_UNSPECIFIED,
    Group.STATE: pb.GROUP_STATE,
    Group.SWA: pb.GROUP_SWA,
}
_OF_GROUP = {value: group for group, value in _GROUPS.items()}


@dataclass(frozen=True, slots=True)
class Explained:
    """One holder in an Explain answer; the report in blocks, `holder` in tokens; `state` None: replicated."""

    holder: Holder
    report: HolderReport
    state: SourceState | None
    age_s: float
    offered: bool


@dataclass(frozen=True, slots=True)
class Explanation:
    """An Explain answer."""

    holders: tuple[Explained, ...]
    query_blocks: int
    limit_tokens: int
    revision: int


@dataclass(frozen=True, slots=True)
class HotHeld:
    """A hot prefix, its length in tokens, and who holds it."""

    hot: HotPrefix
    tokens: int
    holders: tuple[Holder, ...]


@dataclass(frozen=True, slots=True)
class Changes:
    """A page of a dump or an event of a watch: changes, and where they lead.

    `last` and `entries` are a dump page's.
    """

    life: int
    revision: int
    changes: tuple[Change, ...]
    last: bool = False
    entries: int = 0


@dataclass(frozen=True, slots=True)
class CheckReport:
    """A Check answer; sound without violations."""

    violations: tuple[str, ...]
    revision: int
    blocks: int
    entries: int
    seconds: float


def encode_batch(queries: Iterable[tuple[Namespace, Sequence[BlockHash], int]]) -> pb.MatchBatchRequest:
    """Build a MatchBatchRequest; raises LocalProtocolError for a value that does not fit its field."""
    return pb.MatchBatchRequest(queries=[encode_query(*query) for query in queries])


def decode_batch(message: pb.MatchBatchRequest) -> list[Query]:
    """Read a MatchBatchRequest; raises RemoteProtocolError naming queries[i] and its field."""
    if len(message.queries) > MAX_QUERIES:
        raise RemoteProtocolError(f"queries: {len(message.queries)}, at most {MAX_QUERIES} in a call")
    hashes = sum(len(query.hashes) for query in message.queries)
    if hashes > MAX_HASHES:
        raise RemoteProtocolError(f"queries: {hashes} blocks, at most {MAX_HASHES} in a call")
    queries = []
    for position, query in enumerate(message.queries):
        try:
            queries.append(decode_query(query))
        except RemoteProtocolError as error:
            raise RemoteProtocolError(f"queries[{position}].{error}") from error
    return queries


def encode_batch_result(
    answers: Iterable[Sequence[Holder]], revision: int, *, starting: bool = False
) -> pb.MatchBatchResponse:
    """Build a MatchBatchResponse."""
    return pb.MatchBatchResponse(
        answers=[encode_result(holders, revision, starting=starting) for holders in answers]
    )


def decode_batch_result(message: pb.MatchBatchResponse, queries: int) -> list[MatchResult]:
    """Read a MatchBatchResponse; raises RemoteProtocolError when it has not `queries` answers."""
    if len(message.answers) != queries:
        raise RemoteProtocolError(f"answers: {len(message.answers)} to {queries} queries")
    return [decode_result(answer) for answer in message.answers]


def encode_explanation(explanation: Explanation, page_size: int) -> pb.ExplainResponse:
    """Build an ExplainResponse."""
    return pb.ExplainResponse(
        query_blocks=explanation.query_blocks,
        limit_tokens=explanation.limit_tokens,
        revision=explanation.revision,
        holders=[
            pb.HolderReport(
                holder=encode_holder(one.holder),
                source_state=one.state.value if one.state else pb.SOURCE_STATE_UNSPECIFIED,
                age_s=one.age_s,
                offered=one.offered,
                missing=one.report.missing,
                groups=[
                    pb.GroupReport(
                        group=_GROUPS[group.group],
                        present_blocks=group.present,
                        deepest_tokens=group.deepest * page_size,
                        tier_blocks={tier.name.lower(): number for tier, number in group.tiers.items()},
                    )
                    for group in one.report.groups
                ],
            )
            for one in explanation.holders
        ],
    )


def decode_explanation(message: pb.ExplainResponse, page_size: int) -> Explanation:
    """Read an ExplainResponse; raises RemoteProtocolError for a group, tier or state we do not know."""
    holders = []
    try:
        for one in message.holders:
            groups = tuple(
                GroupReport(
                    _OF_GROUP[group.group],
                    group.present_blocks,
                    group.deepest_tokens // page_size,
                    {Tier[tier.upper()]: number for tier, number in group.tier_blocks.items()},
                )
                for group in one.groups
            )
            holder = decode_holder(one.holder)
            report = HolderReport(
                SourceId(holder.worker_id, holder.dp_rank),
                holder.matched_tokens // page_size,
                holder.usable_tokens // page_size,
                groups,
                one.missing,
            )
            state = SourceState(one.source_state) if one.source_state else None
            holders.append(Explained(holder, report, state, one.age_s, one.offered))
    except (KeyError, ValueError) as error:
        raise RemoteProtocolError(f"holders: {error}") from error
    return Explanation(tuple(holders), message.query_blocks, message.limit_tokens, message.revision)


def encode_hot_request(namespace: Namespace, top: int) -> pb.HotPrefixesRequest:
    """Build a HotPrefixesRequest."""
    return pb.HotPrefixesRequest(namespace=encode_namespace(namespace), top=top)


def decode_hot_request(message: pb.HotPrefixesRequest) -> tuple[Namespace, int]:
    """Read a HotPrefixesRequest; raises RemoteProtocolError naming the field."""
    if message.top > MAX_TOP:
        raise RemoteProtocolError(f"top: {message.top} is not in 1..{MAX_TOP} (0: {_DEFAULT_TOP})")
    return _namespace(message), message.top or _DEFAULT_TOP


def encode_hot(prefixes: Iterable[HotHeld], observed: int) -> pb.HotPrefixesResponse:
    """Build a HotPrefixesResponse."""
    return pb.HotPrefixesResponse(
        observed=observed,
        prefixes=[
            pb.HotPrefix(
                hash=one.hot.last,
                tokens=one.tokens,
                uses=one.hot.uses,
                uses_error=one.hot.error,
                holders=list(map(encode_holder, one.holders)),
            )
            for one in prefixes
        ],
    )


def decode_hot(message: pb.HotPrefixesResponse, page_size: int) -> tuple[list[HotHeld], int]:
    """Read a HotPrefixesResponse: the prefixes, and how many matches were observed."""
    prefixes = [
        HotHeld(
            HotPrefix(BlockHash(one.hash), one.tokens // page_size, one.uses, one.uses_error),
            one.tokens,
            tuple(map(decode_holder, one.holders)),
        )
        for one in message.prefixes
    ]
    return prefixes, message.observed


def encode_dump_request(namespace: Namespace, page_blocks: int) -> pb.DumpRequest:
    """Build a DumpRequest."""
    return pb.DumpRequest(namespace=encode_namespace(namespace), page_blocks=page_blocks)


def decode_dump_request(message: pb.DumpRequest) -> tuple[Namespace, int]:
    """Read a DumpRequest; raises RemoteProtocolError naming the field."""
    if message.page_blocks and message.page_blocks not in PAGE_BLOCKS:
        raise RemoteProtocolError(
            f"page_blocks: {message.page_blocks} is not in {PAGE_BLOCKS.start}..{PAGE_BLOCKS.stop - 1} "
            f"(0: {_DEFAULT_PAGE_BLOCKS})"
        )
    return _namespace(message), message.page_blocks or _DEFAULT_PAGE_BLOCKS


def encode_page(page: Changes) -> bytes:
    """Build the bytes of a DumpPage."""
    changes = list(map(_encode_change, page.changes))
    return pb.DumpPage(
        life=page.life, revision=page.revision, changes=changes, last=page.last, entries=page.entries
    ).SerializeToString()


def read_page(data: bytes) -> pb.DumpPage:
    """Read what `encode_page` has built."""
    return pb.DumpPage.FromString(data)


def decode_page(message: pb.DumpPage) -> Changes:
    """Read a DumpPage; raises RemoteProtocolError naming the field."""
    changes = tuple(map(_decode_change, message.changes))
    return Changes(message.life, message.revision, changes, message.last, message.entries)


def encode_watch_request(namespace: Namespace, life: int, revision: int) -> pb.WatchRequest:
    """Build a WatchRequest."""
    return pb.WatchRequest(namespace=encode_namespace(namespace), life=life, revision=revision)


def decode_watch_request(message: pb.WatchRequest) -> tuple[Namespace, int, int]:
    """Read a WatchRequest: namespace, life, revision. Raises RemoteProtocolError naming the field."""
    if message.revision and not message.life:
        raise RemoteProtocolError("life: is missing; a revision counts within one life of the service")
    return _namespace(message), message.life, message.revision


def encode_event(event: Changes) -> pb.WatchEvent:
    """Build a WatchEvent."""
    changes = list(map(_encode_change, event.changes))
    return pb.WatchEvent(life=event.life, revision=event.revision, changes=changes)


def decode_event(message: pb.WatchEvent) -> Changes:
    """Read a WatchEvent; raises RemoteProtocolError naming the field."""
    return Changes(message.life, message.revision, tuple(map(_decode_change, message.changes)))


def encode_check_request(namespace: Namespace) -> pb.CheckRequest:
    """Build a CheckRequest."""
    return pb.CheckRequest(namespace=encode_namespace(namespace))


def decode_check_request(message: pb.CheckRequest) -> Namespace:
    """Read a CheckRequest; raises RemoteProtocolError naming the field."""
    return _namespace(message)


def encode_check(report: CheckReport) -> pb.CheckResponse:
    """Build a CheckResponse."""
    return pb.CheckResponse(
        violations=report.violations,
        revision=report.revision,
        blocks=report.blocks,
        entries=report.entries,
        seconds=report.seconds,
    )


def decode_check(message: pb.CheckResponse) -> CheckReport:
    """Read a CheckResponse."""
    return CheckReport(
        tuple(message.violations), message.revision, message.blocks, message.entries, message.seconds
    )


def _namespace(
    message: pb.HotPrefixesRequest | pb.DumpRequest | pb.WatchRequest | pb.CheckRequest,
) -> Namespace:
    if not message.HasField("namespace"):
        raise RemoteProtocolError("namespace: is missing")
    return read_namespace(message.namespace)


def _encode_change(change: Change) -> pb.Change:
    source, event = change
    message = pb.Change(worker_id=source.worker_id, dp_rank=source.dp_rank)
    if isinstance(event, AllCleared):
        message.kind = pb.CHANGE_KIND_CLEARED
        return message
    stored = isinstance(event, BlocksStored | GroupStored)
    message.kind = pb.CHANGE_KIND_STORED if stored else pb.CHANGE_KIND_REMOVED
    message.group = _GROUPS[event.group if isinstance(event, GroupStored | GroupRemoved) else None]
    message.tier = event.tier.value
    message.hashes.extend(event.hashes)
    if isinstance(event, BlocksStored) and event.parent is not None:
        message.parent = event.parent
    return message


def _decode_change(message: pb.Change) -> Change:
    source = SourceId(WorkerId(message.worker_id), message.dp_rank)
    return source, _decode_event(message)


def _decode_event(message: pb.Change) -> Event:
    if message.kind == pb.CHANGE_KIND_CLEARED:
        return AllCleared()
    hashes = tuple(map(BlockHash, message.hashes))
    try:
        tier, group = Tier(message.tier), _OF_GROUP[message.group]
    except (ValueError, KeyError) as error:
        raise RemoteProtocolError(f"changes: tier or group {error} is not known") from error
    if message.kind == pb.CHANGE_KIND_STORED:
        if group is not None:
            return GroupStored(group, hashes, tier)
        parent = BlockHash(message.parent) if message.HasField("parent") else None
        return BlocksStored(hashes, parent, tier)
    if message.kind == pb.CHANGE_KIND_REMOVED:
        return BlocksRemoved(hashes, tier) if group is None else GroupRemoved(group, hashes, tier)
    raise RemoteProtocolError(f"changes: kind {message.kind} is not known")
