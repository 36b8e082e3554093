"""The pytest fixture `wan`: makes links for one test and removes them, whatever the test did.

In a test module: `from tests.wan.fixtures import MakeWan, wan_fixture  # noqa: F401`, then

    def test_it(wan: MakeWan) -> None:
        link = wan("lossy", rate_bps=200e6)

Skips only where the machine cannot run the emulator; a failure to start it is a failure.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import pytest

from tests.wan.link import Wan, missing
from tests.wan.profiles import Profile, profile


class MakeWan(Protocol):
    """Starts a link; `changes` are fields of Direction, for both directions; `options` those of Wan."""

    def __call__(
        self, which: str | Profile = ..., *, options: dict[str, Any] | None = ..., **changes: float
    ) -> Wan: ...


@pytest.fixture(name="wan")
def wan_fixture() -> Iterator[MakeWan]:
    """Make links of named profiles that live as long as the test."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    with contextlib.ExitStack() as links:

        def make(
            which: str | Profile = "continental", *, options: dict[str, Any] | None = None, **changes: float
        ) -> Wan:
            return links.enter_context(Wan(profile(which).with_(**changes), **(options or {})))

        yield make
