"""KV codecs: ratio and speed on synthetic and tiny-model KV, what FP8 changes, goodput over emulated links.

Speeds are of one thread, in bytes of KV (not of the coded form). The peer of the lossless codec is zstd level
1 over the same bytes. Goodput is between two processes over an emulated link (docs/wan-bench.md), exporter
and importer the real ones, KV synthetic; the peer is `compression: none`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from benchmarks.harness import Row, alternate, run
from prfaas_sglang.core.compression import CODECS, Mode
from prfaas_sglang.core.layout import Component, Layout
from prfaas_sglang.transfer.channel import Identity
from prfaas_sglang.transfer.codec import decode_fp8, decode_planes, encode_fp8, encode_planes
from prfaas_sglang.transfer.exporter import Exporter
from prfaas_sglang.transfer.importer import Importer
from prfaas_sglang.transfer.memory import RowMemory
from prfaas_sglang.transfer.telemetry import Telemetry
from tests.wan.link import Wan, missing
from tests.wan.profiles import profile

FRAME_BYTES, PAGE_BYTES = 256 << 10, 16 << 10
LAYERS, PAGES, PORT, WAIT_S = 16, 64, 7002, 120.0
POOL_BYTES = LAYERS * PAGES * PAGE_BYTES
LAYOUT = Layout(
    "bench",
    "bench",
    64,
    "bfloat16",
    1,
    (Component("kv", (PAGE_BYTES,) * LAYERS, element="bfloat16"), Component("aux", (64,))),
)
FAMILIES = ("dense", "gdn", "gdn-moe", "swa")


def synthetic(size: int, seed: int = 0) -> bytes:
    """Return `size` bytes of bf16 in heads of 128 channels whose scales differ (log-normal, sigma 0.7).

    A few channels are 30 times as large, as in the keys of larger models.
    """
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(0, 0.7, 128)) * np.where(rng.random(128) < 0.03, 30, 1)
    values = rng.standard_normal((size // 256, 128), np.float32) * scale.astype(np.float32)
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()


def speed(work: Callable[[bytes], object], frames: list[bytes]) -> Callable[[], float]:
    """Return what measures bytes of frames per second of processor time."""

    def measure() -> float:
        begin_s = time.thread_time()
        for frame in frames:
            work(frame)
        return sum(map(len, frames)) / (time.thread_time() - begin_s)

    return measure


def speed_back(work: Callable[[bytes], object], coded: list[bytes], size: int) -> Callable[[], float]:
    """Return what measures bytes of decoded frames per second of processor time."""
    forth = speed(work, coded)
    return lambda: forth() * size / sum(map(len, coded))


def codec_rows(smoke: bool) -> list[Row]:
    """Ratio and speeds on synthetic bf16."""
    rounds, data = 1 if smoke else 7, synthetic((4 if smoke else 32) * FRAME_BYTES)
    frames = [data[i : i + FRAME_BYTES] for i in range(0, len(data), FRAME_BYTES)]
    rows_of = FRAME_BYTES // PAGE_BYTES
    planes = [b"".join(encode_planes([f], 2)) for f in frames]
    fp8 = [b"".join(encode_fp8([f], "bfloat16", rows_of) or []) for f in frames]
    press, expand = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    plain = [press.compress(f) for f in frames]
    size, found = len(data), []

    def add(name: str, unit: str, ours: float, peer: float | None, bar: float | None = None) -> None:
        label = "zstd -1" if peer is not None else "-"
        found.append(Row(f"synthetic bf16: {name}", unit, ours, peer, label, bar))

    ratio = [size / sum(map(len, coded)) for coded in (planes, plain, fp8)]
    add("lossless ratio", "x", ratio[0], ratio[1], 1.1)
    ours, peer = alternate(
        speed(lambda f: encode_planes([f], 2), frames), speed(press.compress, frames), rounds
    )
    add("lossless encode", "GB/s", ours / 1e9, peer / 1e9, 1.0)
    ours, peer = alternate(
        speed_back(lambda p: decode_planes(p, FRAME_BYTES), planes, size),
        speed_back(expand.decompress, plain, size),
        rounds,
    )
    add("lossless decode", "GB/s", ours / 1e9, peer / 1e9, 1.0)
    add("fp8 ratio", "x", ratio[2], None)
    forth = speed(lambda f: encode_fp8([f], "bfloat16", rows_of), frames)
    back = speed_back(lambda p: decode_fp8(p, "bfloat16", rows_of, FRAME_BYTES), fp8, size)
    ours, other = alternate(forth, back, rounds)
    add("fp8 encode", "GB/s", ours / 1e9, None)
    add("fp8 decode", "GB/s", other / 1e9, None)
    return found


# --- tiny models ---


def model_rows(families: tuple[str, ...]) -> list[Row]:
    """Ratios on the KV of tiny models (transformers, full pages), and what FP8 does to what reads it."""
    import torch

    from prfaas_sglang.cpu import models
    from tests.engine.reference import load

    found: list[Row] = []
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            model, ids = load(models.build(family, Path(folder) / family))
        prompt = torch.tensor([ids[:1025]])
        with torch.no_grad():
            exact = model(prompt[:, :-1], use_cache=True).past_key_values
        for name in ("float32", "bfloat16"):
            rows = [row for t in _tensors(exact) for row in _rows(t.to(getattr(torch, name)))]
            size, width = sum(map(len, rows)), 4 if name == "float32" else 2
            for codec, coded in (
                ("lossless", [encode_planes([row], width) for row in rows]),
                ("fp8", [encode_fp8([row], name, 16) or [] for row in rows]),
            ):
                length = sum(len(part) for parts in coded for part in parts)
                found.append(Row(f"{family} KV, {name}: {codec} ratio", "x", size / length, None, "-"))
        found += _fp8_rows(family, model, prompt, exact)
    return found


def _tensors(cache: Any) -> list[Any]:
    """Return K and V of every layer that has pages."""
    return [
        getattr(layer, name) for layer in cache.layers for name in ("keys", "values") if hasattr(layer, name)
    ]


def _rows(tensor: Any) -> list[bytes]:
    """Return a layer's (1, heads, tokens, dim) as the pool has it, 16 pages of 64 tokens to a frame."""
    import torch

    tokens = tensor[0].transpose(0, 1).contiguous()
    count = len(tokens) // 1024 * 1024 or len(tokens) // 16 * 16
    return [bytes(part.contiguous().view(torch.uint8).numpy()) for part in tokens[:count].split(1024)]


