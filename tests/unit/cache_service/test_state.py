"""One service's index keeps its budget, and says what it forgot."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from cache_service.core.events import BlocksStored
from cache_service.core.ids import BlockHash, Namespace, SiteId, SourceId, WorkerId
from cache_service.core.query import Query
from cache_service.metrics import IndexMetrics
from cache_service.state import IndexState

SOURCE = SourceId(WorkerId("a-0"), 0)
NAMESPACE = Namespace(model="tiny", page_size=4)
BUDGET = 1 << 20
CHAIN = 100


def test_what_was_used_longest_ago_is_forgotten_above_the_budget() -> None:
    """Far more is stored than fits: the last chain and one that is asked for again and again stay."""
    registry = CollectorRegistry()
    state = IndexState(NAMESPACE, {SOURCE: SiteId("A")}, None, IndexMetrics(registry), budget_bytes=BUDGET)
    chains = [
        tuple(BlockHash(CHAIN * number + block) for block in range(1, CHAIN + 1)) for number in range(1500)
    ]

    def matched(number: int) -> int:
        query = Query(NAMESPACE, chains[number], CHAIN * NAMESPACE.page_size + 1)
        return sum(holder.usable_tokens for holder in state.answer(query)) // NAMESPACE.page_size

    for chain in chains:
        state.apply(SOURCE, [BlocksStored(chain, None)])
        assert matched(0) == CHAIN
    assert matched(-1) == CHAIN
    assert matched(700) < CHAIN
    state.index.check()
    evicted = registry.get_sample_value("prfaas_index_evicted_blocks_count")
    memory = registry.get_sample_value("prfaas_index_memory_bytes")
    assert evicted == len(chains) * CHAIN - state.index.counts().blocks > 0
    assert memory is not None
    assert memory <= BUDGET
