"""A fast, exact training core for deliberative alignment and model spec midtraining."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from delib_fast.integrations.patching import applied, apply, unapply

__version__ = "0.1.0"
__all__ = ["applied", "apply", "unapply"]


def __getattr__(name: str) -> Any:
    """Import `apply`, `applied` and `unapply` on first use, so that `import delib_fast` imports nothing else."""
    if name in __all__:
        from delib_fast.integrations import patching

        return getattr(patching, name)
    raise AttributeError(f"module 'delib_fast' has no attribute {name!r}")
