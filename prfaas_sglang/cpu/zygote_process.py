"""The fork server itself: imports everything a CPU worker needs, then forks one child per request.

Single-threaded until it forks (OMP_NUM_THREADS=1, no tokenizer or gRPC threads), because only the forking
thread survives in a child. In a worker SGLang's `spawn` of scheduler and detokenizer becomes `fork`, so they
inherit the imports and the replaced functions too.

Nothing outlives its parent: this process ends with the launcher (end of file on the control socket, or a
new parent; not the parent-death signal, which comes when the *thread* that forked ends), a worker with this
process, scheduler and detokenizer with their worker (prctl(2), PR_SET_PDEATHSIG). What SGLang reads from the
environment while it is imported is the same for all workers; the rest is each worker's own.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from typing import Any, NoReturn

import numpy

from cache_service.core.errors import UnsupportedEngine
from prfaas_sglang.cpu import environment

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
#: How often the loop looks whether the launcher still lives, beside the control socket's end of file.
PARENT_CHECK_MS = 1000

#: What the three processes of a server import.
PRELOADED = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.disaggregation.prefill",
    "sglang.srt.disaggregation.decode",
    "sglang.srt.disaggregation.kv_events",
    "sglang.srt.layers.attention.torch_native_backend",
    "sglang.srt.layers.attention.hybrid_linear_attn_backend",
    "sglang.launch_server",
    "prfaas_sglang.cpu.hooks",
)
#: Reads the environment of one worker while it is imported: SGLang's --enable-metrics sets
#: PROMETHEUS_MULTIPROC_DIR in the worker first.
NOT_PRELOADED = "prometheus_client"


def prctl(option: int, value: int) -> None:
    """Set a process attribute. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def die_with_parent(parent: int) -> None:
    """Ask the kernel for SIGKILL when the parent ends; end at once when it has ended already."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def thread_count() -> int:
    """Return how many threads this process has, native ones included."""
    return len(os.listdir("/proc/self/task"))


def preload() -> None:
    """Import and hook everything; raises what an import raises."""
    gc.disable()  # imports make no garbage worth a collection: 4.6 s instead of 5.8 s
    environment.activate()
    from prfaas_sglang.engine.compat import require_supported_engine

    require_supported_engine()
    for name in PRELOADED:
        importlib.import_module(name)
    from prfaas_sglang.cpu import hooks

    hooks.install()
    _import_models()
    if NOT_PRELOADED in sys.modules:
        raise UnsupportedEngine(f"{NOT_PRELOADED} was imported too early: workers could not serve metrics")
    gc.collect()
    gc.freeze()  # what is shared stays shared: no collection in a child writes to these pages
    gc.enable()


def _import_models() -> None:
    """Import the model classes of the supported families, as the registry would on first use."""
    for name in ("qwen3", "qwen3_5", "qwen3_next", "gemma3_causal"):
        importlib.import_module(f"sglang.srt.models.{name}")


def fork_instead_of_spawn() -> None:
    """Make every start method of multiprocessing fork in this process; SGLang asks for spawn.

    Children start like spawned ones: without this process's signal handlers, and bound to its life.
    """
    from multiprocessing import context

    forking: list[int] = []

    def in_child() -> None:
        die_with_parent(forking[-1])
        for number in (signal.SIGQUIT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)

    os.register_at_fork(before=lambda: forking.append(os.getpid()), after_in_child=in_child)
    fork = context.ForkContext()
    for method in ("spawn", "forkserver"):
        context._concrete_contexts[method] = fork  # type: ignore[attr-defined]
    context._default_context.set_start_method("fork", force=True)


def run_worker(request: dict[str, Any], parent: int, inherited: list[int]) -> NoReturn:
    """Become the worker of `request`; never returns."""
    status = 1
    try:
        die_with_parent(parent)
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        for descriptor in inherited:
            os.close(descriptor)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        os.environ.update(request["env"])
        numpy.random.seed()  # the one generator that does not notice the fork
        fork_instead_of_spawn()
        serve(request["name"], request["argv"])
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        if end.code is not None and not isinstance(end.code, int):
            sys.stderr.write(f"{end.code}\n")
    except BaseException:  # noqa: BLE001 - the top of a process: report and exit
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve(name: str, argv: list[str]) -> None:
    """Run SGLang's server as its own command line would."""
    import setproctitle
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    setproctitle.setproctitle(f"prfaas::{name}")
    sys.argv = ["sglang.launch_server", *argv]
    load_plugins()
    try:
        run_server(prepare_server_args(argv))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


class Server:
    """The loop: requests in, forks and exit statuses out."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        os.set_blocking(self._wake_read, False)
        self._workers: set[int] = set()
        self._parent = os.getppid()

    def run(self) -> None:
        """Serve until the launcher goes."""
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        poller.register(self._wake_read, select.POLLIN)
        pending = b""
        while os.getppid() == self._parent:
            for descriptor, _ in poller.poll(PARENT_CHECK_MS):
                if descriptor == self._wake_read:
                    os.read(self._wake_read, 4096)
                    self._reap()
                    continue
                data = self._control.recv(65536)
                if not data:
                    return
                *lines, pending = (pending + data).split(b"\n")
                for line in lines:
                    self._spawn(json.loads(line)["spawn"])

    def kill_workers(self) -> None:
        """End every worker's process group."""
        for pid in self._workers:
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def _spawn(self, request: dict[str, Any]) -> None:
        if (threads := thread_count()) != 1:
            self.say(failed=request["name"], error=f"the fork server has {threads} threads")
            return
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            self.say(failed=request["name"], error=str(error))
            return
        if pid == 0:
            run_worker(request, parent, [self._control.fileno(), self._wake_read, self._wake_write])
        self._workers.add(pid)
        self.say(spawned=request["name"], pid=pid)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self._workers:  # others are what a dead worker left behind
                self._workers.discard(pid)
                self.say(exited=pid, status=os.waitstatus_to_exitcode(status))

    def say(self, **message: object) -> None:
        """Tell the launcher; it may be gone, then the loop ends on its own."""
        try:
            self._control.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            sys.stderr.write(f"zygote: launcher is gone: {error}\n")


def main() -> None:
    """Run the fork server on the control socket whose descriptor is the only argument."""
    started = time.monotonic()
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    control = socket.socket(fileno=int(sys.argv[1]))
    preload()
    server = Server(control)
    server.say(ready=time.monotonic() - started)
    try:
        server.run()
    finally:
        server.kill_workers()


if __name__ == "__main__":
    main()
