"""Between the gRPC messages and the core's values: Match and Stats. wire/api_codec.py has the rest.

Decides what a message means; it must not answer it. A message that cannot be meant raises RemoteProtocolError
naming the field.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from google.protobuf.message import DecodeError

from cache_service.core.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from cache_service.core.ids import BlockHash, Namespace, SiteId, SourceId, WorkerId
from cache_service.core.index import IndexCounts
from cache_service.core.query import Holder, MatchResult, Query
from cache_service.wire import cache_pb2 as pb

#: Room for MAX_HASHES of 8 bytes and the rest; both sides of the connection refuse more.
MAX_MESSAGE_BYTES = 2 * 1024 * 1024


class SourceState(Enum):
    """How one event stream is doing; see cache.proto."""

    CONNECTING = pb.SOURCE_STATE_CONNECTING
    SYNCING = pb.SOURCE_STATE_SYNCING
    LIVE = pb.SOURCE_STATE_LIVE
    STALE = pb.SOURCE_STATE_STALE
    GONE = pb.SOURCE_STATE_GONE


@dataclass(frozen=True, slots=True)
class SourceStats:
    """One event stream in a Stats answer."""

    source: SourceId
    site: SiteId
    state: SourceState
    next_seq: int
    entries: int
    truncated: bool
    counts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Stats:
    """A Stats answer."""

    site: SiteId
    namespace: Namespace
    counts: IndexCounts
    revision: int
    log_bytes: int
    log_segments: int
    sources: tuple[SourceStats, ...]
    life: int = 0
    evicted_blocks: int = 0
    bytes_estimate: int = 0
    watchers: int = 0
    direct_port: int = 0
    starting: bool = False
    behind: tuple[str, ...] = ()


def encode_query(namespace: Namespace, hashes: Sequence[BlockHash], total_tokens: int) -> pb.MatchRequest:
    """Build a MatchRequest; raises LocalProtocolError for a value that does not fit its field."""
    try:
        return pb.MatchRequest(
            namespace=encode_namespace(namespace), hashes=hashes, total_tokens=total_tokens
        )
    except (ValueError, TypeError) as error:
        raise LocalProtocolError(f"match request: {error}") from error


def read_query(data: bytes) -> Query:
    """Read the bytes of a MatchRequest; raises RemoteProtocolError naming the field."""
    try:
        message = pb.MatchRequest.FromString(data)
    except DecodeError as error:
        raise RemoteProtocolError(f"match request: {error}") from error
    return decode_query(message)


def read_result(data: bytes) -> MatchResult:
    """Read the bytes of a MatchResponse; raises RemoteProtocolError when they are none."""
    try:
        return decode_result(pb.MatchResponse.FromString(data))
    except DecodeError as error:
        raise RemoteProtocolError(f"match response: {error}") from error


def decode_query(message: pb.MatchRequest) -> Query:
    """Read a MatchRequest; raises RemoteProtocolError naming the field."""
    if not message.HasField("namespace"):
        raise RemoteProtocolError("namespace: is missing")
    namespace = read_namespace(message.namespace)
    return Query(namespace, tuple(map(BlockHash, message.hashes)), message.total_tokens)


def encode_result(holders: Iterable[Holder], revision: int, *, starting: bool = False) -> pb.MatchResponse:
    """Build a MatchResponse."""
    return pb.MatchResponse(
        revision=revision,
        holders=list(map(encode_holder, holders)),
        starting=starting,
    )


def encode_holder(holder: Holder) -> pb.Holder:
    """Build a Holder."""
    return pb.Holder(
        worker_id=holder.worker_id,
        site=holder.site,
        dp_rank=holder.dp_rank,
        matched_tokens=holder.matched_tokens,
        usable_tokens=holder.usable_tokens,
    )


def decode_result(message: pb.MatchResponse) -> MatchResult:
    """Read a MatchResponse."""
    holders = tuple(map(decode_holder, message.holders))
    return MatchResult(True, "", holders, message.revision, message.starting)


def decode_holder(message: pb.Holder) -> Holder:
    """Read a Holder."""
    return Holder(
        WorkerId(message.worker_id),
        SiteId(message.site),
        message.dp_rank,
        message.matched_tokens,
        message.usable_tokens,
    )


def encode_stats(stats: Stats) -> pb.StatsResponse:
    """Build a StatsResponse."""
    return pb.StatsResponse(
        site=stats.site,
        namespace=encode_namespace(stats.namespace),
        blocks=stats.counts.blocks,
        entries=stats.counts.entries,
        orphans=stats.counts.orphans,
        revision=stats.revision,
        log_bytes=stats.log_bytes,
        log_segments=stats.log_segments,
        life=stats.life,
        group_entries=stats.counts.group_entries,
        evicted_blocks=stats.evicted_blocks,
        bytes_estimate=stats.bytes_estimate,
        watchers=stats.watchers,
        direct_port=stats.direct_port,
        starting=stats.starting,
        behind=stats.behind,
        sources=[
            pb.Source(
                worker_id=source.source.worker_id,
                site=source.site,
                dp_rank=source.source.dp_rank,
                state=source.state.value,
                next_seq=source.next_seq,
                entries=source.entries,
                truncated=source.truncated,
                counts=source.counts,
            )
            for source in stats.sources
        ],
    )


def decode_stats(message: pb.StatsResponse) -> Stats:
    """Read a StatsResponse; raises RemoteProtocolError for a namespace or a state we do not know."""
    try:
        sources = tuple(
            SourceStats(
                SourceId(WorkerId(source.worker_id), source.dp_rank),
                SiteId(source.site),
                SourceState(source.state),
                source.next_seq,
                source.entries,
                source.truncated,
                dict(source.counts),
            )
            for source in message.sources
        )
        namespace = read_namespace(message.namespace)
    except (ValueError, RemoteProtocolError) as error:
        raise RemoteProtocolError(f"stats: {error}") from error
    counts = IndexCounts(
        message.blocks, message.entries, len(sources), message.orphans, message.group_entries
    )
    return Stats(
        SiteId(message.site),
        namespace,
        counts,
        message.revision,
        message.log_bytes,
        message.log_segments,
        sources,
        message.life,
        message.evicted_blocks,
        message.bytes_estimate,
        message.watchers,
        message.direct_port,
        message.starting,
        tuple(message.behind),
    )


def encode_stats_request() -> pb.StatsRequest:
    """Build a StatsRequest."""
    return pb.StatsRequest()


def encode_namespace(namespace: Namespace) -> pb.Namespace:
    """Build a Namespace."""
    return pb.Namespace(
        model=namespace.model,
        page_size=namespace.page_size,
        revision=namespace.revision,
        kv_dtype=namespace.kv_dtype,
        layout=namespace.layout,
        lora=namespace.lora,
        salt=namespace.salt,
    )


def read_namespace(message: pb.Namespace) -> Namespace:
    """Read a Namespace; raises RemoteProtocolError naming the field."""
    try:
        return Namespace(
            model=message.model,
            page_size=message.page_size,
            revision=message.revision,
            kv_dtype=message.kv_dtype,
            layout=message.layout,
            lora=message.lora,
            salt=message.salt,
        )
    except ConfigError as error:
        raise RemoteProtocolError(str(error)) from error