def _rounded(tensor: Any, peer: bool) -> Any:
    """Return K or V as decode would have it; `peer`: torch's cast with one scale for the whole tensor."""
    import torch

    if peer:
        scale = tensor.abs().max() / 448
        return (tensor / scale).to(torch.float8_e4m3fn).float() * scale
    tokens = tensor[0].transpose(0, 1).contiguous().float()
    raw = tokens.view(torch.uint8).numpy().tobytes()
    pages = max(1, len(tokens) // 64)
    if len(tokens) % pages:
        pages = 1
    parts = encode_fp8([raw], "float32", pages)
    assert parts is not None
    back = torch.frombuffer(
        bytearray(decode_fp8(b"".join(parts), "float32", pages, len(raw))), dtype=torch.float32
    )
    return back.view(tokens.shape).transpose(0, 1)[None].contiguous()


def _fp8_rows(family: str, model: Any, prompt: Any, exact: Any) -> list[Row]:
    """Continue from exact and from rounded KV: attention outputs and greedy tokens."""
    import copy

    import torch

    def answer(cache: Any) -> tuple[list[Any], list[int]]:
        heard: list[Any] = []
        hooks = [
            m.register_forward_pre_hook(lambda _, args: heard.append(args[0].flatten()))
            for n, m in model.named_modules()
            if n.endswith("self_attn.o_proj")
        ]
        tokens, token = [], prompt[:, -1:]
        with torch.no_grad():
            for step in range(32):
                done = model(token, past_key_values=cache, use_cache=True)
                token = done.logits[:, -1:].argmax(-1)
                tokens.append(int(token))
                if not step:
                    for hook in hooks:
                        hook.remove()
        return heard, tokens

    def with_rounded(peer: bool) -> Any:
        cache = copy.deepcopy(exact)
        for layer in cache.layers:
            if hasattr(layer, "keys"):
                layer.keys, layer.values = _rounded(layer.keys, peer), _rounded(layer.values, peer)
        return cache

    right, right_tokens = answer(copy.deepcopy(exact))
    ours, peer = answer(with_rounded(False)), answer(with_rounded(True))

    def cosine(found: list[Any], layer: int) -> float:
        return float(torch.nn.functional.cosine_similarity(found[layer], right[layer], dim=0))

    def equal(tokens: list[int]) -> float:
        return sum(a == b for a, b in zip(tokens, right_tokens, strict=True)) / len(right_tokens)

    label = "torch e4m3, one scale"
    return [
        Row(f"{family}: fp8, cosine of first attention", "", cosine(ours[0], 0), cosine(peer[0], 0), label),
        Row(f"{family}: fp8, cosine of last attention", "", cosine(ours[0], -1), cosine(peer[0], -1), label),
        Row(f"{family}: fp8, equal greedy tokens of 32", "", equal(ours[1]), equal(peer[1]), label),
    ]


# --- links ---


class Heard:
    """Rooms that ended; `wait` for a number of them."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._rooms: set[int] = set()

    def __call__(self, room: int, *_: object) -> None:
        with self._condition:
            self._rooms.add(room)
            self._condition.notify_all()

    def wait(self, rooms: int) -> None:
        """Wait until `rooms` were heard of."""
        with self._condition:
            if not self._condition.wait_for(lambda: len(self._rooms) >= rooms, WAIT_S):
                sys.exit(f"{len(self._rooms)} of {rooms} rooms within {WAIT_S:.0f} s")


def fail(room: int, reason: str) -> None:
    """Say why a room failed; its wait runs out."""
    print(f"room {room} failed: {reason}", file=sys.stderr)


def pools(fill: bool) -> RowMemory:
    """Return pools of PAGES pages."""
    size = PAGE_BYTES * PAGES
    tensors = [memoryview(bytearray(synthetic(size, i) if fill else size)) for i in range(LAYERS)]
    return RowMemory(LAYOUT, [tensors, [memoryview(bytearray(64))]])


def send(rooms: int, mode: str) -> None:
    """Prefill's process: every room is the whole pool."""
    granted, telemetry = Heard(), Telemetry("A")
    exporter = Exporter(
        Identity("prefill", "A", "a", 0, LAYOUT, codecs=CODECS[Mode(mode)]),
        pools(True),
        telemetry,
        on_grant=granted,
        on_done=lambda room: None,
        on_failed=fail,
    )
    exporter.listen("0.0.0.0", PORT)
    print("listening", flush=True)
    granted.wait(rooms)
    for room in range(rooms):
        exporter.send(room, list(range(PAGES)), states=[], aux_row=0, last=True)
    sys.stdin.read()  # until the other side has everything
    records = telemetry.transfers()
    print(json.dumps(sum(r.bytes for r in records) / sum(r.wire_bytes for r in records)))
    exporter.close()


def receive(rooms: int, mode: str, host: str) -> None:
    """Decode's process: prints the seconds from the first grant to the last row."""
    done = Heard()
    importer = Importer(
        Identity("decode", "B", "b", 0, LAYOUT, codecs=CODECS[Mode(mode)]),
        pools(False),
        Telemetry("B"),
        on_progress=lambda room: None,
        on_done=done,
        on_failed=fail,
    )
    begin_s = time.monotonic()
    for room in range(rooms):
        importer.begin(room, (host, PORT), list(range(PAGES)), states=[], aux_row=0, prefix_tokens=0)
    done.wait(rooms)
    print(time.monotonic() - begin_s, flush=True)
    time.sleep(0.3)  # the last DONE is on its way
    importer.close()


Start = Callable[[str, list[str]], "subprocess.Popen[Any]"]
PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}


