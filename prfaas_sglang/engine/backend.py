"""SGLang's transfer-backend classes, thin: they translate between the scheduler's polls and our shells.

Everything here runs on the scheduler thread and returns at once; sockets live on the shells' own threads,
which report through `update_status`. A failure becomes a failed request with a reason, never an exception in
the scheduler. Built on SGLang 0.5.21's CommonKV* classes; their HTTP bootstrap registry and ZMQ control
sockets are not used: decode dials the prefill rank at bootstrap_host:(bootstrap_port + rank) directly.
"""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.disaggregation.base.conn import BaseKVBootstrapServer, KVPoll
from sglang.srt.disaggregation.common.conn import (
    CommonKVManager,
    CommonKVReceiver,
    CommonKVSender,
    KVTransferError,
    PrefillServerInfo,
)
from sglang.srt.disaggregation.utils import DisaggregationMode

from cache_service.core.addresses import split_address
from cache_service.core.errors import ConfigError, LocalProtocolError, PrfaasError, TransferError
from prfaas_sglang import config
from prfaas_sglang.core.compression import CODECS, Mode
from prfaas_sglang.core.framing import Grant
from prfaas_sglang.core.layout import to_json
from prfaas_sglang.engine import cuda, layerwise, pools
from prfaas_sglang.engine.hooks import announce_prompts
from prfaas_sglang.transfer import telemetry
from prfaas_sglang.transfer.channel import Identity
from prfaas_sglang.transfer.exporter import Exporter
from prfaas_sglang.transfer.importer import Importer
from prfaas_sglang.transfer.tls import Tls, TlsFiles

logger = logging.getLogger(__name__)

#: How long a thread may keep the interpreter when another wants it (Python's default is 5 ms).
SWITCH_S = 2e-4


class PrfaasManager(CommonKVManager):
    """One per scheduler rank: owns the exporter (prefill) or the importer (decode)."""

    def __init__(self, args: Any, mode: Any, server_args: Any, is_mla_backend: bool | None = False) -> None:
        worker = config.load()
        if worker is None:
            raise ConfigError(f"the prfaas transfer backend needs {config.ENVIRONMENT_VARIABLE}")
        self._worker = worker
        super().__init__(args, mode, server_args, is_mla_backend)
        announce_prompts()
        # the scheduler's thread must not wait long for the interpreter when ours run
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_S))
        self.server_socket.close(linger=0)  # the base class's control socket; nobody may talk to it
        model_config = ModelConfig.from_server_args(server_args)
        layout = pools.describe(
            args,
            model=server_args.served_model_name,
            tp_size=self.attn_tp_size,
            model_dtype=str(model_config.dtype).removeprefix("torch."),
        )
        memory = pools.pool_memory(args, layout, device=str(server_args.device))
        tls = None
        if worker.tls is not None:
            tls = Tls(TlsFiles(worker.tls.ca, worker.tls.cert, worker.tls.key))
        else:
            logger.warning("kv_in_the_clear worker=%s hint=set tls in PRFAAS_CONFIG", worker.worker_id)
        identity = Identity(
            mode.value,
            worker.site,
            worker.worker_id,
            self.attn_tp_rank,
            layout,
            worker.peer_sites,
            CODECS[Mode(worker.compression)],
        )
        self.telemetry = telemetry.Telemetry(worker.site)
        if mode == DisaggregationMode.PREFILL:
            self.exporter = Exporter(
                identity,
                memory,
                self.telemetry,
                on_grant=self._granted,
                on_done=lambda room: self.update_status(room, KVPoll.Success),
                on_failed=self.fail,
                frame_bytes=worker.frame_bytes,
                staging_bytes=worker.staging_bytes,
                hold_s=float(self.bootstrap_timeout),
                tls=tls,
            )
            self.layerwise = worker.layerwise
            if worker.layerwise:
                layerwise.install()
            port = self.exporter.listen(worker.listen_host, self.bootstrap_port + self.attn_tp_rank)
            logger.info("kv_export_listening port=%d layout=%s", port, layout.fingerprint())
        else:
            self.importer = Importer(
                identity,
                memory,
                self.telemetry,
                on_progress=lambda room: self.update_status(room, KVPoll.Transferring),
                on_done=lambda room: self.update_status(room, KVPoll.Success),
                on_failed=self.fail,
                connections=worker.connections,
                tls=tls,
            )
            logger.info("kv_import_ready layout=%s", layout.fingerprint())
        if worker.telemetry_listen and self.attn_tp_rank == 0:
            host, port = split_address(worker.telemetry_listen, field="telemetry_listen")
            shape = {
                "layout": to_json(layout),
                "fingerprint": layout.fingerprint(),
                "window_tokens": int(getattr(model_config, "sliding_window_size", None) or 0),
            }
            telemetry.serve(self.telemetry, host, port, shape)

    def register_to_bootstrap(self) -> None:
        """Nothing to register with: the listener itself is the registry."""

    def try_ensure_parallel_info(self, bootstrap_addr: str) -> bool:
        """Assume the peer is shaped like us, without asking over HTTP; the hello verifies it."""
        if bootstrap_addr not in self.prefill_info_table:
            info = PrefillServerInfo(
                attn_tp_size=self.attn_tp_size,
                attn_cp_size=1,
                dp_size=1,
                pp_size=1,
                page_size=self.kv_args.page_size,
                kv_cache_dtype=self.kv_cache_dtype_str,
                follow_bootstrap_room=True,
            )
            self._resolve_rank_mapping(info)
            self.prefill_info_table[bootstrap_addr] = info
        return True

    def fail(self, room: int, reason: str) -> None:
        """Fail a room that is still open, with its first reason."""
        if self.status(room) != KVPoll.Failed:
            self.record_failure(room, reason)
            self.update_status(room, KVPoll.Failed)

    def status(self, room: int) -> int:
        """Return the room's status, Failed when it is not known any more."""
        return int(self.request_status.get(room, KVPoll.Failed))

    def _granted(self, room: int, grant: Grant) -> None:
        # the request may not have reached this scheduler yet; its sender asks again (PrfaasSender.__init__)
        if room in self.request_status:
            self.update_status(room, KVPoll.WaitingForInput)


