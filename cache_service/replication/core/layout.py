"""Keys and values of a delta log in etcd: docs/etcd.md, "Delta logs".

Decides names and bytes only. A log lives below `/prfaas/v1/seg/<namespace>/<site>/`:

    epoch                       "<epoch> <writer>": the writer that may append; without a lease
    head                        which snapshot the log stands on (Head)
    snap/<epoch>-<seq>/<part>   that snapshot, framed
    log/<epoch>/<seq>/<part>    segments above it, framed

Numbers in keys are hexadecimal of fixed width, so keys sort as their numbers do. A framed value is 13 bytes
(format, part, parts, CRC-32 of the part) and the part. Whatever does not parse raises RemoteProtocolError.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from cache_service.core.errors import RemoteProtocolError
from cache_service.core.ids import Namespace, SiteId

ROOT = b"/prfaas/v1/"
#: etcd takes 1.5 MiB in a request; small values keep its latency low for everyone else.
MAX_PART_BYTES = 256 * 1024
#: A segment or snapshot of 2^25 blocks: what a reader assembles in memory, at most.
MAX_PARTS = 1024
MAX_NUMBER = (1 << 48) - 1
_FRAME = struct.Struct("<BIII")
_FORMAT = 1
_HEAD = struct.Struct("<BQQI")
_EPOCH = re.compile(rb"([0-9]{1,15}) ([A-Za-z0-9._-]{1,128})")
_PART_KEY = re.compile(rb"(snap/[0-9a-f]{12}-|log/[0-9a-f]{12}/)([0-9a-f]{12})/([0-9a-f]{4})")


def namespace_id(namespace: Namespace) -> str:
    """Return the 16 hexadecimal digits that stand for a namespace in keys; the salt does not count."""
    fields = {name: value for name, value in asdict(namespace).items() if name != "salt"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class PartKey:
    """What the key of a framed value says: whether of a snapshot or of the log, of what, which part."""

    snapshot: bool
    epoch: int
    seq: int
    part: int


@dataclass(frozen=True, slots=True)
class Head:
    """The snapshot that a log stands on: everything up to `seq` of `epoch`; 0 parts say "nothing"."""

    epoch: int
    seq: int
    parts: int

    def encode(self) -> bytes:
        """Return the value of the key `head`."""
        return _HEAD.pack(_FORMAT, self.epoch, self.seq, self.parts)

    @classmethod
    def decode(cls, value: bytes) -> Head:
        """Read the value of the key `head`."""
        if len(value) != _HEAD.size or value[0] != _FORMAT:
            raise RemoteProtocolError(f"head: {len(value)} bytes that are no head", reason="malformed")
        _, epoch, seq, parts = _HEAD.unpack(value)
        if epoch > MAX_NUMBER or seq > MAX_NUMBER or parts > MAX_PARTS:
            raise RemoteProtocolError("head: a number is out of bounds", reason="malformed")
        return cls(epoch, seq, parts)


class LogKeys:
    """The keys of one site's log of one namespace."""

    def __init__(self, namespace: Namespace, site: SiteId) -> None:
        self.prefix = ROOT + f"seg/{namespace_id(namespace)}/{site}/".encode()
        self.epoch = self.prefix + b"epoch"
        self.head = self.prefix + b"head"
        self.log = self.prefix + b"log/"
        self.snapshots = self.prefix + b"snap/"

    def segment(self, epoch: int, seq: int, part: int = 0) -> bytes:
        """Return the key of a part of a segment."""
        return self.log + b"%012x/%012x/%04x" % (epoch, seq, part)

    def snapshot(self, epoch: int, seq: int) -> bytes:
        """Return what the keys of a snapshot's parts begin with."""
        return self.snapshots + b"%012x-%012x/" % (epoch, seq)

    def parse(self, key: bytes) -> PartKey | None:
        """Return what a key says, None for `epoch`, `head` and keys that are not ours."""
        found = _PART_KEY.fullmatch(key, len(self.prefix))
        if found is None:
            return None
        kind, _, epoch = found[1].rstrip(b"-/").partition(b"/")
        return PartKey(kind == b"snap", int(epoch, 16), int(found[2], 16), int(found[3], 16))


def encode_epoch(epoch: int, writer: str) -> bytes:
    """Return the value of the key `epoch`."""
    return b"%d %s" % (epoch, writer.encode("ascii"))


def decode_epoch(value: bytes) -> int:
    """Return the number in the value of the key `epoch`."""
    found = _EPOCH.fullmatch(value)
    if found is None:
        raise RemoteProtocolError(f"epoch: {value[:64]!r} is no epoch", reason="malformed")
    return int(found[1])


def frames(payload: bytes) -> list[bytes]:
    """Cut a payload to framed values, at least one. Raises RemoteProtocolError past MAX_PARTS."""
    pieces = [payload[at : at + MAX_PART_BYTES] for at in range(0, max(len(payload), 1), MAX_PART_BYTES)]
    if len(pieces) > MAX_PARTS:
        raise RemoteProtocolError(
            f"segment: {len(payload)} bytes, at most {MAX_PARTS * MAX_PART_BYTES}", reason="too_large"
        )
    return [
        _FRAME.pack(_FORMAT, number, len(pieces), zlib.crc32(piece)) + piece
        for number, piece in enumerate(pieces)
    ]


def open_frame(key: PartKey, value: bytes) -> tuple[int, bytes]:
    """Return how many parts there are and this part's bytes."""
    if len(value) < _FRAME.size or len(value) > _FRAME.size + MAX_PART_BYTES:
        raise RemoteProtocolError(f"part {key}: {len(value)} bytes", reason="malformed")
    form, part, parts, checksum = _FRAME.unpack_from(value)
    piece = value[_FRAME.size :]
    if form != _FORMAT or part != key.part or not part < parts <= MAX_PARTS:
        raise RemoteProtocolError(f"part {key}: its frame says {form}, {part}, {parts}", reason="malformed")
    if zlib.crc32(piece) != checksum:
        raise RemoteProtocolError(f"part {key}: wrong checksum", reason="malformed")
    return parts, piece


def join(pieces: Sequence[bytes]) -> bytes:
    """Return the payload of all parts."""
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
