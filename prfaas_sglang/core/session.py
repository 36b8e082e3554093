"""The two halves of one transfer, as state machines over positions. No memory, sockets or clock here.

    export (prefill):  add_chunk* -> last chunk -> finished by DONE, ended by ABORT
    import (decode):   granted -> place(DATA)* -> COMMIT -> complete when every granted row arrived once

A receiver never takes a row number from its peer: a position is looked up in what this side granted. Every
position of every tensor must arrive exactly once, in any order, before the import is complete.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cache_service.core.errors import LocalProtocolError, RemoteProtocolError
from prfaas_sglang.core.framing import Data, Grant
from prfaas_sglang.core.layout import KV, Layout
from prfaas_sglang.core.plan import DEFAULT_FRAME_BYTES, Piece, plan_component


@dataclass(slots=True)
class ExportSession:
    """Prefill's half: turns chunks of page numbers into pieces and counts what was promised.

    Attributes:
        layout: the pools' layout (equal on both sides).
        grant: what decode permits.
    """

    layout: Layout
    grant: Grant
    frame_bytes: int = DEFAULT_FRAME_BYTES
    sent_pages: int = 0
    total_bytes: int = 0
    last_seen: bool = False

    def granted_bytes(self) -> int:
        """Return the row bytes that the whole transfer will have."""
        rows = (self.grant.pages, *self.grant.state_rows, 1)
        return sum(c.bytes_per_row * n for c, n in zip(self.layout.components, rows, strict=True))

    def chunk(
        self,
        pages: Sequence[int],
        *,
        states: Sequence[Sequence[int] | None] | None = None,
        aux_row: int | None = None,
        last: bool = False,
    ) -> Iterator[Piece]:
        """Yield the pieces of the next chunk.

        Args:
            pages: this side's page numbers, the next ones in prompt order.
            states: with the last chunk, this side's rows per state component.
            aux_row: with the last chunk, this side's metadata row.
            last: the prompt ends here.

        Raises LocalProtocolError when the engine offers pages or state that the grant does not cover.
        """
        if self.last_seen:
            raise LocalProtocolError("chunk after the last one", reason="chunk_order")
        first = self.sent_pages
        if first + len(pages) > self.grant.pages:
            raise LocalProtocolError(
                f"{first + len(pages)} pages to send, {self.grant.pages} granted", reason="pages"
            )
        self.sent_pages += len(pages)
        pieces = plan_component(
            KV, self.layout.components[KV], pages, first=first, frame_bytes=self.frame_bytes
        )
        self.total_bytes += len(pages) * self.layout.components[KV].bytes_per_row
        if not last:
            return pieces
        self.last_seen = True
        if self.sent_pages != self.grant.pages:
            raise LocalProtocolError(
                f"prompt ended after {self.sent_pages} pages, {self.grant.pages} granted", reason="pages"
            )
        rows_by_component = self._last_rows(states or [], aux_row)
        for number, rows in rows_by_component:
            self.total_bytes += len(rows) * self.layout.components[number].bytes_per_row
        return self._chain(pieces, rows_by_component)

    def _last_rows(
        self, states: Sequence[Sequence[int] | None], aux_row: int | None
    ) -> list[tuple[int, Sequence[int]]]:
        if aux_row is None:
            raise LocalProtocolError("last chunk without its metadata row", reason="aux")
        if len(states) != len(self.layout.states):
            raise LocalProtocolError(
                f"{len(states)} state components, layout has {len(self.layout.states)}", reason="state"
            )
        rows: list[tuple[int, Sequence[int]]] = []
        for i, state in enumerate(states):
            state = state if state is not None else ()
            if len(state) != self.grant.state_rows[i]:
                raise LocalProtocolError(
                    f"{len(state)} rows of state {self.layout.states[i].kind}, "
                    f"{self.grant.state_rows[i]} granted",
                    reason="state",
                )
            rows.append((i + 1, state))
        rows.append((self.layout.aux, (aux_row,)))
        return rows

    def _chain(self, pieces: Iterator[Piece], rest: list[tuple[int, Sequence[int]]]) -> Iterator[Piece]:
        yield from pieces
        for number, rows in rest:
            component = self.layout.components[number]
            yield from plan_component(number, component, rows, frame_bytes=self.frame_bytes)


@dataclass(slots=True)
class ImportSession:
    """Decode's half: maps positions to granted rows and knows when everything is here.

    Attributes:
        layout: the pools' layout.
        pages: this side's page numbers, in prompt order after the held prefix.
        states: this side's rows per state component.
        aux_row: this side's metadata row.
    """

    layout: Layout
    pages: Sequence[int]
    states: Sequence[Sequence[int]]
    aux_row: int
    committed_bytes: int | None = None
    received_bytes: int = 0
    _claimed: dict[tuple[int, int], int] = field(default_factory=dict)

    def rows(self, component: int) -> Sequence[int]:
        """Return the granted rows of a component, in position order."""
        if component == KV:
            return self.pages
        if component == self.layout.aux:
            return (self.aux_row,)
        return self.states[component - 1]

    def expected_bytes(self) -> int:
        """Return the row bytes of the whole transfer."""
        return sum(
            c.bytes_per_row * len(self.rows(number)) for number, c in enumerate(self.layout.components)
        )

    def place(self, data: Data, payload_bytes: int) -> Sequence[int]:
        """Claim a DATA frame's positions and return the rows that it fills, in order.

        A position is claimed once, so frames that arrive on several connections never write the same row.

        Args:
            data: the frame's descriptor.
            payload_bytes: row bytes that follow the descriptor.

        Raises RemoteProtocolError for anything outside the grant; nothing may be written then.
        """
        if data.component >= len(self.layout.components):
            raise RemoteProtocolError(f"data: no component {data.component}", reason="component")
        component = self.layout.components[data.component]
        if data.tensor >= len(component.row_bytes):
            raise RemoteProtocolError(f"data: {component.kind} has no tensor {data.tensor}", reason="tensor")
        rows = self.rows(data.component)
        if data.count == 0 or data.first + data.count > len(rows):
            raise RemoteProtocolError(
                f"data: {component.kind} positions {data.first}..{data.first + data.count} "
                f"of {len(rows)} granted",
                reason="range",
            )
        if payload_bytes != data.count * component.row_bytes[data.tensor]:
            raise RemoteProtocolError(
                f"data: {payload_bytes} bytes for {data.count} rows of {component.row_bytes[data.tensor]}",
                reason="length",
            )
        key, mask = (data.component, data.tensor), ((1 << data.count) - 1) << data.first
        claimed = self._claimed.get(key, 0)
        if mask & claimed:
            raise RemoteProtocolError(f"data: {component.kind} position arrived twice", reason="duplicate")
        self._claimed[key] = claimed | mask
        return rows[data.first : data.first + data.count]

    def arrived(self, data: Data) -> None:
        """Record a verified frame (after `place` and after its checksum was right)."""
        self.received_bytes += data.count * self.layout.components[data.component].row_bytes[data.tensor]

    def commit(self, total_bytes: int) -> None:
        """Record the sender's COMMIT. Raises RemoteProtocolError when it does not cover the grant."""
        if self.committed_bytes is not None:
            raise RemoteProtocolError("commit: twice", reason="commit")
        if total_bytes != self.expected_bytes():
            raise RemoteProtocolError(
                f"commit: {total_bytes} bytes sent, {self.expected_bytes()} granted", reason="commit"
            )
        self.committed_bytes = total_bytes

    @property
    def complete(self) -> bool:
        """True when the sender committed and every granted row of every tensor arrived."""
        return self.committed_bytes is not None and self.received_bytes == self.committed_bytes
