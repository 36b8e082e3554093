"""From SGLang's KVArgs to our layout and pool memory: raw pointers become buffers, or tensors on CUDA."""

from __future__ import annotations

import ctypes
from typing import Any

from cache_service.core.errors import UnsupportedEngine
from prfaas_sglang.core.layout import Component, Layout, check_layout
from prfaas_sglang.engine import cuda
from prfaas_sglang.engine.compat import engine_version
from prfaas_sglang.transfer.device import DeviceMemory, Pool
from prfaas_sglang.transfer.memory import PoolMemory, RowMemory

#: State components whose rows mean the same on both sides and that were tested.
SUPPORTED_STATES = ("mamba", "swa")
#: SGLang's names of KV types to ours; rows of any other are moved without knowing their elements.
_ELEMENTS = {
    "float32": "float32",
    "float16": "float16",
    "half": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "fp8_e4m3": "fp8",
    "fp8_e5m2": "fp8",
}


def describe(args: Any, *, model: str, tp_size: int, model_dtype: str) -> Layout:
    """Return the layout that `args` (SGLang's KVArgs) describes.

    Args:
        model_dtype: type that the model computes in, which KV of type "auto" has.

    Raises UnsupportedEngine for pools that this release cannot carry.
    """
    states = []
    kv_dtype = str(args.kv_cache_dtype_str)
    element = _ELEMENTS.get(model_dtype if kv_dtype == "auto" else kv_dtype, "")
    layer_ids = list(getattr(args, "state_layer_ids", None) or [])
    for i, (kind, lengths) in enumerate(zip(args.state_types, args.state_item_lens, strict=True)):
        name = str(getattr(kind, "value", kind))
        if name not in SUPPORTED_STATES:
            raise UnsupportedEngine(f"state component {name!r}; supported: {', '.join(SUPPORTED_STATES)}")
        ids = tuple(int(v) for v in layer_ids[i]) if i < len(layer_ids) and layer_ids[i] else ()
        # a window is KV; the linear state mixes types, which KVArgs does not tell
        lengths = tuple(int(v) for v in lengths)
        states.append(Component(name, lengths, ids, element if name == "swa" else ""))
    kv_ids = tuple(int(v) for v in (getattr(args, "kv_layer_ids", None) or ()))
    layout = Layout(
        engine=f"sglang {engine_version()}",
        model=model,
        page_size=int(args.page_size),
        kv_dtype=kv_dtype,
        tp_size=tp_size,
        components=(
            Component("kv", tuple(int(v) for v in args.kv_item_lens), kv_ids, element),
            *states,
            Component("aux", tuple(int(v) for v in args.aux_item_lens)),
        ),
    )
    try:
        check_layout(layout)
    except ValueError as error:
        raise UnsupportedEngine(str(error)) from error
    return layout


def pool_memory(args: Any, layout: Layout, *, device: str) -> PoolMemory:
    """Return the pools behind `args` as rows. The engine keeps the memory alive for the process's life.

    Args:
        args: SGLang's KVArgs.
        layout: what `describe` returned for it.
        device: SGLang's --device: where KV and states are. The metadata (aux) is in host memory always.

    Raises UnsupportedEngine for another device and for a pool that is not there, ConfigError when there is
    too little memory to pin.
    """
    pointers = [args.kv_data_ptrs, *args.state_data_ptrs, args.aux_data_ptrs]
    lengths = [args.kv_data_lens, *args.state_data_lens, args.aux_data_lens]
    spans = [
        [(int(pointer), int(length)) for pointer, length in zip(p, n, strict=True)]
        for p, n in zip(pointers, lengths, strict=True)
    ]
    if device == "cpu":
        return RowMemory(layout, [[_buffer(*span) for span in tensors] for tensors in spans])
    if device != "cuda":
        raise UnsupportedEngine(f"--device {device}: KV pools are moved from and to cpu and cuda")
    index = int(args.gpu_id)
    rows = [component.row_bytes for component in layout.components]
    on_device: list[list[Pool | memoryview]] = [
        [
            cuda.pool_of(cuda.cuda_span(*span, index), row_bytes)
            for span, row_bytes in zip(tensors, sizes, strict=True)
        ]
        for tensors, sizes in zip(spans[:-1], rows[:-1], strict=True)
    ]
    return DeviceMemory(layout, [*on_device, [_buffer(*span) for span in spans[-1]]], cuda.CudaDevice(index))


def _buffer(pointer: int, length: int) -> memoryview:
    return memoryview((ctypes.c_char * length).from_address(pointer)).cast("B")
