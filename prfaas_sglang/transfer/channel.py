"""A connection between one prefill rank and one decode rank: handshake, a reader and a writer thread.

Decides nothing about transfers: frames go to a `Handler`, and what to write next comes from the bundle.
Guarantees: hellos and layouts were exchanged and compared before the first other frame; a silent peer is
found within PING_S * MISSED; `Handler.lost` is called exactly once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from cache_service.core.errors import PrfaasError, RemoteProtocolError
from prfaas_sglang.core.framing import (
    RAW,
    FrameType,
    Header,
    decode_reason,
    encode_reason,
    encode_room,
)
from prfaas_sglang.core.layout import Hello, Layout, decode_hello, differences, encode_hello, to_json
from prfaas_sglang.transfer.bundle import Bundle
from prfaas_sglang.transfer.wire import Buffer, ConnectionLost, Wire

logger = logging.getLogger(__name__)

PING_S = 5.0
MISSED = 3
#: For both hellos together, however slowly their bytes come.
HANDSHAKE_S = 10.0
#: How long a failed write waits for what the peer still had to say.
LAST_WORDS_S = 1.0


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this side is.

    Attributes:
        role: "prefill" or "decode".
        site, worker: names for logs and metrics.
        rank: attention tensor-parallel rank.
        layout: pools' layout.
        peer_sites: sites whose workers are talked to, empty for any.
        codecs: codecs of DATA frames that are sent and accepted.
    """

    role: str
    site: str
    worker: str
    rank: int
    layout: Layout
    peer_sites: tuple[str, ...] = ()
    codecs: frozenset[int] = frozenset({RAW})

    def hello(self, bundle: str = "", index: int = 0) -> bytes:
        """Return this side's HELLO payload."""
        layout = to_json(self.layout)
        codecs = tuple(sorted(self.codecs))
        return encode_hello(
            Hello(self.role, self.site, self.worker, self.rank, layout, bundle, index, codecs)
        )


class LayoutMismatch(RemoteProtocolError):
    """The pools of a peer whom we would talk to are laid out differently: no KV may move between the two.

    `peer` is what it said of itself.
    """

    reason = "layout"

    def __init__(self, peer: Hello, found: Sequence[str]) -> None:
        super().__init__("layouts differ: " + "; ".join(found[:4]))
        self.peer = peer


class Handler(Protocol):
    """What a channel's owner does with its frames; called on the reader thread."""

    def frame(self, channel: Channel, header: Header) -> None:
        """Handle one frame; must consume its payload from `channel.wire`."""

    def lost(self, channel: Channel, error: PrfaasError) -> None:
        """The channel ended; called once."""


def no_rooms() -> Sequence[int]:
    """Nothing to take back."""
    return ()


def dial_hello(
    wire: Wire, identity: Identity, bundle: str, index: int, parting: Callable[[], Sequence[int]] = no_rooms
) -> Hello:
    """Introduce ourselves on a connection that we dialed, as number `index` of a bundle; judge the answer.

    When one refuses the other, the rooms that `parting` returns are cancelled before the connection ends.

    Raises LayoutMismatch or RemoteProtocolError (after telling the peer why), ConnectionLost.
    """
    with wire.within(HANDSHAKE_S):
        wire.send(FrameType.HELLO, 0, [identity.hello(bundle, index)])
        return _receive_hello(wire, identity, parting)


def receive_hello(wire: Wire, identity: Identity) -> Hello:
    """Read and judge the peer's hello. A listener answers with its own once the peer is admitted.

    Raises as `dial_hello`.
    """
    with wire.within(HANDSHAKE_S):
        return _receive_hello(wire, identity, no_rooms)


def _receive_hello(wire: Wire, identity: Identity, parting: Callable[[], Sequence[int]]) -> Hello:
    header = wire.read_header(HANDSHAKE_S)
    if header is None:
        raise ConnectionLost(f"no hello within {HANDSHAKE_S:.0f} s")
    if header.type is FrameType.ABORT:
        reason = decode_reason(wire.read_payload(header))
        _cancel(wire, parting())
        raise RemoteProtocolError(f"peer refused: {reason}", reason="refused")
    if header.type is not FrameType.HELLO:
        raise RemoteProtocolError(f"{header.type.name} before HELLO", reason="handshake")
    try:
        hello = decode_hello(wire.read_payload(header))
        wire.check_site(hello.site)
        _check_peer(hello, identity)
    except RemoteProtocolError as error:
        _cancel(wire, parting())
        refuse(wire, error)
        raise
    return hello


def _cancel(wire: Wire, rooms: Sequence[int]) -> None:
    with suppress(PrfaasError):
        for room in rooms:
            wire.send(FrameType.CANCEL, 0, [encode_room(room)])


def _check_peer(hello: Hello, identity: Identity) -> None:
    """Raise RemoteProtocolError when the peer is nobody to exchange KV with."""
    if identity.peer_sites and hello.site not in identity.peer_sites:
        raise RemoteProtocolError(
            f"hello.site: {hello.site} is not in peer_sites of {identity.worker}", reason="site"
        )
    if hello.role == identity.role:
        raise RemoteProtocolError(f"hello.role: both sides are {hello.role}", reason="role")
    if hello.rank != identity.rank:
        raise RemoteProtocolError(f"hello.rank: {hello.rank}, this is rank {identity.rank}", reason="rank")
    found = differences(identity.layout, hello.layout)
    if found:
        raise LayoutMismatch(hello, found)


