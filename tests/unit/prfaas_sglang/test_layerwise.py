"""The follower of batches against a recorder of what was sent, with those fields of SGLang that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cache_service.core.errors import ConfigError
from prfaas_sglang.config import WorkerConfig
from prfaas_sglang.engine.layerwise import Follower
from prfaas_sglang.fleet.config import Transfer
from prfaas_sglang.transfer.telemetry import Telemetry

PAGE = 4
LAYERS = {0: (0, 2), 1: (1, 3)}


@dataclass
class Recorder:
    """A request's sender; takes nothing when `refuses`."""

    refuses: bool = False
    calls: list[tuple[int, tuple[int, ...], tuple[int, ...], object]] = field(default_factory=list)
    revoked: list[str] = field(default_factory=list)

    def send_ahead(self, first: int, pages: Sequence[int], tensors: Sequence[int], mark: object) -> bool:
        if not self.refuses:
            self.calls.append((first, tuple(pages), tuple(tensors), mark))
        return not self.refuses

    def revoke(self, reason: str) -> None:
        self.revoked.append(reason)


class Engine:
    """A scheduler's pools: request i has its tokens in pool pages 100 * i + 0, 1, 2, ..."""

    def __init__(self, overlap: bool = False) -> None:
        self.enable_overlap = overlap
        self.token_to_kv_pool_allocator = SimpleNamespace(
            page_size=PAGE, translate_kv_indices_for_transfer=lambda tokens: tokens
        )
        rows = np.arange(64)[None, :] + 100 * PAGE * np.arange(8)[:, None]
        self.req_to_token_pool = SimpleNamespace(req_to_token=rows)
        self.marks = 0
        self.telemetry = Telemetry("A")
        self.follower = Follower(LAYERS, PAGE, self.mark, self.telemetry)

    def mark(self) -> int:
        self.marks += 1
        return self.marks

    def request(self, row: int, prompt: int, end: int, **fields: Any) -> Any:
        """One request of a batch that computes its prompt up to `end`."""
        sender = fields.pop("sender", None) or Recorder()
        request = SimpleNamespace(
            disagg_kv_sender=sender,
            pending_bootstrap=False,
            to_finish=None,
            origin_input_ids=range(prompt),
            extend_range=SimpleNamespace(end=end),
            start_send_idx=0,
            tmp_end_idx=-1,
            kv=SimpleNamespace(req_pool_idx=row),
        )
        for name, value in fields.items():
            setattr(request, name, value)
        return request

    def run(self, requests: list[Any], layers: Sequence[int] = (0, 1, 9), *, tokens: int = 10) -> None:
        """Compute a batch whose layers report in this order."""
        batch = SimpleNamespace(reqs=requests, extend_num_tokens=tokens)
        forward = SimpleNamespace(batch_size=len(requests), extend_num_tokens=tokens)
        with self.follower.batch(self, batch):
            for layer in layers:
                self.follower.after(layer, forward)

    def fallbacks(self) -> float:
        value = self.telemetry.registry.get_sample_value("prfaas_layerwise_fallbacks_total")
        assert value is not None
        return value


@pytest.fixture
def engine() -> Engine:
    """An engine whose first batch has been watched."""
    made = Engine()
    made.run([made.request(0, 8, 8)])
    return made


def test_the_first_batch_is_only_watched() -> None:
    """Nothing is known yet of how this engine computes."""
    engine = Engine()
    request = engine.request(0, 8, 8)
    engine.run([request])
    assert request.disagg_kv_sender.calls == []
    assert engine.fallbacks() == 0
    engine.run([request])
    assert len(request.disagg_kv_sender.calls) == 2


def test_every_request_sends_its_final_pages_layer_by_layer(engine: Engine) -> None:
    """Whole pages of a middle chunk, the partial one of the last chunk too; one mark a layer."""
    middle = engine.request(1, 30, 19, start_send_idx=8)
    last = engine.request(2, 19, 19, start_send_idx=16)
    cached = engine.request(3, 12, 12)
    engine.run([middle, last, cached])
    assert middle.disagg_kv_sender.calls == [(2, (102, 103), (0, 2), 1), (2, (102, 103), (1, 3), 2)]
    assert last.disagg_kv_sender.calls == [(4, (204,), (0, 2), 1), (4, (204,), (1, 3), 2)]
    assert cached.disagg_kv_sender.calls[0][:2] == (0, (300, 301, 302))


