"""The libraries of the `evals` extra (scipy, statsmodels, scikit-learn), imported when a function needs them."""

from __future__ import annotations

import importlib
from typing import Any

from delib_fast.config import ConfigError


def import_extra(module: str) -> Any:
    """Import a module of the `evals` extra. Raises ConfigError, with the command that installs it, if it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise ConfigError(
            f"evaluation needs {module.partition('.')[0]}, which is not installed: pip install 'delib-fast[evals]'"
        ) from None
