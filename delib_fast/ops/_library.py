"""The torch.library namespace `delib_fast`, and the compiled module that registers its CPU kernels.

Schemas are defined in Python, so the package can be imported, and its ops exist, without any compiled code.
"""

import importlib
from typing import Any

import torch

INTERFACE = 4
"""The version of the op schemas. The compiled module must be built for the same version (csrc/bindings.cpp)."""

_Library: Any = torch.library.Library  # Any, because torch does not annotate its methods
LIBRARY = _Library("delib_fast", "FRAGMENT")


def _load_compiled() -> str | None:
    """Import delib_fast._C, and return None, or the reason that it is unavailable and the remedy.

    Raises ImportError if the module was built for other schemas: its kernels are registered by then.
    """
    rebuild = "rebuild it: pip install --no-build-isolation -e ."
    try:
        compiled = importlib.import_module("delib_fast._C")
    except ModuleNotFoundError as error:
        if error.name != "delib_fast._C":
            raise
        return "delib_fast._C is not built; install a C++ compiler, then: pip install --no-build-isolation -e ."
    except ImportError as error:  # for example, it was built for another version of torch
        return f"delib_fast._C cannot be loaded ({error}); {rebuild}"
    if getattr(compiled, "interface", None) != INTERFACE:
        raise ImportError(f"delib_fast._C was built from another version of delib_fast; {rebuild}")
    return None


WHY_NO_COMPILED: str | None = _load_compiled()
"""None if the compiled module is loaded; otherwise the reason that it is not, and the remedy."""