def refuse(wire: Wire, error: PrfaasError) -> None:
    """Tell the peer why its connection ends, if it still listens."""
    with suppress(PrfaasError):
        wire.send(FrameType.ABORT, 0, [encode_reason(str(error))])


class Channel:
    """One live connection after its handshake.

    Args:
        wire: the connected wire, hellos exchanged.
        peer: what the peer said of itself.
        handler: gets the frames.
        bundle: the bundle it belongs to, where its writer finds work.
        index: its number there.
    """

    def __init__(self, wire: Wire, peer: Hello, handler: Handler, bundle: Bundle, index: int) -> None:
        self.wire = wire
        self.peer = peer
        self.bundle = bundle
        self.index = index
        self._handler = handler
        self._over = threading.Event()
        self._read_to_end = threading.Event()
        self._error: PrfaasError | None = None
        self._error_lock = threading.Lock()
        name = f"prfaas-{peer.worker}-{index}"
        self._reader = threading.Thread(target=self._read_loop, name=name + "-in", daemon=True)
        self._writer = threading.Thread(target=self._write_loop, name=name + "-out", daemon=True)

    def start(self) -> None:
        """Start both threads."""
        self._writer.start()
        self._reader.start()

    def never_started(self, error: PrfaasError) -> None:
        """End a channel whose threads were not started."""
        self.fail(error)
        self.wire.release()
        self._over.set()
        self._handler.lost(self, error)

    def post(self, kind: FrameType, transfer: int, parts: Sequence[Buffer] = ()) -> None:
        """Send a control frame from this connection's writer thread, before any data; returns at once.

        A peer that makes us say more than it reads loses its connection.
        """
        if not self.bundle.post(self.index, kind, transfer, parts):
            self.fail(ConnectionLost("the peer does not read what it is told"))

    def fail(self, error: PrfaasError) -> None:
        """End the channel for a reason; idempotent, the first reason counts."""
        with self._error_lock:
            if self._error is None:
                self._error = error
        self.wire.close()
        self.bundle.wake()

    @property
    def failed(self) -> bool:
        """True once the channel has ended for whatever reason."""
        return self._error is not None

    def close(self) -> None:
        """End the channel in peace."""
        self.fail(ConnectionLost("closed by this side"))

    def join(self, timeout_s: float) -> None:
        """Wait for the end of the channel."""
        self._over.wait(timeout_s)

    # --- threads ---

    def _write_loop(self) -> None:
        try:
            while self.bundle.wait_for_work(self):
                # what goes next is decided as late as the socket allows
                self.wire.wait_writable()
                job = self.bundle.next_job(self)
                if job is not None:
                    job(self.wire)
        except ConnectionLost as error:
            # the peer may have said why before it closed: what the reader finds counts more
            self._read_to_end.wait(LAST_WORDS_S)
            self.fail(error)
        except PrfaasError as error:
            self.fail(error)
        except Exception as error:
            # a bug must end this connection, not the process
            logger.exception("channel_writer_failed")
            self.fail(RemoteProtocolError(f"internal: {error}", reason="internal"))

    def _read_loop(self) -> None:
        try:
            self._read_frames()
        except PrfaasError as error:
            self.fail(error)
            self._read_to_end.set()
        except Exception as error:
            # a bug in a handler must end this connection, not the process
            logger.exception("channel_reader_failed")
            self.fail(RemoteProtocolError(f"internal: {error}", reason="internal"))
            self._read_to_end.set()
        self._writer.join()
        self.wire.release()
        self._over.set()
        self._handler.lost(self, self._error or ConnectionLost("ended"))

    def _delivered_bytes(self) -> int:
        info = self.wire.tcp_info()
        return 0 if info is None else info.delivered_bytes

    def _read_frames(self) -> None:
        missed = acknowledged = 0
        while True:
            header = self.wire.read_header(PING_S)
            if header is None:
                delivered = self._delivered_bytes()
                # a peer that acknowledges lives; its answer may stand behind a long frame on a slow link
                missed = 0 if delivered > acknowledged else missed + 1
                acknowledged = delivered
                if missed >= MISSED:
                    raise ConnectionLost(f"peer silent for {PING_S * MISSED:.0f} s")
                self.post(FrameType.PING, 0)
                continue
            missed = 0
            match header.type:
                case FrameType.PING:
                    self.wire.read_payload(header)
                    self.post(FrameType.PONG, 0)
                case FrameType.PONG:
                    self.wire.read_payload(header)
                case FrameType.HELLO:
                    raise RemoteProtocolError("second HELLO", reason="handshake")
                case FrameType.ABORT if header.transfer == 0:
                    reason = decode_reason(self.wire.read_payload(header))
                    raise RemoteProtocolError(f"peer refused: {reason}", reason="refused")
                case _:
                    self._handler.frame(self, header)