def test_a_prefix_that_is_offered_before_the_forward_is_left_out(engine: Engine) -> None:
    """SGLang sends the cached prefix after the batch was planned and before its first layer."""
    request = engine.request(1, 16, 16)
    batch = SimpleNamespace(reqs=[request], extend_num_tokens=8)
    forward = SimpleNamespace(batch_size=1, extend_num_tokens=8)
    with engine.follower.batch(engine, batch):
        request.start_send_idx = 8
        engine.follower.after(0, forward)
        engine.follower.after(1, forward)
    assert [call[:2] for call in request.disagg_kv_sender.calls] == [(2, (102, 103))] * 2


def test_requests_that_cannot_go_ahead_are_left_alone(engine: Engine) -> None:
    """Others' senders, aborted, not yet bootstrapped, or without staging memory: the rest goes."""
    fine = engine.request(1, 8, 8)
    foreign = engine.request(2, 8, 8, disagg_kv_sender=object())
    aborted = engine.request(3, 8, 8, to_finish="abort")
    pending = engine.request(4, 8, 8, pending_bootstrap=True)
    refused = engine.request(5, 8, 8, sender=Recorder(refuses=True))
    engine.run([foreign, aborted, fine, pending, refused])
    assert len(fine.disagg_kv_sender.calls) == 2
    assert aborted.disagg_kv_sender.calls == pending.disagg_kv_sender.calls == []


def test_a_missing_layer_is_counted_and_the_others_go(engine: Engine) -> None:
    """The one without a sign travels with its chunk; the next batch is not affected."""
    request = engine.request(1, 8, 8)
    engine.run([request], [1])
    assert [call[2] for call in request.disagg_kv_sender.calls] == [(1, 3)]
    assert engine.fallbacks() == 1
    engine.run([request])
    assert len(request.disagg_kv_sender.calls) == 3


def test_a_layer_computed_twice_fails_what_went_ahead_and_ends_it(engine: Engine) -> None:
    """Its first KV has left: those requests fail, and nothing goes ahead any more."""
    sent, unsent = engine.request(1, 8, 8), engine.request(2, 30, 3)
    engine.run([sent, unsent], [0, 0, 1])
    assert "twice" in sent.disagg_kv_sender.revoked[0]
    assert unsent.disagg_kv_sender.revoked == []
    later = engine.request(3, 8, 8)
    engine.run([later])
    assert later.disagg_kv_sender.calls == []
    assert engine.fallbacks() == 2


def test_a_forward_over_a_part_of_the_batch_sends_nothing(engine: Engine) -> None:
    """Two-batch overlap and the like: one call does not make a layer final."""
    request = engine.request(1, 8, 8)
    batch = SimpleNamespace(reqs=[request, engine.request(2, 8, 8)], extend_num_tokens=16)
    with engine.follower.batch(engine, batch):
        engine.follower.after(0, SimpleNamespace(batch_size=1, extend_num_tokens=8))
    assert request.disagg_kv_sender.calls == []
    assert "part of a batch" in engine.follower.watch.broken


def test_a_batch_that_breaks_off_fails_what_went_ahead(engine: Engine) -> None:
    """The chunk may be computed again: its KV was not final."""
    request = engine.request(1, 8, 8)
    forward = SimpleNamespace(batch_size=1, extend_num_tokens=8)

    def broken() -> None:
        with engine.follower.batch(engine, SimpleNamespace(reqs=[request], extend_num_tokens=8)):
            engine.follower.after(0, forward)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        broken()
    assert len(request.disagg_kv_sender.revoked) == 1


def test_calls_outside_a_batch_are_not_ours(engine: Engine) -> None:
    """Warm-up and graph capture call the backend too."""
    engine.follower.after(0, SimpleNamespace(batch_size=1, extend_num_tokens=8))
    assert engine.marks == 0


def test_overlapped_only_the_last_chunk_goes_ahead_after_the_chunk_before_it() -> None:
    """Its predecessor is offered later than it is computed, and shares no page with it."""
    engine = Engine(overlap=True)
    engine.run([engine.request(0, 8, 8)])
    middle = engine.request(1, 30, 19, start_send_idx=8, tmp_end_idx=8)
    last = engine.request(2, 19, 19, start_send_idx=8, tmp_end_idx=16)
    engine.run([middle, last])
    assert middle.disagg_kv_sender.calls == []
    assert [call[:2] for call in last.disagg_kv_sender.calls] == [(4, (204,))] * 2


def test_the_configuration_asks_for_it() -> None:
    """Off by default; the fleet file passes it on; without staging memory it is refused."""
    assert not WorkerConfig(worker_id="a", site="A").layerwise
    assert Transfer(layerwise=True).worker_options("A", Path("certificates"))["layerwise"] is True
    with pytest.raises(ConfigError, match="layerwise: needs staging_bytes"):
        WorkerConfig(worker_id="a", site="A", layerwise=True, staging_bytes=0).check()
