"""Replace the `forward` of one module instance, in a way that can be undone.

The replacement is stored in the instance's `__dict__`: the class and other instances are unaffected, no parameter,
buffer or submodule changes, and a deep copy of the module gets its own patch.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

_log = logging.getLogger("delib_fast")


class ForwardPatch:
    """A replacement for the `forward` of one module; subclasses implement `patched`.

    Other code may wrap the patched forward later, as accelerate does for mixed precision. Such a wrapper holds a
    reference to this object and cannot be removed, so `remove` also deactivates the patch, which then passes every call
    on to the original forward.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.active = True
        self._previous: Callable[..., Any] | None = vars(module).get("forward")
        # What `inspect.signature` finds. Trainers select the columns of a batch by it.
        self.__signature__ = self._signature(inspect.signature(type(module).forward))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.patched(*args, **kwargs) if self.active else self.original(*args, **kwargs)

    def patched(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the replacement."""
        raise NotImplementedError

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Call the forward that the module had before."""
        if self._previous is not None:
            return self._previous(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def install(self) -> None:
        """Make this object the module's forward."""
        vars(self.module)["forward"] = self

    def remove(self) -> None:
        """Restore the previous forward. A wrapper around this one stays in place, and the log names it."""
        self.active = False
        current = vars(self.module).get("forward")
        if current is not self:
            function = getattr(current, "__func__", current)
            wrapper = getattr(function, "__globals__", {}).get("__name__", type(current).__name__)
            _log.warning(
                "the forward of %s was wrapped by %s after delib_fast patched it; the wrapper stays in place",
                type(self.module).__name__,
                wrapper,
            )
            return
        del vars(self.module)["forward"]
        if self._previous is not None:
            vars(self.module)["forward"] = self._previous

    def _signature(self, class_signature: inspect.Signature) -> inspect.Signature:
        """The signature of the class's forward without `self`."""
        return class_signature.replace(parameters=list(class_signature.parameters.values())[1:])

    def _as_kwargs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Merge positional arguments into kwargs, under the parameter names of the class's forward."""
        names = list(inspect.signature(type(self.module).forward).parameters)[1:]
        return {**dict(zip(names, args, strict=False)), **kwargs}


def remove_patches(patches: Sequence[ForwardPatch]) -> None:
    """Remove patches in the reverse order of their installation."""
    for patch in reversed(patches):
        patch.remove()
