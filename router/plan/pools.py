"""From a worker's own description of its pools (GET /layout of its telemetry) to S_kv(l). Pure.

The description is the layout of docs/wire-protocol.md as rank 0 has it: bytes of a row of every tensor, where
a KV or window row is a page and a state row is one request's. Every rank sends its own rows, so a prompt's
bytes are those of one rank times the tensor-parallel size.
"""

from __future__ import annotations

import msgspec

from cache_service.core.errors import RemoteProtocolError
from router.core.profile import KvShape


class Component(msgspec.Struct, frozen=True):
    """One group of tensors: what it holds, bytes of one row of each."""

    kind: str
    row_bytes: list[int]


class Layout(msgspec.Struct, frozen=True):
    """What of the layout matters here; other fields are ignored."""

    engine: str
    model: str
    page_size: int
    kv_dtype: str
    tp_size: int
    components: list[Component]


class Pools(msgspec.Struct, frozen=True):
    """The answer to GET /layout.

    Attributes:
        window_tokens: sliding window of the model, 0 for none.
    """

    layout: Layout
    fingerprint: str
    window_tokens: int = 0


def parse(body: bytes) -> Pools:
    """Return what a worker told. Raises RemoteProtocolError naming the field that is wrong."""
    try:
        pools = msgspec.json.decode(body, type=Pools)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise RemoteProtocolError(f"layout: {error}") from None
    layout = pools.layout
    for field, value in (("page_size", layout.page_size), ("tp_size", layout.tp_size)):
        if not 1 <= value <= 1 << 20:
            raise RemoteProtocolError(f"layout.{field}: {value} is not in 1..{1 << 20}")
    if not any(c.kind == "kv" for c in layout.components):
        raise RemoteProtocolError("layout.components: none of kind kv")
    if any(size < 0 for c in layout.components for size in c.row_bytes):
        raise RemoteProtocolError("layout.components: a row of less than 0 bytes")
    if pools.window_tokens < 0:
        raise RemoteProtocolError("window_tokens: is below 0")
    return pools


def kv_shape(pools: Pools) -> KvShape:
    """Return S_kv of the pools: KV per token, window, and what travels once (state and metadata)."""
    layout = pools.layout

    def row(*kinds: str) -> int:
        rows = (sum(c.row_bytes) for c in layout.components if c.kind in kinds)
        return sum(rows) * layout.tp_size

    window = row("swa")
    others = {c.kind for c in layout.components} - {"kv", "swa"}
    return KvShape(
        bytes_per_token=row("kv") / layout.page_size,
        state_bytes=float(row(*others)),
        window_bytes_per_token=window / layout.page_size,
        window_tokens=pools.window_tokens if window else 0,
        page_tokens=layout.page_size,
    )
