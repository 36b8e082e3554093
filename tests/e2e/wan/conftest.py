"""Fixtures of the fault tests: the bench lives as long as the session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from tests.e2e.wan.bench import NORMAL, Bench, Trial, build_models, trial
from tests.e2e.wan.sites import two_sites
from tests.wan.link import Wan, missing
from tests.wan.profiles import Profile

FAMILIES = ("gdn", "swa")
Try = Callable[[str], AbstractContextManager[Trial]]


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The link with both sites."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    models, logs = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("wan")
    building = build_models(models, FAMILIES)
    try:
        with Wan(Profile("faults", "between faults", NORMAL, NORMAL)) as wan, two_sites(wan, logs) as (a, b):
            yield Bench(wan, a, b, models)
    finally:
        building.kill()
        building.wait()


@pytest.fixture
def attempt(bench: Bench) -> Try:
    """attempt("gdn"): a context around one fault (see bench.trial)."""
    return lambda family: trial(bench, family)
