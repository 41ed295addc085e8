"""The torch.library namespace `delib_fast`, and the compiled module whose import registers its CPU kernels.

Schemas are defined in Python, so that the package imports, and its ops have a meaning, without anything compiled.
"""

import importlib

import torch

INTERFACE = 1
"""Of the compiled module: which schemas its kernels are for (csrc/bindings.cpp)."""
LIBRARY = torch.library.Library("delib_fast", "FRAGMENT")


def _load_compiled() -> str | None:
    again = "build it again: pip install --no-build-isolation -e ."
    try:
        compiled = importlib.import_module("delib_fast._C")
    except ModuleNotFoundError as error:
        if error.name != "delib_fast._C":
            raise
        return "delib_fast._C is not built; install a C++ compiler, then: pip install --no-build-isolation -e ."
    except ImportError as error:
        # built against another torch: say so, since everything on a CPU is slower without it
        return f"delib_fast._C does not load ({error}); {again}"
    if getattr(compiled, "interface", None) != INTERFACE:  # its kernels are registered: nothing goes on without them
        raise ImportError(f"delib_fast._C was built from another version of delib_fast; {again}")
    return None


WHY_NO_COMPILED: str | None = _load_compiled()
"""None where the compiled module is loaded, else why it is not and what to do."""
