"""The two halves of one transfer, as state machines over positions. No memory, sockets or clock here.

    export (prefill):  opened -> chunks and the grant come, in any order -> finished by DONE, ended by ABORT
    import (decode):   granted -> place(DATA)* -> COMMIT -> complete when every granted row arrived once

Prefill counts prompt pages from the prompt's begin; the wire counts positions from the end of the prefix that
decode already holds. A receiver never takes a row number from its peer: a position is looked up in what this
side granted. Every position of every tensor must arrive exactly once, in any order, before the import is
complete.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cache_service.core.errors import LocalProtocolError, RemoteProtocolError
from prfaas_sglang.core.compression import FP8, takes_fp8
from prfaas_sglang.core.framing import MAX_PAYLOAD_BYTES, RAW, Data, Grant, Missing
from prfaas_sglang.core.layout import KV, Layout
from prfaas_sglang.core.plan import DEFAULT_FRAME_BYTES, Piece, plan_component


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of some tensors of one component that are ready to travel.

    Attributes:
        component, tensors: which tensors.
        first: prompt page of rows[0] (KV), or 0.
        rows: this side's row numbers.
        staged: per tensor, where the rows' bytes start in staging memory; None when they are in the pool.
        mark: what the engine must have done before the rows are read (see PoolMemory.mark).
    """

    component: int
    tensors: tuple[int, ...]
    first: int
    rows: tuple[int, ...]
    staged: tuple[int, ...] | None = None
    mark: object = None


