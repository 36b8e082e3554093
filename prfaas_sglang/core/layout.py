"""What a worker's pools look like on the wire, and whether two workers' layouts may exchange KV.

A transfer moves **rows**: a row of a KV tensor is one page of one layer's K or V, a row of a state tensor
is one request's linear state (or one window page) of one layer, a row of an aux tensor is one request's
metadata.
Rows of equal layouts are byte-for-byte exchangeable; anything else is refused before the first byte.
The facts come from SGLang's `KVArgs` (`disaggregation/base/conn.py`, 0.5.21).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from cache_service.core.errors import ConfigError, RemoteProtocolError
from cache_service.core.ids import parse_name

#: Component number of the KV pages; state components follow as 1, 2, ...; the aux component is the last.
KV = 0
#: Element types that a component may name, and their bytes.
ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1}
_MAX_TENSORS = 8192
_MAX_ROW_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Component:
    """One group of tensors that share row numbers.

    Attributes:
        kind: "kv", a state type of SGLang ("mamba", "swa", ...), or "aux".
        row_bytes: bytes of one row, per tensor.
        layer_ids: model layer of each tensor, () where the engine does not say.
        element: one of ELEMENT_BYTES, what all its rows consist of; "" where the engine does not say.
    """

    kind: str
    row_bytes: tuple[int, ...]
    layer_ids: tuple[int, ...] = ()
    element: str = ""

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one row over all tensors."""
        return sum(self.row_bytes)


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything that must be equal on both sides of a transfer.

    Attributes:
        engine: engine name and version, e.g. "sglang 0.5.21" (the aux row's format depends on it).
        model: served model name.
        page_size: tokens per page.
        kv_dtype: KV cache dtype as the engine names it.
        tp_size: attention tensor-parallel size; rows are sharded by it.
        components: KV first, then the state components, then aux.
    """

    engine: str
    model: str
    page_size: int
    kv_dtype: str
    tp_size: int
    components: tuple[Component, ...]

    @property
    def states(self) -> tuple[Component, ...]:
        """The state components, in grant order."""
        return self.components[1:-1]

    @property
    def aux(self) -> int:
        """Number of the aux component."""
        return len(self.components) - 1

    def fingerprint(self) -> str:
        """Return 32 hex digits that are equal exactly when the layouts are."""
        return hashlib.sha256(json.dumps(to_json(self), sort_keys=True).encode()).hexdigest()[:32]


def to_json(layout: Layout) -> dict[str, Any]:
    """Return the layout as JSON values."""
    return {
        "engine": layout.engine,
        "model": layout.model,
        "page_size": layout.page_size,
        "kv_dtype": layout.kv_dtype,
        "tp_size": layout.tp_size,
        "components": [_component_json(c) for c in layout.components],
    }


def _component_json(component: Component) -> dict[str, Any]:
    value: dict[str, Any] = {
        "kind": component.kind,
        "row_bytes": list(component.row_bytes),
        "layer_ids": list(component.layer_ids),
    }
    return {**value, "element": component.element} if component.element else value


def differences(ours: Layout, theirs: dict[str, Any]) -> list[str]:
    """Return one line per field in which a peer's layout (its JSON values) differs from ours, [] if equal."""
    mine = to_json(ours)
    found = [
        f"{key}: {_short(mine[key])} here, {_short(theirs.get(key))} at the peer"
        for key in ("engine", "model", "page_size", "kv_dtype", "tp_size")
        if mine[key] != theirs.get(key)
    ]
    mine_components, their_components = mine["components"], theirs.get("components")
    if mine_components != their_components:
        if not isinstance(their_components, list) or len(their_components) != len(mine_components):
            here, there = _kinds(mine_components), _kinds(their_components)
            found.append(f"components: {here} here, {there} at the peer")
        else:
            for i, (a, b) in enumerate(zip(mine_components, their_components, strict=True)):
                if a != b:
                    found.append(f"components[{i}] ({a['kind']}): {_short(a)} here, {_short(b)} at the peer")
    return found


def _kinds(components: object) -> str:
    if not isinstance(components, list):
        return "none"
    kinds = ", ".join(str(c.get("kind"))[:16] if isinstance(c, dict) else "?" for c in components[:16])
    return kinds.encode("unicode_escape").decode() or "none"


def _short(value: object, limit: int = 120) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:  # a peer's value that could just be parsed
        return "nested too deep"
    return text if len(text) <= limit else text[: limit - 3] + "..."


# --- hello ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello:
    """The first frame each side sends.

    Attributes:
        role: "prefill" or "decode".
        site: site name, for logs and metrics.
        worker: worker name, likewise.
        rank: attention tensor-parallel rank; rank r of decode talks to rank r of prefill.
        layout: the sender's layout as JSON values (checked with `differences`).
        bundle: random id of the bundle of connections that this one belongs to, chosen by decode.
        index: this connection's number in the bundle; 0 carries grants, acknowledgements and aborts.
        codecs: codecs of DATA frames that this side sends and accepts, besides 0 (rows as they are).
    """

    role: str
    site: str
    worker: str
    rank: int
    layout: dict[str, Any]
    bundle: str = ""
    index: int = 0
    codecs: tuple[int, ...] = ()


#: Connections in one bundle, at most.
MAX_CONNECTIONS = 64
MAX_RANK = 65535
MAX_CODECS = 16


def encode_hello(hello: Hello) -> bytes:
    """Return a HELLO payload."""
    return json.dumps(
        {
            "role": hello.role,
            "site": hello.site,
            "worker": hello.worker,
            "rank": hello.rank,
            "layout": hello.layout,
            "bundle": hello.bundle,
            "index": hello.index,
            "codecs": list(hello.codecs),
        }
    ).encode()


def decode_hello(payload: bytes) -> Hello:
    """Parse a HELLO payload. Raises RemoteProtocolError naming the field that is wrong."""
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError):
        raise RemoteProtocolError("hello: not JSON", reason="hello") from None
    if not isinstance(value, dict):
        raise RemoteProtocolError("hello: not an object", reason="hello")
    fields = (
        ("role", str),
        ("site", str),
        ("worker", str),
        ("rank", int),
        ("layout", dict),
        ("bundle", str),
        ("index", int),
    )
    for key, kind in fields:
        if type(value.get(key)) is not kind:  # not isinstance: JSON's true is no number
            raise RemoteProtocolError(f"hello.{key}: missing or not {kind.__name__}", reason="hello")
    if value["role"] not in ("prefill", "decode"):
        raise RemoteProtocolError("hello.role: accepted values are prefill and decode", reason="hello")
    for key in ("site", "worker"):  # they become log fields and metric labels
        try:
            parse_name(value[key], field=f"hello.{key}")
        except ConfigError:
            raise RemoteProtocolError(f"hello.{key}: is not a name", reason="hello") from None
    if not 0 <= value["rank"] <= MAX_RANK:
        raise RemoteProtocolError(f"hello.rank: not in 0..{MAX_RANK}", reason="hello")
    if not 0 <= value["index"] < MAX_CONNECTIONS:
        raise RemoteProtocolError(f"hello.index: not in 0..{MAX_CONNECTIONS - 1}", reason="hello")
    if len(value["bundle"]) > 64 or not value["bundle"].isascii() or not value["bundle"].isprintable():
        raise RemoteProtocolError("hello.bundle: not up to 64 ASCII characters", reason="hello")
    codecs = value.get("codecs", [])
    if not isinstance(codecs, list) or len(codecs) > MAX_CODECS:
        raise RemoteProtocolError(f"hello.codecs: not a list of up to {MAX_CODECS}", reason="hello")
    if not all(type(codec) is int and 0 <= codec <= 255 for codec in codecs):
        raise RemoteProtocolError("hello.codecs: not numbers in 0..255", reason="hello")
    return Hello(**{key: value[key] for key, _ in fields}, codecs=tuple(codecs))


def check_layout(layout: Layout) -> None:
    """Raise ValueError when our own engine describes pools that this protocol cannot carry."""
    tensors = sum(len(c.row_bytes) for c in layout.components)
    if len(layout.components) < 2 or layout.components[0].kind != "kv" or layout.components[-1].kind != "aux":
        raise ValueError("layout: components must be kv, the states, aux")
    if tensors > _MAX_TENSORS:
        raise ValueError(f"layout: {tensors} tensors, at most {_MAX_TENSORS}")
    for component in layout.components:
        for row_bytes in component.row_bytes:
            if not 0 < row_bytes <= _MAX_ROW_BYTES:
                raise ValueError(f"layout: {component.kind} row of {row_bytes} bytes")
            if component.element and row_bytes % ELEMENT_BYTES.get(component.element, row_bytes + 1):
                raise ValueError(
                    f"layout: {component.kind} row of {row_bytes} bytes of {component.element}; "
                    f"elements are {', '.join(ELEMENT_BYTES)}"
                )