def _timed(call: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Measure the scheduler thread's time in a method."""

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def measured(self: Any, *args: Any, **kwargs: Any) -> Any:
            with self.kv_mgr.telemetry.scheduler_call(call):
                return method(self, *args, **kwargs)

        return measured

    return decorate


class _Failures:
    """How a failed sender or receiver tells the scheduler why."""

    kv_mgr: PrfaasManager
    bootstrap_room: int
    conclude_state: int | None
    failure_reason: str | None = None  #: of an abort, whose record is gone already

    def failure_exception(self) -> None:
        """Raise KVTransferError with the recorded reason."""
        self.conclude_state = KVPoll.Failed
        self.clear()  # type: ignore[attr-defined]
        with self.kv_mgr.failure_lock:
            reason = self.kv_mgr.failure_records.pop(self.bootstrap_room, self.failure_reason)
        raise KVTransferError(
            self.bootstrap_room, reason or "failed on another rank", is_from_another_rank=reason is None
        )

    def _concluded(self, timed: tuple[int, ...], check_timeout: Any) -> int:
        if self.conclude_state is not None:
            return self.conclude_state
        status = self.kv_mgr.status(self.bootstrap_room)
        if status in timed and check_timeout() is not None:
            status = KVPoll.Failed
        if status in (KVPoll.Success, KVPoll.Failed):
            self.conclude_state = status
        return status


class PrfaasSender(_Failures, CommonKVSender):
    """Prefill's half of one request."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.init_time = time.time()
        self._prompt_pages: int | None = None

    def announce(self, prompt_tokens: int) -> None:
        """Say how long the prompt is; called once, right after the constructor."""
        page_size = self.kv_mgr.kv_args.page_size
        self._prompt_pages = -(-prompt_tokens // page_size)
        self._open()

    def _open(self) -> None:
        """Let prefill begin when it may."""
        room = self.bootstrap_room
        if self._prompt_pages is None or self.kv_mgr.status(room) != KVPoll.Bootstrapping:
            return
        try:
            if self.kv_mgr.exporter.open(room, self._prompt_pages):
                self.kv_mgr.update_status(room, KVPoll.WaitingForInput)
        except PrfaasError as error:
            self._fail(error)

    def _fail(self, error: PrfaasError) -> None:
        self.kv_mgr.exporter.abort(self.bootstrap_room, str(error))
        self.kv_mgr.fail(self.bootstrap_room, str(error))

    def pop_decode_prefix_len(self) -> int:
        """Claim that decode holds nothing.

        Prefill may begin before decode says what it holds, and all ranks must claim the same; the exporter
        leaves out what need not travel.
        """
        return 0

    @_timed("sender_send")
    def send(
        self, kv_indices: Any, state_indices: list[Any] | None = None, num_kv_tokens: int | None = None
    ) -> None:
        """Queue one chunk of pages; with `state_indices`, the last one."""
        pages = np.asarray(kv_indices).reshape(-1).tolist()
        _, _, last, _ = self._prepare_send_indices(kv_indices, state_indices)
        self._record_transfer_indices(kv_indices, state_indices)
        try:
            with cuda.early_send(self):
                self.kv_mgr.exporter.send(
                    self.bootstrap_room,
                    pages,
                    states=_rows(state_indices) if last else None,
                    aux_row=self.aux_index if last else None,
                    last=last,
                )
        except PrfaasError as error:
            self._fail(error)

    def send_ahead(self, first: int, pages: Sequence[int], tensors: Sequence[int], mark: object) -> bool:
        """Queue tensors of prompt pages before their chunk (see layerwise.Sender)."""
        try:
            return self.kv_mgr.exporter.send_ahead(
                self.bootstrap_room, pages, tensors, first=first, mark=mark
            )
        except TransferError:
            return False  # it ended meanwhile; the next poll says so
        except PrfaasError as error:
            self._fail(error)
            return False

    def revoke(self, reason: str) -> None:
        """Fail the request: layers that went ahead were not final."""
        self._fail(LocalProtocolError(reason, reason="ahead"))

    @_timed("sender_poll")
    def poll(self) -> int:
        """Return the transfer's KVPoll; Success as soon as the engine may have its pages back."""
        if self.conclude_state is None:
            self._open()  # staging memory may have become free
        return self._concluded((KVPoll.Bootstrapping,), self._check_bootstrap_timeout)

    @_timed("sender_clear")
    def clear(self) -> None:
        """Forget the room; a transfer that does not go on from staging memory is given up."""
        self.kv_mgr.exporter.release(self.bootstrap_room)
        super().clear()

    def abort(self) -> None:
        """Give the transfer up on the scheduler's wish.

        A request that is aborted before its last chunk is not polled or cleared any more, so nothing of the
        room may stay in the manager's tables; `conclude_state` answers a poll that does come.
        """
        super().abort()
        self.kv_mgr.exporter.abort(self.bootstrap_room, "aborted at the prefill worker")
        self.kv_mgr.request_status.pop(self.bootstrap_room, None)
        with self.kv_mgr.failure_lock:
            self.failure_reason = self.kv_mgr.failure_records.pop(self.bootstrap_room, None)


class PrfaasReceiver(_Failures, CommonKVReceiver):
    """Decode's half of one request."""

    def _get_bootstrap_info_from_server(
        self, prefill_dp_rank: int, prefill_cp_rank: int, target_tp_rank: int, target_pp_rank: int
    ) -> dict[str, Any]:
        # SGLang asks a registry over HTTP here, on the scheduler thread; the address is known without asking
        host, port = split_address(self.bootstrap_addr, field="bootstrap_addr")
        return {"rank_ip": host, "rank_port": port + target_tp_rank, "pp_rank": target_pp_rank}

    _granted = False

    @_timed("receiver_init")
    def init(self, prefill_dp_rank: int) -> None:
        """Resolve the prefill rank and start dialing it."""
        super().init(prefill_dp_rank)
        if self.conclude_state is None:
            self.kv_mgr.importer.connect(self._address())

    def _address(self) -> tuple[str, int]:
        info = self.bootstrap_infos[0]
        return info["rank_ip"], info["rank_port"]

    @_timed("receiver_grant")
    def send_metadata(
        self,
        kv_indices: Any,
        aux_index: int | None = None,
        state_indices: list[Any] | None = None,
        decode_prefix_len: int | None = None,
        destination: Any = None,
    ) -> None:
        """Grant this request's pages, state rows and metadata row to the prefill rank."""
        self.init_time = time.time()
        self._granted = True
        self.kv_mgr.importer.begin(
            self.bootstrap_room,
            self._address(),
            np.asarray(kv_indices).reshape(-1).tolist(),
            states=_rows(state_indices),
            aux_row=int(aux_index if aux_index is not None else -1),
            prefix_tokens=int(decode_prefix_len or 0),
        )

    @_timed("receiver_poll")
    def poll(self) -> int:
        """Return the transfer's KVPoll."""
        return self._concluded((KVPoll.WaitingForInput, KVPoll.Transferring), self._check_waiting_timeout)

    @_timed("receiver_clear")
    def clear(self) -> None:
        """Forget the room; rows are not written any more when this returns."""
        self._give_up("decode released the request")
        super().clear()

    def _send_abort_notification(self, *, force_arm: bool = False) -> None:
        self._give_up("aborted at the decode worker")

    def _give_up(self, reason: str) -> None:
        if self._granted:
            self.kv_mgr.importer.abort(self.bootstrap_room, reason)
        elif getattr(self, "bootstrap_infos", None):
            self._granted = True  # once is enough
            self.kv_mgr.importer.cancel(self.bootstrap_room, self._address())


class PrfaasBootstrapServer(BaseKVBootstrapServer):
    """SGLang starts one per prefill server; ours is the exporter's listener, so there is nothing to do."""

    def __init__(self, host: str, port: int) -> None:
        logger.info("bootstrap_is_the_kv_listener host=%s port=%d", host, port)


def _rows(state_indices: list[Any] | None) -> list[list[int]]:
    """Return one flat list of row numbers per state component."""
    return [
        [] if component is None else [int(v) for v in np.asarray(component).reshape(-1)]
        for component in state_indices or []
    ]
