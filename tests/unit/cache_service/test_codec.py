"""Messages round-trip, and a wrong one is refused with its field."""

from __future__ import annotations

import pytest

from cache_service.core.errors import LocalProtocolError, RemoteProtocolError
from cache_service.core.ids import Namespace, SiteId, SourceId, WorkerId
from cache_service.core.index import IndexCounts
from cache_service.core.query import MAX_HASHES, Holder
from cache_service.wire import codec

NAMESPACE = Namespace("m", 4, "r", "fp8", "l", "lora", "salt")


def test_query_round_trip() -> None:
    """Every field of a query survives."""
    query = codec.decode_query(codec.encode_query(NAMESPACE, [1, -(2**63), 2**63 - 1], 13))  # type: ignore[list-item]
    assert query.namespace == NAMESPACE
    assert query.hashes == (1, -(2**63), 2**63 - 1)
    assert query.total_tokens == 13


def test_result_round_trip() -> None:
    """Every field of an answer survives."""
    holders = (Holder(WorkerId("w"), SiteId("A"), 3, 64, 60),)
    result = codec.decode_result(codec.encode_result(holders, 9))
    assert result.available
    assert (result.holders, result.revision) == (holders, 9)


def test_stats_round_trip() -> None:
    """Every field of the statistics survives."""
    source = codec.SourceStats(
        SourceId(WorkerId("w"), 1), SiteId("A"), codec.SourceState.STALE, 7, 5, True, {"gap": 2}
    )
    stats = codec.Stats(SiteId("B"), NAMESPACE, IndexCounts(1, 2, 1, 3), 4, 5, 6, (source,))
    assert codec.decode_stats(codec.encode_stats(stats)) == stats


@pytest.mark.parametrize(
    ("hashes", "total", "page_size", "named"),
    [
        ([1] * 4, 12, 4, "hashes"),
        ([], 0, 4, "total_tokens"),
        ([], 5, 0, "page_size"),
        ([0] * (MAX_HASHES + 1), 2**31, 4, "hashes"),
    ],
)
def test_wrong_query(hashes: list[int], total: int, page_size: int, named: str) -> None:
    """A query that cannot be meant names its field."""
    message = codec.pb.MatchRequest(
        namespace=codec.pb.Namespace(model="m", page_size=page_size), hashes=hashes, total_tokens=total
    )
    with pytest.raises(RemoteProtocolError, match=named):
        codec.decode_query(message)


def test_missing_namespace() -> None:
    """No namespace is not the empty namespace."""
    with pytest.raises(RemoteProtocolError, match="namespace"):
        codec.decode_query(codec.pb.MatchRequest(total_tokens=1))


def test_value_that_does_not_fit() -> None:
    """A hash beyond 64 bits is the caller's bug."""
    with pytest.raises(LocalProtocolError, match="match request"):
        codec.encode_query(NAMESPACE, [2**63], 13)  # type: ignore[list-item]
