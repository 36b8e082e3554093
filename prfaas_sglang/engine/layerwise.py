"""Layer-wise sending: a layer's KV leaves while the later layers of the same chunk are computed.

Two hooks on the scheduler's thread: around `Scheduler.run_batch`, which requests and pages are in the batch;
around the attention backend's `forward`, that a layer of it is final (in the order of the engine's stream).
Both are short and must not fail: whatever does not fit (see layerwise_plan) goes with its chunk as ever. What
went ahead and then turns out not to be final fails its request.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from prfaas_sglang.engine.layerwise_plan import Watch, final_pages, tensors_by_layer
from prfaas_sglang.transfer.telemetry import Telemetry

logger = logging.getLogger(__name__)


class Sender(Protocol):
    """A request's sender, as far as it takes layers ahead of their chunk."""

    def send_ahead(self, first: int, pages: Sequence[int], tensors: Sequence[int], mark: object) -> bool:
        """Queue tensors of prompt pages; False when this request cannot go ahead. Never raises."""

    def revoke(self, reason: str) -> None:
        """Fail the request: what went ahead was not final."""


@dataclass(slots=True)
class Span:
    """The pages of one request that a batch makes final."""

    sender: Sender
    request: Any
    first: int
    pages: tuple[int, ...]
    sent: bool = False

    def trim(self, page_size: int) -> None:
        """Leave out what was offered since the batch was planned: a cached prefix, before the forward."""
        offered = max(0, self.request.start_send_idx // page_size - self.first)
        self.first, self.pages = self.first + offered, self.pages[offered:]


@dataclass(slots=True)
class Follower:
    """Follows one scheduler's batches.

    Attributes:
        layers: KV tensors by layer.
        page_size: tokens per page.
        mark: the exporter's mark of the engine's work (see Exporter.mark).
        telemetry: where time and fallbacks are counted.
    """

    layers: Mapping[int, tuple[int, ...]]
    page_size: int
    mark: Any
    telemetry: Telemetry
    watch: Watch = field(init=False)
    _spans: list[Span] = field(default_factory=list)
    _tokens: int = -1  # of the batch, -1 outside one
    _requests: int = 0
    _trimmed: bool = False
    _told: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.watch = Watch(frozenset(self.layers))

    @contextmanager
    def batch(self, scheduler: Any, batch: Any) -> Iterator[None]:
        """Follow one prefill batch."""
        with self.telemetry.scheduler_call("layerwise_batch"):
            self.watch.begin()
            self._spans = self._plan(scheduler, batch) if self.watch.trusted and not self.watch.broken else []
            self._tokens, self._requests, self._trimmed = batch.extend_num_tokens, len(batch.reqs), False
        try:
            yield
        except BaseException:
            self._revoke("the batch was not computed to its end")
            raise
        finally:
            self._tokens = -1
            reason = self.watch.end()
            if reason:
                self._fall_back(reason)
            self._spans = []

    def _plan(self, scheduler: Any, batch: Any) -> list[Span]:
        spans = []
        for request in batch.reqs:
            sender = request.disagg_kv_sender
            ours = hasattr(sender, "send_ahead")  # warm-up requests have SGLang's fake one
            if not ours or request.pending_bootstrap or request.to_finish is not None:
                continue
            end, prompt = request.extend_range.end, len(request.origin_input_ids)
            begin = request.start_send_idx
            if scheduler.enable_overlap:
                # a chunk that is not the last is offered after the next batch has been launched, and the
                # pages it shares with the cache may be taken for that batch before it is
                if end < prompt:
                    continue
                begin = max(begin, request.tmp_end_idx)
            wanted = final_pages(begin, end, prompt, self.page_size)
            if wanted:
                spans.append(Span(sender, request, wanted.start, _pages(scheduler, request, wanted)))
        return spans

    def after(self, layer: int, forward_batch: Any) -> None:
        """A layer has been computed."""
        if self._tokens < 0:
            return
        whole = (
            forward_batch.batch_size == self._requests
            and (forward_batch.extend_num_tokens or 0) >= self._tokens  # graphs pad
        )
        if not self.watch.seen(layer, whole=whole):
            if self.watch.broken and self._spans:
                self._revoke(self.watch.broken)
            return
        if not self._spans:
            return
        with self.telemetry.scheduler_call("layerwise_layer"):
            self._send(self.layers[layer])

    def _send(self, tensors: tuple[int, ...]) -> None:
        if not self._trimmed:
            self._trimmed = True
            for span in self._spans:
                span.trim(self.page_size)
        mark, refused = self.mark(), False
        for span in self._spans:
            if span.pages and span.sender.send_ahead(span.first, span.pages, tensors, mark):
                span.sent = True
            else:
                span.pages, refused = (), True
        if refused:
            self._spans = [span for span in self._spans if span.pages]

    def _revoke(self, reason: str) -> None:
        for span in self._spans:
            if span.sent:
                span.sender.revoke(f"layers went ahead, then {reason}")
        self._spans = []

    def _fall_back(self, reason: str) -> None:
        self.telemetry.fell_back()
        if reason not in self._told and len(self._told) < 8:
            self._told.add(reason)
            logger.warning("layerwise_fallback reason=%s", reason)


def _pages(scheduler: Any, request: Any, wanted: range) -> tuple[int, ...]:
    """Return the pool's page numbers of some prompt pages."""
    size = scheduler.token_to_kv_pool_allocator.page_size
    row = scheduler.req_to_token_pool.req_to_token[
        request.kv.req_pool_idx, wanted.start * size : wanted.stop * size : size
    ]
    tokens = scheduler.token_to_kv_pool_allocator.translate_kv_indices_for_transfer(row)
    return tuple((tokens // size).tolist())


def _buffers(pool: Any, layers: int) -> dict[int, tuple[int, ...]]:
    """Return the addresses of the K and V of every layer that has some in `pool`."""
    found = {}
    for layer in range(layers):
        try:
            k, v = pool.get_key_buffer(layer), pool.get_value_buffer(layer)
        except (ValueError, KeyError, IndexError, AttributeError):
            continue  # a linear layer
        found[layer] = (k.data_ptr(), v.data_ptr())
    return found


def _follow(scheduler: Any) -> Follower | None:
    """Return the follower of a prefill scheduler whose configuration wants one, with its backend wrapped."""
    queue = getattr(scheduler, "disagg_prefill_bootstrap_queue", None)
    manager = getattr(queue, "kv_manager", None)
    if manager is None or not getattr(manager, "layerwise", False):
        return None
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    tensors = [int(address) for address in manager.kv_args.kv_data_ptrs]
    layers = tensors_by_layer(tensors, _buffers(pool, scheduler.model_config.num_hidden_layers))
    if layers is None:
        logger.warning("layerwise_off reason=KV tensors that are not one layer's K or V")
        return None
    follower = Follower(layers, pool.page_size, manager.exporter.mark, manager.telemetry)
    backend = scheduler.tp_worker.model_runner.attn_backend
    backend.forward = _around_forward(backend.forward, follower)
    logger.info("layerwise_on layers=%d tensors=%d", len(layers), len(tensors))
    return follower


def _around_forward(original: Any, follower: Follower) -> Any:
    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        layer = kwargs["layer"] if "layer" in kwargs else args[3] if len(args) > 3 else None
        batch = kwargs["forward_batch"] if "forward_batch" in kwargs else args[4] if len(args) > 4 else None
        if layer is not None and batch is not None:
            follower.after(layer.layer_id, batch)
        return result

    return forward


def install() -> None:
    """Follow the batches of this process's scheduler. Idempotent."""
    from sglang.srt.managers.scheduler import Scheduler

    original = Scheduler.run_batch
    if hasattr(original, "prfaas"):
        return
    followers: dict[int, Follower | None] = {}

    @functools.wraps(original)
    def run_batch(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self) not in followers:
            followers[id(self)] = _follow(self)
        follower = followers[id(self)]
        if follower is None or not batch.forward_mode.is_extend():
            return original(self, batch, *args, **kwargs)
        with follower.batch(self, batch):
            return original(self, batch, *args, **kwargs)

    run_batch.prfaas = True  # type: ignore[attr-defined]
    Scheduler.run_batch = run_batch
