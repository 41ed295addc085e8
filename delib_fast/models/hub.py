"""What to say where transformers can load nothing from a path: a folder, or a name on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import is_offline_mode
from huggingface_hub.utils import HFValidationError, validate_repo_id


def why_not_loaded(path: str, error: BaseException) -> str:
    """The first line of what transformers says, and the remedy where the path is no folder."""
    first = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
    if Path(path).is_dir():
        return first
    try:
        validate_repo_id(path)
    except HFValidationError:
        return "there is no such folder, and it is no hub name (owner/name)"
    offline = "HF_HUB_OFFLINE is set, so" if is_offline_mode() else "without a network"
    return (
        f"{first}. There is no such folder; of a hub name check the spelling and your access to it; {offline} it "
        f"must be in the cache, which `hf download {path}` fills"
    )
