"""Both sides of a transfer between device pools of SGLang's shapes, in one process, over real sockets.

The pools are described by SGLang's KVArgs as the engine fills them in (raw pointers), so that what is tested
is the way from there to the wire and back.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch

from prfaas_sglang.core.layout import Layout
from prfaas_sglang.engine import pools
from prfaas_sglang.transfer.channel import Identity
from prfaas_sglang.transfer.device import DeviceMemory
from prfaas_sglang.transfer.exporter import Exporter
from prfaas_sglang.transfer.importer import Importer
from prfaas_sglang.transfer.telemetry import Telemetry

WAIT_S = 60
LAYERS, PAGE, HEADS, DIM = 4, 64, 2, 64
PAGES, SLOTS, REQUESTS = 128, 6, 8
#: Makes the memory of one side from KVArgs and their layout.
Make = Callable[[SimpleNamespace, Layout], DeviceMemory]


class DeviceSide:
    """Pools of one worker: K and V of full layers, conv and SSM states of linear ones, metadata on the CPU."""

    def __init__(self, seed: int, device: str, make: Make) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def noise(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.randn(*shape, dtype=torch.float32, device=device, generator=generator).to(dtype)

        rows = (PAGES + 1) * PAGE  # page 0 is padding in SGLang
        self.kv = [noise(rows, HEADS, DIM, dtype=torch.bfloat16) for _ in range(2 * LAYERS)]
        conv = noise(LAYERS, SLOTS + 1, 3 * 96, 3, dtype=torch.bfloat16)
        ssm = noise(LAYERS, SLOTS + 1, 2, 32, 48, dtype=torch.float32)
        self.states = [*conv, *ssm]
        self.aux = [torch.randint(0, 1 << 30, (REQUESTS, 16), dtype=torch.int32) for _ in range(2)]
        self.args = SimpleNamespace(
            gpu_id=0,
            page_size=PAGE,
            kv_cache_dtype_str="bfloat16",
            kv_layer_ids=[2 * i for i in range(LAYERS)] * 2,
            kv_data_ptrs=[t.data_ptr() for t in self.kv],
            kv_data_lens=[t.nbytes for t in self.kv],
            kv_item_lens=[t[0].nbytes * PAGE for t in self.kv],
            state_types=["mamba"],
            state_layer_ids=[],
            state_data_ptrs=[[t.data_ptr() for t in self.states]],
            state_data_lens=[[t.nbytes for t in self.states]],
            state_item_lens=[[t[0].nbytes for t in self.states]],
            aux_data_ptrs=[t.data_ptr() for t in self.aux],
            aux_data_lens=[t.nbytes for t in self.aux],
            aux_item_lens=[t[0].nbytes for t in self.aux],
        )
        self.layout = pools.describe(self.args, model="tiny", tp_size=1, model_dtype="bfloat16")
        self.memory = make(self.args, self.layout)
        self._lock = threading.Condition()
        self._heard: dict[tuple[int, str], str] = {}

    def hear(self, room: int, what: str, detail: str = "") -> None:
        """Remember what a callback said."""
        with self._lock:
            self._heard.setdefault((room, what), detail)
            self._lock.notify_all()

    def wait(self, room: int, what: str, timeout_s: float = WAIT_S) -> str:
        """Wait for a callback."""
        with self._lock:
            assert self._lock.wait_for(lambda: (room, what) in self._heard, timeout_s), self._heard
            return self._heard[room, what]

    def pages(self, tensor: int, pages: Sequence[int]) -> torch.Tensor:
        """Return KV pages, [pages, PAGE, HEADS, DIM], as a copy that torch makes."""
        return self.kv[tensor].view(-1, PAGE, HEADS, DIM)[list(pages)]


class DevicePair:
    """A prefill and a decode side on devices."""

    def __init__(self, prefill: DeviceSide, decode: DeviceSide, *, staging_bytes: int = 0) -> None:
        self.prefill, self.decode = prefill, decode
        self.exporter = Exporter(
            Identity("prefill", "A", "a-0", 0, prefill.layout),
            prefill.memory,
            Telemetry("A"),
            on_grant=lambda room, grant: prefill.hear(room, "grant"),
            on_done=lambda room: prefill.hear(room, "done"),
            on_failed=lambda room, reason: prefill.hear(room, "failed", reason),
            frame_bytes=64 << 10,
            staging_bytes=staging_bytes,
        )
        self.importer = Importer(
            Identity("decode", "B", "b-0", 0, decode.layout),
            decode.memory,
            Telemetry("B"),
            on_progress=lambda room: decode.hear(room, "progress"),
            on_done=lambda room: decode.hear(room, "done"),
            on_failed=lambda room, reason: decode.hear(room, "failed", reason),
        )
        self.address = ("127.0.0.1", self.exporter.listen("127.0.0.1", 0))

    def begin(self, room: int, pages: list[int], *, state: int, aux: int) -> None:
        """Let decode grant its rows."""
        self.importer.begin(room, self.address, pages, states=[[state]], aux_row=aux, prefix_tokens=0)

    def close(self) -> None:
        """End both sides."""
        self.importer.close()
        self.exporter.close()

    def move(self, room: int, seed: int) -> None:
        """Move one request in three chunks, scattered pages to scattered pages; check every bit of the pools.

        What torch copies directly, from pool to pool, is what must come out.
        """
        rng = random.Random(seed)
        count = rng.randint(3, 60)
        source, target = (rng.sample(range(1, PAGES + 1), count) for _ in range(2))
        if rng.random() < 0.5:
            source.sort()
            start = rng.randint(1, PAGES + 1 - count)
            target = list(range(start, start + count))  # as a fresh pool gives them
        (from_slot, to_slot), (from_aux, to_aux) = (
            (rng.randrange(limit), rng.randrange(limit)) for limit in (SLOTS + 1, REQUESTS)
        )
        wanted_kv = [t.clone() for t in self.decode.kv]
        wanted_states = [t.clone() for t in self.decode.states]
        for wanted, tensor in zip(wanted_kv, range(2 * LAYERS), strict=True):
            wanted.view(-1, PAGE, HEADS, DIM)[target] = self.prefill.pages(tensor, source).to(wanted.device)
        for wanted, state in zip(wanted_states, self.prefill.states, strict=True):
            wanted[to_slot] = state[from_slot]
        wanted_aux = [t.clone() for t in self.decode.aux]
        for wanted, aux in zip(wanted_aux, self.prefill.aux, strict=True):
            wanted[to_aux] = aux[from_aux]

        self.begin(room, target, state=to_slot, aux=to_aux)
        self.prefill.wait(room, "grant")
        assert self.exporter.open(room, count)
        cut = sorted(rng.sample(range(1, count), 2))
        self.exporter.send(room, source[: cut[0]])
        self.exporter.send(room, source[cut[0] : cut[1]])
        self.exporter.send(room, source[cut[1] :], states=[[from_slot]], aux_row=from_aux, last=True)
        self.decode.wait(room, "done")
        self.prefill.wait(room, "done")
        for found, wanted in (
            *zip(self.decode.kv, wanted_kv, strict=True),
            *zip(self.decode.states, wanted_states, strict=True),
            *zip(self.decode.aux, wanted_aux, strict=True),
        ):
            assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))