def goodput(start: Start, host: str, rooms: int, mode: str) -> tuple[float, float]:
    """Return row bytes per second, and row bytes over bytes sent."""
    me = [sys.executable, "-m", "benchmarks.bench_compression"]
    sender = start("a", [*me, "send", str(rooms), mode])
    try:
        assert sender.stdout is not None
        sender.stdout.readline()  # listening
        received, _ = start("b", [*me, "receive", str(rooms), mode, host]).communicate(timeout=WAIT_S)
        sent, _ = sender.communicate(timeout=WAIT_S)
    finally:
        sender.kill()
        sender.wait()
    return rooms * POOL_BYTES / float(received), float(sent)


def link_rows(smoke: bool) -> list[Row]:
    """Goodput of each mode against none."""
    if smoke:
        here = lambda _, argv: subprocess.Popen(argv, **PIPES)  # noqa: E731
        rate, ratio = goodput(here, "127.0.0.1", 2, "lossless")
        return [Row("loopback: lossless goodput", "MB/s", rate / 1e6, None, f"ratio {ratio:.2f}")]
    reason = missing()
    if reason:
        sys.exit(f"no emulated link here: {reason}")
    found = []
    for mbps, rooms in ((100, 6), (1000, 48)):
        rate = mbps * 1e6
        shape = profile("continental").with_(
            rate_bps=rate, delay_s=0.01, queue_bytes=max(1e6, rate * 0.02 / 8)
        )
        with Wan(shape) as link:
            start = lambda side, argv, link=link: link.start(side, argv, **PIPES)  # noqa: E731
            plain, _ = goodput(start, link.address("a"), rooms, "none")
            for mode in ("lossless", "fp8"):
                ours, ratio = goodput(start, link.address("a"), rooms, mode)
                name = f"{mbps} Mbit/s, 20 ms: {mode}, {ratio:.2f} rows a byte"
                found.append(Row(name, "MB/s", ours / 1e6, plain / 1e6, "none", kind="simulated"))
            if not link.stats().reliable:
                print(f"{mbps} Mbit/s: the emulator was late; do not believe the rows")
    here = lambda _, argv: subprocess.Popen(argv, **PIPES)  # noqa: E731
    plain, _ = goodput(here, "127.0.0.1", 128, "none")
    for mode in ("lossless", "fp8"):
        ours, ratio = goodput(here, "127.0.0.1", 128, mode)
        found.append(
            Row(f"loopback: {mode}, {ratio:.2f} rows a byte", "MB/s", ours / 1e6, plain / 1e6, "none")
        )
    return found


def measure(smoke: bool) -> list[Row]:
    """Return all rows."""
    return codec_rows(smoke) + model_rows(FAMILIES[:1] if smoke else FAMILIES) + link_rows(smoke)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["send", rooms, mode]:
            send(int(rooms), mode)
        case ["receive", rooms, mode, host]:
            receive(int(rooms), mode, host)
        case _:
            run("compression", measure, __doc__ or "")
