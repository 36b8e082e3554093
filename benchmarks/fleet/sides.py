"""Real SGLang workers on the two sides of an emulated link: fork servers, and waiting until all answer.

One fork server per side (its workers inherit its network namespace). The thread that enters stands at
side b, where the clients are.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Self

import requests

from prfaas_sglang.cpu.zygote import Zygote
from prfaas_sglang.fleet.launch import cache_dir
from tests.wan.link import Wan

START_S = 150.0


class WorkerFailed(RuntimeError):
    """A worker did not start or answered with an error."""


def model(family: str = "gdn") -> Path:
    """Return the tiny checkpoint, built in a process of its own when it is not in the cache."""
    code = "import sys; from pathlib import Path; from prfaas_sglang.cpu import models\n"
    code += "print(models.cached(sys.argv[1], Path(sys.argv[2])))"
    argv = [sys.executable, "-c", code, family, str(cache_dir() / "models")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=True)
    return Path(done.stdout.strip().splitlines()[-1])


class Sides(ABC):
    """Workers on the two sides of `wan`, logs in `folder`. Use as a context manager."""

    def __init__(self, wan: Wan, folder: Path) -> None:
        self.wan, self._folder = wan, folder
        self._zygotes: dict[str, Zygote] = {}
        self._stack = contextlib.ExitStack()
        self._model = Path()

    @abstractmethod
    def _start_workers(self) -> None:
        """Start every worker and wait for it; on the thread that stands at side b."""

    def __enter__(self) -> Self:
        try:
            self._model = model()
            for side in ("a", "b"):
                with self.wan.entered(side):
                    self._zygotes[side] = Zygote.start(self._folder / f"zygote-{side}.log")
            # from here on this thread, and the threads it starts, act at side b
            self._stack.enter_context(self.wan.entered("b"))
            for zygote in self._zygotes.values():
                zygote.wait_ready(START_S)
            self._start_workers()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for zygote in self._zygotes.values():
            zygote.stop(0)

    def _until_started(self, side: str, pid: int, url: str, name: str, deadline_s: float) -> None:
        """Wait for a worker's /health. Raises WorkerFailed."""
        zygote = self._zygotes[side]
        until_healthy(
            url, lambda: zygote.wait(pid, 0.1) is None, deadline_s, name, self._folder / f"{name}.log"
        )


def until_healthy(
    url: str, running: Callable[[], bool], deadline_s: float, name: str, log_path: Path
) -> None:
    """Wait for /health. Raises WorkerFailed with the last error that the process wrote.

    Args:
        running: waits a moment; says whether the process is still there.
        deadline_s: on time.monotonic.
    """
    while running() and time.monotonic() < deadline_s:
        with contextlib.suppress(requests.ConnectionError, requests.Timeout):
            if requests.get(url + "/health", timeout=5).status_code == 200:
                return
    lines = log_path.read_text(errors="replace").splitlines()
    errors = [line for line in lines if "Error" in line] or lines or ["no message"]
    raise WorkerFailed(f"{name} did not start: {errors[-1][:160]}")
