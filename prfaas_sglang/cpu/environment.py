"""What a CPU worker's process needs before SGLang is imported: environment, flags, and the sgl_kernel path.

Import-light: the launcher reads `worker_environment` and `cpu_arguments` without torch.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path

STAND_INS = Path(__file__).parent / "stand_ins"


def worker_environment() -> dict[str, str]:
    """Return the variables of every CPU worker. SGLang and torch read some of them at import time."""
    return {
        "PRFAAS_CPU_ENGINE": "1",
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_PLUGINS": "prfaas",
        # bfloat16 convolution state changed tokens in 3 of 5 prompts against transformers in float32
        "SGLANG_MAMBA_CONV_DTYPE": "float32",
        # otherwise the first request compiles C++ for up to a minute
        "TORCHDYNAMO_DISABLE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        # a crash ends the server at once: no stack dumps, no minute of waiting for a GPU core dump
        "SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0",
        "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
        "SGLANG_HOST_IP": "127.0.0.1",
        "SGLANG_LOCAL_IP_NIC": "lo",
    }


def cpu_arguments(*, disaggregation_mode: str = "null", state_slots: int = 40) -> list[str]:
    """Return the SGLang flags that a CPU worker needs whatever the model.

    Args:
        disaggregation_mode: null, prefill or decode.
        state_slots: linear-state rows; SGLang's own default takes gigabytes.
    """
    arguments = [
        "--device", "cpu",
        "--dtype", "float32",
        "--attention-backend", "torch_native",
        "--sampling-backend", "pytorch",
        "--disable-cuda-graph",
        "--disable-overlap-schedule",
        "--max-mamba-cache-size", str(state_slots),
        "--skip-server-warmup",
        "--sleep-on-idle",  # idle schedulers would otherwise spin: three servers, two cores
    ]  # fmt: skip
    if disaggregation_mode == "decode":
        # the default backs up retracted requests in pinned memory
        arguments += ["--disaggregation-decode-retraction-backup", "cpu_tensor"]
    return arguments


def activate() -> None:
    """Make `sgl_kernel` and `torchvision` importable in this process. Call before importing SGLang.

    The stand-in never shadows a real sgl_kernel: where one is installed, nothing is added.
    """
    os.environ.update({k: v for k, v in worker_environment().items() if k not in os.environ})
    if importlib.util.find_spec("sgl_kernel") is None:
        sys.path.insert(0, str(STAND_INS))
    make_torchvision_importable()


def make_torchvision_importable() -> None:
    """Let `import torchvision` (which transformers does) work beside a CPU-only torch. Idempotent."""
    if not any(isinstance(finder, _TorchvisionFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TorchvisionFinder())


class _TorchvisionFinder(importlib.abc.MetaPathFinder):
    """Lets torchvision be imported beside a CPU-only torch.

    Its published wheel links CUDA; the fake-tensor registrations of the operators in that library cannot
    load, and nothing here uses them.
    """

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torchvision":
            return None
        sys.meta_path.remove(self)
        import torch

        if torch.version.cuda is None:
            name = "torchvision._meta_registrations"
            sys.modules.setdefault(name, types.ModuleType(name))
        return importlib.util.find_spec(fullname)
