"""Prompt lengths from files: a trace in JSON lines, or a Prometheus histogram that a router exported."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from cache_service.core.errors import ConfigError
from router.core.workload import Histogram, Sample

#: Bounds on what is read into memory.
MAX_LINES = 5_000_000
MAX_LINE_BYTES = 1 << 20
MAX_METRICS_BYTES = 64 << 20


def trace(path: Path, key: str, *, field: str) -> Sample:
    """Return the lengths under `key` in the JSON lines of a file; lines without it are left out.

    So a router's own log serves as a trace, with key `prompt_tokens` or `local_uncached_tokens`.

    Raises ConfigError naming `field`, the line and what is wrong.
    """
    found: list[float] = []
    try:
        with path.open("rb") as file:
            for number in range(1, MAX_LINES + 1):
                line = file.readline(MAX_LINE_BYTES)
                if not line:
                    break
                length = _length(line, key, f"{field}.file: {path}, line {number}")
                if length is not None:
                    found.append(length)
    except OSError as error:
        raise ConfigError(f"{field}.file: {path}: cannot be read: {error.strerror}") from error
    if not found:
        raise ConfigError(f"{field}.field: no line of {path} has {key!r}")
    return Sample(tuple(found))


def _length(line: bytes, key: str, where: str) -> float | None:
    if not line.strip():
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise ConfigError(f"{where}: is not JSON") from None
    length = value.get(key) if isinstance(value, dict) else None
    if length is None:
        return None
    if type(length) not in (int, float) or not (math.isfinite(length) and length >= 0):
        raise ConfigError(f"{where}: {key} is not a number >= 0")
    return max(1.0, float(length))  # at least one token is always computed


def buckets(bounds: Sequence[float], counts: Sequence[float]) -> Histogram:
    """Return a histogram of `counts` between `bounds`. Raises ValueError."""
    return Histogram(tuple(bounds), tuple(counts))


def histogram(path: Path, metric: str, *, field: str) -> Histogram:
    """Return the histogram `metric`, summed over its labels, of a file in Prometheus text format.

    What lies above the last finite bound is taken to lie at twice that bound at most.

    Raises ConfigError naming `field`, ValueError when the histogram is empty.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_METRICS_BYTES + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{field}.file: {path}: cannot be read: {error}") from error
    if len(text) > MAX_METRICS_BYTES:
        raise ConfigError(f"{field}.file: {path}: is longer than {MAX_METRICS_BYTES} bytes")
    try:
        families = list(text_string_to_metric_families(text))
    except ValueError as error:
        raise ConfigError(f"{field}.file: {path}: is not in Prometheus text format: {error}") from error
    below: dict[float, float] = {}
    for family in families:
        for sample in family.samples if family.name == metric and family.type == "histogram" else ():
            if sample.name == f"{metric}_bucket":
                bound = float(sample.labels["le"])
                below[bound] = below.get(bound, 0.0) + sample.value
    finite = sorted(bound for bound in below if bound < math.inf)
    if not finite:
        names = sorted(family.name for family in families if family.type == "histogram")
        raise ConfigError(
            f"{field}.metric: no histogram {metric!r} in {path}; it has {', '.join(names) or 'none'}"
        )
    edges = [0.0, *finite, 2 * finite[-1]]
    totals = [0.0, *(below[bound] for bound in finite), below.get(math.inf, below[finite[-1]])]
    return buckets(edges, [max(0.0, b - a) for a, b in pairwise(totals)])
