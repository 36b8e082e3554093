"""The fork server of the fault tests: the real one, and a probe in each scheduler that counts what it holds.

SGLang tells a client neither its free metadata rows nor its threads, and what its HTTP answers round is not
enough to find one leaked page. The probe only reads. It answers each connection to the UNIX socket named by
PROBE_VARIABLE with one JSON object (`counts`) and needs no network namespace.

`python -m tests.e2e.wan.inside FD`, as `python -m prfaas_sglang.cpu.zygote_process FD`.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from prfaas_sglang.cpu import zygote_process

PROBE_VARIABLE = "PRFAAS_TEST_PROBE"
#: What SGLang's CommonKVManager keeps per room; all must be empty between requests.
ROOM_TABLES = ("request_status", "failure_records", "req_to_decode_prefix_len", "transfer_infos")


def counts(scheduler: Any) -> dict[str, Any]:
    """Return what a scheduler process holds.

    `used`: pages (in tokens) and rows that no cache entry and no free list accounts for, and requests queued.
    `threads`: Python threads by name; `native_threads`: all of them. `sockets`, `files`: descriptors.
    """
    pools = scheduler.pool_stats_observer.get_pool_stats()
    slots = scheduler.req_to_token_pool
    rows = scheduler.req_to_metadata_buffer_idx_allocator
    used = {
        name: int(getattr(pools, name))
        for name in ("full_num_used", "swa_num_used", "mamba_num_used")
        if getattr(pools, name, None) is not None
    }
    used["request_slots"] = slots.size + getattr(slots, "pre_alloc_size", 0) - len(slots.free_slots)
    used["metadata_rows"] = rows.size - rows.available_size()
    used["not_idle"] = int(not scheduler.is_fully_idle())
    queue = scheduler.disagg_prefill_bootstrap_queue or scheduler.disagg_decode_prealloc_queue
    used.update({name: len(getattr(queue.kv_manager, name, ())) for name in ROOM_TABLES})
    kinds = Counter(_kind(path) for path in Path("/proc/self/fd").iterdir())
    return {
        "used": used,
        "threads": sorted(t.name for t in threading.enumerate()),
        "native_threads": zygote_process.thread_count(),
        "sockets": kinds["socket"],
        "files": kinds["other"],
    }


def _kind(path: Path) -> str:
    try:
        return "socket" if os.readlink(path).startswith("socket:") else "other"
    except FileNotFoundError:  # the listing's own descriptor, or one closed meanwhile
        return "gone"


def _answer_forever(listener: socket.socket, scheduler: Any) -> None:
    while True:
        connection, _ = listener.accept()
        with connection:
            try:
                answer = counts(scheduler)
            except (RuntimeError, ValueError) as error:  # a container changed while it was read
                answer = {"again": str(error)}
            connection.sendall(json.dumps(answer).encode())


def _install() -> None:
    from sglang.srt.managers.scheduler import Scheduler

    original = Scheduler.init_disaggregation

    def init_disaggregation(self: Any) -> None:
        original(self)
        path = os.environ.get(PROBE_VARIABLE)
        if path:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(path)
            listener.listen()
            threading.Thread(
                target=_answer_forever, args=(listener, self), name="test-probe", daemon=True
            ).start()

    Scheduler.init_disaggregation = init_disaggregation


def main() -> None:
    """Run the fork server with the probe."""
    preload = zygote_process.preload

    def preload_and_install() -> None:
        preload()
        _install()

    zygote_process.preload = preload_and_install
    zygote_process.main()


if __name__ == "__main__":
    main()
