"""One request over each named link: the tokens do not depend on the weather."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from tests.e2e.wan.conftest import Try
from tests.wan.profiles import PROFILES

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_is_exact(attempt: Try, name: str) -> None:
    with attempt("gdn") as trial:
        trial.wan.set("a2b", **asdict(PROFILES[name].a2b))
        trial.wan.set("b2a", **asdict(PROFILES[name].b2a))
        trial.exact(trial.pair.ask(trial.case.prompt))
