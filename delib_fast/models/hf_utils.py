"""Small helpers around transformers and the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not in __all__
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """Turn off transformers' progress bars, which it draws while reading or writing shards, for a block of code."""
    was_enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            hf_logging.enable_progress_bar()


def why_not_loaded(path: str, error: BaseException) -> str:
    """Explain why transformers could not load from `path`, which is a folder or a hub name.

    Returns the first line of the error, with a remedy if the path is not a folder.
    """
    first = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
    if Path(path).is_dir():
        return first
    try:
        validate_repo_id(path)
    except HFValidationError:
        return "there is no such folder, and it is not a valid hub name (owner/name)"
    offline = "HF_HUB_OFFLINE is set, so" if is_offline_mode() else "without network access"
    return (
        f"{first}. There is no such folder; if it is a hub name, check the spelling and your access to it; {offline} "
        f"it must be in the cache, which `hf download {path}` fills"
    )


def trunk(model: PreTrainedModel) -> nn.Module:
    """The part of a causal LM below its head: its base model, or its only part that is a model of its own.

    The latter is for classes whose `base_model_prefix` names a part of another class (Llama4ForCausalLM). Returns
    `model` itself if it has neither.
    """
    if model.base_model is not model:
        return model.base_model
    parts = [part for part in model.children() if isinstance(part, PreTrainedModel)]
    return parts[0] if len(parts) == 1 else model


def expert_share(text: PreTrainedConfig) -> float:
    """The share of a layer's experts that a token is routed to; 1 without experts."""
    active = getattr(text, "num_experts_per_tok", None) or 1
    counts = (getattr(text, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
    share: float = active / next((count for count in counts if count), active)
    return share
