"""Marks of parameters."""

from __future__ import annotations

from typing import Any

import pytest


def full(*values: Any) -> Any:
    """Parameters of a test that runs only with `pytest --full`."""
    return pytest.param(*values, marks=pytest.mark.full)
