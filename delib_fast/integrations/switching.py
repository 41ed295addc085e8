"""Attention of a model that also has other work than packs: packs go to `ops.varlen_attention`, all else to its own.

`attention.NAME` refuses whatever is no pack, which is right for a model that only trains. A model that somebody else's
trainer holds also generates, with a cache, and evaluates. For it transformers finds `delib_fast_or_sdpa` (or whatever
its own attention is called): who calls it with a pack says so, by `in_a_pack` while masks are made and by the keyword
`varlen_backend` in each layer, which also holds while a checkpointed layer is computed again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from delib_fast.models.attention import attend, no_mask

_PREFIX = "delib_fast_or_"
_packed: ContextVar[bool] = ContextVar("delib_fast_packed", default=False)


@contextmanager
def in_a_pack() -> Iterator[None]:
    """While this lasts, masks are not made: the attention of a pack needs none."""
    token = _packed.set(True)
    try:
        yield
    finally:
        _packed.reset(token)


def configs_with_attention(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every config object by which a part of the model looks up its attention, each once."""
    found: dict[int, PreTrainedConfig] = {
        id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)
    }
    for config in list(found.values()):
        for key in getattr(config, "sub_configs", {}):
            part = getattr(config, key, None)
            if part is not None:
                found[id(part)] = part
    return list(found.values())


def set_attention(config: PreTrainedConfig, name: str | None) -> None:
    """Only this config, and nothing checked or loaded: the name is one that it had, or one registered here."""
    config._attn_implementation_internal = name


def switching_name(stock: str | None) -> str:
    """The name of the attention that does packs by `varlen_attention` and the rest by `stock`."""
    stock = stock or "eager"
    if stock.startswith(_PREFIX):
        return stock
    name = _PREFIX + stock
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _attention(stock))
        AttentionMaskInterface.register(name, _mask(stock))
    return name


def _attention(stock: str) -> Callable[..., Any]:
    def attend_or_stock(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        if "varlen_backend" in kwargs:
            return attend(module, query, key, value, attention_mask, **kwargs)
        return _stock_attention(stock, module)(module, query, key, value, attention_mask, **kwargs)

    return attend_or_stock


def _stock_attention(stock: str, module: nn.Module) -> Callable[..., Any]:
    # Every modeling file has an eager attention of its own, which the interface does not know.
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(stock, eager)


def _mask(stock: str) -> Callable[..., Any]:
    def mask_or_none(*args: Any, **kwargs: Any) -> Any:
        if _packed.get():
            return no_mask(*args, **kwargs)
        return ALL_MASK_ATTENTION_FUNCTIONS[stock](*args, **kwargs)

    return mask_or_none
