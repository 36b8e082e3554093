"""The native index against the Python one: the same operations, the same answers."""

from __future__ import annotations

import pytest
from hypothesis import settings

from cache_service.core.index import PrefixIndex
from cache_service.native.index import NativeIndex, missing
from tests.unit.cache_service.index_machine import BudgetMachine, IndexMachine

pytestmark = pytest.mark.skipif(bool(missing), reason=f"no native core here: {missing}")


class BothMachine(IndexMachine):
    """Both cores against the model and each other; dumps of one rebuild the other."""

    factories = (PrefixIndex, NativeIndex)


class NativeBudgetMachine(BudgetMachine):
    """The native core under a budget."""

    factories = (lambda: NativeIndex(budget_bytes=3000),)


TestBothMachine = BothMachine.TestCase
TestBothMachine.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestNativeBudgetMachine = NativeBudgetMachine.TestCase
TestNativeBudgetMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
