"""What Linux reports of one TCP connection (struct tcp_info, include/uapi/linux/tcp.h), the fields we use."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

#: Up to and including bytes_retrans (Linux 4.19); older kernels return less, the rest reads as zero.
_LAYOUT = struct.Struct("=8B24I4Q6I4Q2I2Q")

#: enum tcp_state (include/net/tcp_states.h).
_CLOSE_WAIT = 8


@dataclass(frozen=True, slots=True)
class TcpInfo:
    """One connection at one moment.

    Attributes:
        srtt_s, min_rtt_s: smoothed and least round trip, seconds.
        delivered_bytes: payload that arrived, as acknowledgements tell, selective ones included (in whole
            segments; unlike the cumulative count it does not stand still while a loss is repaired).
        received_bytes: payload received in order (a peer's FIN counts one).
        unacknowledged: segments on their way.
        closed_by_peer: it sent its FIN and we have not sent ours.
        sent_bytes, retransmitted_bytes: payload put on the wire so far, the second part of the first.
    """

    srtt_s: float
    min_rtt_s: float
    delivered_bytes: int
    received_bytes: int
    unacknowledged: int
    sent_bytes: int
    retransmitted_bytes: int
    closed_by_peer: bool


def read_tcp_info(sock: socket.socket) -> TcpInfo:
    """Read TCP_INFO. Raises OSError on a closed socket."""
    raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAYOUT.size)
    f = _LAYOUT.unpack(raw.ljust(_LAYOUT.size, b"\0"))
    # 8 bytes, then 24 u32 from index 8, 4 u64 from 32, 6 u32 from 36, 4 u64 from 42, 2 u32, 2 u64 from 48
    return TcpInfo(
        srtt_s=f[8 + 15] / 1e6,
        min_rtt_s=f[36 + 3] / 1e6,
        delivered_bytes=f[46] * f[8 + 2],
        received_bytes=f[35],
        unacknowledged=f[8 + 4],
        sent_bytes=f[48],
        retransmitted_bytes=f[48 + 1],
        closed_by_peer=f[0] == _CLOSE_WAIT,
    )
