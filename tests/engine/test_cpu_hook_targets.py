"""Every function that a CPU worker replaces exists in the pinned SGLang, and takes the same arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prfaas_sglang.cpu.environment import worker_environment

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]

#: Runs where SGLang may be imported: a process of its own with a CPU worker's environment.
SCRIPT = """
import importlib, inspect, json, pkgutil
from prfaas_sglang.cpu import environment
environment.activate()
from prfaas_sglang.cpu import hooks
import sglang.srt.managers.schedule_batch

def parameters(function):
    return [p.name for p in inspect.signature(function).parameters.values()]

found = {"functions": {}, "kernels": {}}
for target, ours in hooks.REPLACED.items():
    found["functions"][target] = [parameters(pkgutil.resolve_name(target)), parameters(ours)]
for (module, name), ours in hooks.KERNELS.items():
    kernel = getattr(importlib.import_module(module), name)
    kind = type(kernel).__name__
    found["kernels"][f"{module}.{name}"] = [len(kernel.arg_names), len(parameters(ours)), kind]
found["check"] = parameters(pkgutil.resolve_name(hooks.EXTRA_BUFFER_CHECK))

originals = {target: pkgutil.resolve_name(target) for target in hooks.REPLACED}
hooks.install()
hooks.install()
found["unchanged"] = [t for t, original in originals.items() if pkgutil.resolve_name(t) is original]

import torch
with torch.device("meta"):
    found["device"] = [getattr(torch, name)(*a).device.type for name, a in
                       (("empty", [2]), ("tensor", [[1.0]]), ("zeros", [1]), ("arange", [3]))]
pinned = torch.tensor([1], pin_memory=True).pin_memory()
found["pinned"] = [pinned.tolist(), torch.empty(2, pin_memory=True).numel()]

from types import SimpleNamespace as N
from sglang.srt.arg_groups.mamba_hook import validate_mamba_extra_buffer as check
def verdict(**changed):
    view = dict(
        linear_attn_backend="triton", mamba_radix_cache_strategy="extra_buffer", page_size=64,
        disaggregation_mode="null", speculative_num_draft_tokens=None, mamba_track_interval=256,
        chunked_prefill_size=512,
    )
    config = N(architectures=[changed.pop("architecture", "Qwen3NextForCausalLM")])
    try:
        check(N(**{**view, **changed}), config, mamba_cache_chunk_size_of=lambda: 64)
    except AssertionError as error:
        return f"refused {error}"
    return "accepted"
found["verdicts"] = {
    "ours": verdict(),
    "interval off the page": verdict(page_size=100),
    "lazy under disaggregation": verdict(
        mamba_radix_cache_strategy="extra_buffer_lazy", disaggregation_mode="decode"
    ),
    "unknown architecture": verdict(architecture="LlamaForCausalLM"),
}
print("RESULT " + json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={**os.environ, **worker_environment()},
        capture_output=True,
        text=True,
        timeout=240,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return result


def test_functions_exist_with_the_same_parameters(found: dict[str, Any]) -> None:
    """A renamed function or a new parameter in SGLang must be seen here, not in a wrong answer."""
    assert len(found["functions"]) >= 5
    for target, (theirs, ours) in found["functions"].items():
        assert theirs == ours, target


def test_kernels_exist_with_as_many_arguments(found: dict[str, Any]) -> None:
    """The replaced kernel objects are Triton's, launched with this many arguments."""
    assert found["kernels"]
    for target, (theirs, ours, kind) in found["kernels"].items():
        assert kind == "JITFunction", target
        assert theirs == ours, target


def test_every_replacement_is_installed(found: dict[str, Any]) -> None:
    """`install` changes every target, and a second call does no harm."""
    assert found["unchanged"] == []


def test_pinning_is_ignored_and_devices_still_chosen(found: dict[str, Any]) -> None:
    """pin_memory does nothing; `with torch.device(...)` still places tensors."""
    assert found["pinned"] == [[1], 2]
    assert set(found["device"]) == {"meta"}


def test_only_the_gpu_assertion_is_dropped(found: dict[str, Any]) -> None:
    """SGLang's other checks of the extra_buffer strategy stay."""
    assert len(found["check"]) >= 2
    verdicts = found["verdicts"]
    assert verdicts.pop("ours") == "accepted"
    assert all(verdict.startswith("refused") for verdict in verdicts.values()), verdicts
