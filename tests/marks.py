"""Which cases of a test `make test` runs; `make test-all` runs them all."""

from collections.abc import Collection, Hashable, Iterable
from typing import Any

import pytest


def all_but(kept: Collection[Hashable], cases: Iterable[Any]) -> list[Any]:
    """The cases as parameters of a test, marked as slow where they are not kept."""
    found = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        marks = () if case in kept else (pytest.mark.slow,)
        found.append(pytest.param(*values, marks=marks))
    return found