@dataclass(slots=True)
class ExportSession:
    """Prefill's half: checks what the engine offers against what decode permits, and cuts it into pieces.

    Attributes:
        layout: the pools' layout (equal on both sides).
        grant: what decode permits, None until it said so.
        prompt_pages: pages of the whole prompt, None when the engine has not said.
    """

    layout: Layout
    frame_bytes: int = DEFAULT_FRAME_BYTES
    prompt_pages: int | None = None
    grant: Grant | None = None
    offered_pages: int = 0
    last_seen: bool = False
    _ahead: tuple[int, ...] = ()  # this side's pages of which some tensors went ahead
    _ahead_first: int = 0  # prompt page of _ahead[0]
    _ahead_tensors: set[int] = field(default_factory=set)

    @property
    def prefix_pages(self) -> int:
        """Pages at the prompt's begin that decode holds already; 0 until the grant is there."""
        return 0 if self.grant is None else self.grant.prefix_tokens // self.layout.page_size

    @property
    def total_bytes(self) -> int:
        """Row bytes that the whole transfer will have, 0 before the grant."""
        if self.grant is None:
            return 0
        rows = (self.grant.pages, *self.grant.state_rows, 1)
        return sum(c.bytes_per_row * n for c, n in zip(self.layout.components, rows, strict=True))

    @property
    def offered_bytes(self) -> int:
        """Row bytes of them that the engine has offered so far: what could be on its way."""
        if self.grant is None or self.last_seen:
            return self.total_bytes
        pages = max(0, self.offered_pages - self.prefix_pages)
        return self.layout.components[KV].bytes_per_row * pages

    def accept(self, grant: Grant) -> None:
        """Take decode's grant. Raises RemoteProtocolError when it does not fit the layout or the prompt."""
        if len(grant.state_rows) != len(self.layout.states):
            raise RemoteProtocolError(
                f"grant: {len(grant.state_rows)} state components, layout has {len(self.layout.states)}",
                reason="grant",
            )
        if grant.prefix_tokens % self.layout.page_size:
            raise RemoteProtocolError(
                f"grant: prefix of {grant.prefix_tokens} tokens is not whole pages of "
                f"{self.layout.page_size}",
                reason="grant",
            )
        pages = grant.prefix_tokens // self.layout.page_size + grant.pages
        if self.prompt_pages is not None and pages != self.prompt_pages:
            raise RemoteProtocolError(
                f"grant: prefix and pages make {pages} pages, the prompt has {self.prompt_pages}",
                reason="grant",
            )
        if self.offered_pages > pages or (self.last_seen and self.offered_pages != pages):
            raise RemoteProtocolError(
                f"grant: prefix and pages make {pages} pages, {self.offered_pages} were computed",
                reason="grant",
            )
        self.grant = grant

    def ahead(
        self, pages: Sequence[int], tensors: Sequence[int], mark: object = None, *, first: int | None = None
    ) -> Part:
        """Return the part that carries some KV tensors of some pages before their chunk is offered.

        Args:
            pages: this side's page numbers, all in one chunk; the same ones for every call of a chunk.
            tensors: KV tensors whose rows are final.
            first: prompt page of pages[0]; by default the first page that was not offered yet.

        Raises LocalProtocolError when pages were offered or changed, or a tensor went already.
        """
        pages = tuple(pages)
        first = self.offered_pages if first is None else first
        if self.last_seen or first < self.offered_pages or not pages:
            raise LocalProtocolError("layers sent ahead of pages that were offered before", reason="ahead")
        if self._ahead_tensors and (first, pages) != (self._ahead_first, self._ahead):
            raise LocalProtocolError("layers sent ahead of other pages than before", reason="ahead")
        if self._ahead_tensors & set(tensors):
            raise LocalProtocolError("a layer was sent ahead twice", reason="ahead")
        self._check_pages(first + len(pages))
        self._ahead, self._ahead_first = pages, first
        self._ahead_tensors |= set(tensors)
        return Part(KV, tuple(tensors), first, pages, mark=mark)

    def page_bytes(self, tensors: Sequence[int]) -> int:
        """Return the bytes of one page in some KV tensors."""
        return sum(self.layout.components[KV].row_bytes[tensor] for tensor in tensors)

    def moved(self, pages: Sequence[int]) -> bool:
        """True when the next chunk would be `pages` and other pages than those went ahead for it."""
        here = self._ahead_span(pages)
        return tuple(pages)[here] != self._ahead[: here.stop - here.start]

    def _ahead_span(self, pages: Sequence[int]) -> slice:
        """Return which of the next chunk's pages went ahead."""
        start = min(max(0, self._ahead_first - self.offered_pages), len(pages))
        return slice(start, min(start + len(self._ahead), len(pages)))

    def chunk(
        self,
        pages: Sequence[int],
        *,
        states: Sequence[Sequence[int] | None] | None = None,
        aux_row: int | None = None,
        last: bool = False,
        mark: object = None,
        ahead_copied: bool = False,
    ) -> list[Part]:
        """Return the parts of the next chunk, less what went ahead.

        Args:
            pages: this side's page numbers, the next ones in prompt order.
            states: with the last chunk, this side's rows per state component.
            aux_row: with the last chunk, this side's metadata row.
            last: the prompt ends here.
            ahead_copied: what went ahead is not read from the pool any more, so its pages may have changed
                (the engine found equal ones in its cache).

        Raises LocalProtocolError when the engine offers pages or state that do not fit the prompt or the
        grant, or other pages than went ahead.
        """
        if self.last_seen:
            raise LocalProtocolError("chunk after the last one", reason="chunk_order")
        pages = tuple(pages)
        gone = self._ahead_span(pages)
        if self.moved(pages) and not ahead_copied:
            raise LocalProtocolError("a chunk's pages changed after layers were sent ahead", reason="ahead")
        covered = gone.stop - gone.start
        if covered < len(self._ahead) and (covered or last):
            raise LocalProtocolError("a chunk ends inside what was sent ahead", reason="ahead")
        self._check_pages(self.offered_pages + len(pages), last=last)
        every = tuple(range(len(self.layout.components[KV].row_bytes)))
        rest = tuple(t for t in every if t not in self._ahead_tensors)
        first = self.offered_pages
        parts = [
            Part(KV, every, first, pages[: gone.start], mark=mark),
            Part(KV, rest, first + gone.start, pages[gone], mark=mark),
            Part(KV, every, first + gone.stop, pages[gone.stop :], mark=mark),
        ]
        self.offered_pages += len(pages)
        if covered:
            self._ahead, self._ahead_first, self._ahead_tensors = (), 0, set()
        if last:
            parts += self._last_parts(states or [], aux_row, mark)
            self.last_seen = True
        return [part for part in parts if part.rows and part.tensors]

    def _check_pages(self, pages: int, *, last: bool = False) -> None:
        wanted = self.prompt_pages
        if wanted is None and self.grant is not None:
            wanted = self.prefix_pages + self.grant.pages
        if wanted is not None and pages > wanted:
            raise LocalProtocolError(f"{pages} pages to send of a prompt of {wanted}", reason="pages")
        if last and wanted is not None and pages != wanted:
            raise LocalProtocolError(f"prompt ended after {pages} of {wanted} pages", reason="pages")

    def _last_parts(
        self, states: Sequence[Sequence[int] | None], aux_row: int | None, mark: object
    ) -> list[Part]:
        if aux_row is None:
            raise LocalProtocolError("last chunk without its metadata row", reason="aux")
        if len(states) != len(self.layout.states):
            raise LocalProtocolError(
                f"{len(states)} state components, layout has {len(self.layout.states)}", reason="state"
            )
        rows = [tuple(state if state is not None else ()) for state in states]
        if self.grant is not None:
            for i, state in enumerate(rows):
                self._surplus(i, len(state), LocalProtocolError)
        return [
            Part(number, tuple(range(len(self.layout.components[number].row_bytes))), 0, part, mark=mark)
            for number, part in [*enumerate(rows, 1), (self.layout.aux, (aux_row,))]
        ]

    def _surplus(self, i: int, rows: int, error: type[LocalProtocolError | RemoteProtocolError]) -> int:
        """Return how many leading rows of state i decode does not want: a window that its prefix covers."""
        assert self.grant is not None
        surplus, kind = rows - self.grant.state_rows[i], self.layout.states[i].kind
        if surplus < 0 or (surplus and kind != "swa"):
            raise error(
                f"{rows} rows of state {kind}, {self.grant.state_rows[i]} granted",
                reason="state",
            )
        return surplus

    def pieces(self, part: Part, missing: Ranges | None = None) -> Iterator[Piece]:
        """Cut a part into pieces; what decode holds already is left out.

        Args:
            missing: after a break, what decode lacks; None for all of it.

        Raises RemoteProtocolError when the grant came after the part and does not fit it, LocalProtocolError
        before the grant.
        """
        if self.grant is None:
            raise LocalProtocolError("pieces before the grant", reason="no_grant")
        component = self.layout.components[part.component]
        if part.component == KV:
            skip = min(max(0, self.prefix_pages - part.first), len(part.rows))
            first = part.first + skip - self.prefix_pages
        elif part.component == self.layout.aux:
            skip = first = 0
        else:
            skip, first = self._surplus(part.component - 1, len(part.rows), RemoteProtocolError), 0
        end = first + len(part.rows) - skip
        spans = [
            (i, start, stop)
            for i, tensor in enumerate(part.tensors)
            for start, stop in _overlaps(part.component, tensor, first, end, missing)
        ]
        return self._cut(part, spans, skip - first, component.row_bytes)

    def _cut(
        self, part: Part, spans: list[tuple[int, int, int]], shift: int, row_bytes: Sequence[int]
    ) -> Iterator[Piece]:
        """Yield the pieces of spans (number in part.tensors, positions from, to); row = position + shift."""
        component = self.layout.components[part.component]
        for i, start, stop in spans:
            tensor = part.tensors[i]
            for piece in plan_component(
                part.component,
                component,
                part.rows[start + shift : stop + shift],
                first=start,
                tensors=(tensor,),
                frame_bytes=self.frame_bytes,
            ):
                staged = None
                if part.staged is not None:
                    staged = part.staged[i] + (piece.data.first + shift) * row_bytes[tensor]
                yield Piece(piece.data, piece.rows, staged, part.mark)


