"""Which cases of a test `make test` runs; `make test-all` runs them all."""

from collections.abc import Collection, Hashable, Iterable
from typing import Any

import pytest


def slow_except(kept: Collection[Hashable], cases: Iterable[Any]) -> list[Any]:
    """The cases of a test as parameters, of which `make test` runs those kept alone."""
    found = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        marks = () if case in kept else (pytest.mark.slow,)
        found.append(pytest.param(*values, marks=marks))
    return found
