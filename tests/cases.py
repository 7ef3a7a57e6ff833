"""Which cases of a test run each time, and which with the slow ones."""

from typing import Any

import pytest


def seldom(*cases: Any) -> list[Any]:
    """Cases for `pytest.mark.parametrize` that run with the slow tests; a tuple has a value for each name."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]
