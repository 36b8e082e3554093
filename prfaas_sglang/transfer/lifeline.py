"""Decode's watch over the path to one prefill worker while it expects KV from it (`core/lifeline.py`)."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence

from prfaas_sglang.core.framing import FrameType
from prfaas_sglang.core.lifeline import KNOCK_S, Lifeline, Step
from prfaas_sglang.transfer.channel import Channel
from prfaas_sglang.transfer.imports import Address
from prfaas_sglang.transfer.wire import ConnectionLost

logger = logging.getLogger(__name__)

TICK_S = 0.1
IDLE_TICK_S = 0.8


def watch(address: Address, control: Channel, bundle: Callable[[], Sequence[Channel]]) -> None:
    """Watch a bundle on a thread of its own until its control connection ends.

    `bundle` returns its connections while something is expected of them, else nothing.
    """
    name = f"prfaas-lifeline-{address[0]}:{address[1]}"
    threading.Thread(target=_run, args=(address, control, bundle), name=name, daemon=True).start()


def _run(address: Address, control: Channel, bundle: Callable[[], Sequence[Channel]]) -> None:
    line = Lifeline()
    while not control.failed:
        infos = [info for channel in bundle() if (info := channel.wire.tcp_info()) is not None]
        if not infos:
            line.rest(time.monotonic())
            control.join(IDLE_TICK_S)
            continue
        rtt_s = max(info.min_rtt_s for info in infos)
        step = line.step(time.monotonic(), sum(info.received_bytes for info in infos), rtt_s)
        if step == Step.ASK:
            control.post(FrameType.PING, 0)
        elif step == Step.KNOCK:
            line.knocked(_knock(address, KNOCK_S + 4 * rtt_s))
        elif step == Step.REPLACE:
            logger.info("path_is_back address=%s:%d", *address)
            control.fail(ConnectionLost("silent, though the peer can be reached"))
        if step in (Step.WAIT, Step.ASK):
            control.join(TICK_S)


def _knock(address: Address, timeout_s: float) -> bool:
    """Say whether a new connection is answered, be it that nobody listens."""
    begin_s = time.monotonic()
    try:
        socket.create_connection(address, timeout=timeout_s).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        with contextlib.suppress(ValueError):  # an error at once must not become a busy loop
            time.sleep(timeout_s - (time.monotonic() - begin_s))
        return False
    return True
