"""What to send, in what order, in what pieces: from row numbers to DATA frames.

Pure arithmetic. A frame carries consecutive positions of one tensor, at most `frame_bytes` of rows (a single
larger row travels alone). KV tensors go layer by layer; state and aux go last, because the linear state is
final only after the last chunk of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prfaas_sglang.core.framing import MAX_PAYLOAD_BYTES, Data
from prfaas_sglang.core.layout import Component

#: Measured best trade of system calls against waiting behind a frame on a WAN link.
DEFAULT_FRAME_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Piece:
    """One DATA frame to be.

    Attributes:
        data: its descriptor.
        rows: the sender's own row numbers, for a piece that is read from the pool.
        staged: where its bytes start in staging memory; None for a piece that is read from the pool.
        mark: what the engine must have done before the rows are read (see PoolMemory.mark).
    """

    data: Data
    rows: tuple[int, ...]
    staged: int | None = None
    mark: object = None


def plan_component(
    number: int,
    component: Component,
    rows: Sequence[int],
    *,
    first: int = 0,
    tensors: Sequence[int] | None = None,
    frame_bytes: int = DEFAULT_FRAME_BYTES,
) -> Iterator[Piece]:
    """Yield the pieces that carry `rows` of some tensors of one component.

    Args:
        number: component number in the layout.
        rows: the sender's row numbers; they become positions first, first + 1, ...
        first: position of rows[0] in the transfer.
        tensors: tensor numbers, all of them by default.
        frame_bytes: bound of one frame's row bytes.

    Raises ValueError for a row that can never fit a frame.
    """
    for tensor in range(len(component.row_bytes)) if tensors is None else tensors:
        row_bytes = component.row_bytes[tensor]
        if row_bytes + 64 > MAX_PAYLOAD_BYTES:
            raise ValueError(f"{component.kind} row of {row_bytes} bytes exceeds a frame")
        per_frame = max(1, min(frame_bytes // row_bytes, 1000))
        for start in range(0, len(rows), per_frame):
            part = tuple(rows[start : start + per_frame])
            yield Piece(Data(number, tensor, first + start, len(part)), part)