#: Position ranges (from, to) by component and tensor.
Ranges = Mapping[tuple[int, int], Sequence[tuple[int, int]]]


def ranges_of(missing: Sequence[Missing]) -> Ranges:
    """Return what is missing by component and tensor."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for m in missing:
        found.setdefault((m.component, m.tensor), []).append((m.first, m.first + m.count))
    return found


def _overlaps(
    component: int, tensor: int, first: int, end: int, missing: Ranges | None
) -> list[tuple[int, int]]:
    """Return what of the positions first..end of a tensor is to be sent."""
    if missing is None:
        return [(first, end)]
    spans = [(max(first, a), min(end, b)) for a, b in missing.get((component, tensor), ())]
    return [(start, stop) for start, stop in spans if start < stop]


@dataclass(slots=True)
class ImportSession:
    """Decode's half: maps positions to granted rows and knows when everything is here.

    Attributes:
        layout: the pools' layout.
        pages: this side's page numbers, in prompt order after the held prefix.
        states: this side's rows per state component.
        aux_row: this side's metadata row.
        codecs: codecs of DATA frames that are accepted.
    """

    layout: Layout
    pages: Sequence[int]
    states: Sequence[Sequence[int]]
    aux_row: int
    codecs: frozenset[int] = frozenset({RAW})
    committed_bytes: int | None = None
    received_bytes: int = 0
    _claimed: dict[tuple[int, int], int] = field(default_factory=dict)
    _arrived: dict[tuple[int, int], int] = field(default_factory=dict)

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
            payload_bytes: bytes that follow the descriptor.

        Raises RemoteProtocolError for anything outside the grant; nothing may be written then.
        """
        if data.component >= len(self.layout.components):
            raise RemoteProtocolError(f"data: no component {data.component}", reason="component")
        component = self.layout.components[data.component]
        if data.codec not in self.codecs or (data.codec == FP8 and not takes_fp8(component)):
            raise RemoteProtocolError(
                f"data: codec {data.codec} is not allowed for {component.kind} here", reason="codec"
            )
        if data.tensor >= len(component.row_bytes):
            raise RemoteProtocolError(f"data: {component.kind} has no tensor {data.tensor}", reason="tensor")
        rows = self.rows(data.component)
        if data.count == 0 or data.first + data.count > len(rows):
            raise RemoteProtocolError(
                f"data: {component.kind} positions {data.first}..{data.first + data.count} "
                f"of {len(rows)} granted",
                reason="range",
            )
        row_bytes = data.count * component.row_bytes[data.tensor]
        if data.codec == RAW:
            fits = payload_bytes == row_bytes
        else:  # the bound of a raw frame is that of a decoded one
            fits = payload_bytes < row_bytes <= MAX_PAYLOAD_BYTES
        if not fits:
            raise RemoteProtocolError(
                f"data: {payload_bytes} bytes for {data.count} rows of {component.row_bytes[data.tensor]}, "
                f"codec {data.codec}",
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
        key, mask = (data.component, data.tensor), ((1 << data.count) - 1) << data.first
        self._arrived[key] = self._arrived.get(key, 0) | mask
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

    def resume(self) -> list[Missing]:
        """Begin again on a new connection, once no reader of the old one is left; return what is missing."""
        self._claimed = dict(self._arrived)
        self.committed_bytes = None
        return [
            Missing(number, tensor, first, count)
            for number, component in enumerate(self.layout.components)
            for tensor in range(len(component.row_bytes))
            for first, count in _gaps(self._arrived.get((number, tensor), 0), len(self.rows(number)))
        ]

    @property
    def complete(self) -> bool:
        """True when the sender committed and every granted row of every tensor arrived."""
        return self.committed_bytes is not None and self.received_bytes == self.committed_bytes


def _gaps(mask: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield the runs (first, count) of zero bits among the lowest `length`."""
    holes = ~mask & ((1 << length) - 1)
    while holes:
        first = (holes & -holes).bit_length() - 1
        run = holes >> first
        count = (~run & (run + 1)).bit_length() - 1
        yield first, count
        holes &= ~(((1 << count) - 1) << first)
