"""One request on its way through the simulated fleet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cache_service.core.ids import SiteId, WorkerId
from router.core.decision import Decision, RequestClass

if TYPE_CHECKING:
    from router.simulate.engine import DecodeEngine

NEVER = math.nan


class Job:
    """What came in, what was decided, and when each stage was over (seconds of virtual time, NaN: never).

    Attributes:
        blocks: ids of the prompt's full blocks; an id stands for the whole prefix up to it.
        hit: leading blocks that the engine found; `matched_tokens` is what the router expected.
        computed: prompt tokens in the cache or computed.
    """

    __slots__ = (
        "arrived_s",
        "attempt",
        "blocks",
        "computed",
        "decided",
        "decode_engine",
        "decoding_s",
        "done_s",
        "excluded",
        "finish_step",
        "first_chunk",
        "first_s",
        "flow",
        "hit",
        "home",
        "number",
        "output_tokens",
        "prefilled_s",
        "request_class",
        "session",
        "started_s",
        "state",
        "stored_from",
        "tenant",
        "total_tokens",
        "transferred_s",
        "wire_bytes",
    )

    def __init__(
        self,
        number: int,
        arrived_s: float,
        total_tokens: int,
        output_tokens: int,
        home: SiteId,
        blocks: Sequence[int],
        session: str = "",
        state: Any = None,
        request_class: RequestClass = RequestClass.STANDARD,
        tenant: str = "",
    ) -> None:
        self.number = number
        self.arrived_s = arrived_s
        self.total_tokens = total_tokens
        self.output_tokens = max(1, output_tokens)
        self.home = home
        self.blocks = blocks
        self.session = session
        self.state = state  # the workload's own
        self.request_class = request_class
        self.tenant = tenant
        self.decided: Decision | None = None
        self.decode_engine: DecodeEngine | None = None
        self.excluded: frozenset[WorkerId] = frozenset()
        self.attempt = 0
        self.flow: Any = None
        self.hit = -1
        self.computed = 0
        self.stored_from = 0
        self.finish_step = 0
        self.first_chunk = True
        self.wire_bytes = 0.0
        self.started_s = NEVER
        self.prefilled_s = NEVER
        self.transferred_s = NEVER
        self.decoding_s = NEVER
        self.first_s = NEVER
        self.done_s = NEVER

    def again(self) -> None:
        """Forget the last attempt's stages."""
        self.attempt += 1
        self.hit = -1
        self.computed = 0
        self.first_chunk = True
        self.flow = None
        self.started_s = self.prefilled_s = self.transferred_s = NEVER
