"""What a model's own loss is, found by running it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from delib_fast.models.attention import UnsupportedModelError
from delib_fast.models.eval_mode import eval_mode
from delib_fast.models.separation import RUN_ERRORS, has_weights, probe_tokens

_PROBE_TOKENS = 7


def unsupported_loss(model: PreTrainedModel) -> str | None:
    """Why the model's config asks for a loss that delib_fast does not compute, with the remedy, or None."""
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return (
            f"{type(model).__name__} adds the balance loss of its router (output_router_logits: true), which "
            "delib_fast does not compute; set output_router_logits to false in the model's config"
        )
    return None


def shifts_labels(model: PreTrainedModel) -> bool | None:
    """Whether the model's own loss compares the logits at t with the label at t + 1 (True) or at t (False).

    The decoders of encoder-decoder models (BART, Whisper, …) do the latter. The answer is None if the model has no loss
    of its own for text, or the weights are not available. Cost: one forward pass of 7 tokens.

    Raises:
        UnsupportedModelError: its loss is neither, because it adds a second one: the balance loss of a router
            (`output_router_logits`), or a z-loss.
    """
    name = type(model).__name__
    if reason := unsupported_loss(model):
        raise UnsupportedModelError(reason)
    if not has_weights(model):
        return None
    tokens = probe_tokens(model, _PROBE_TOKENS)[0].unsqueeze(0)
    try:
        with eval_mode(model):
            output = model(input_ids=tokens, labels=tokens, use_cache=False)
            logits, own = output.logits[0].float(), output.loss.float()
    except RUN_ERRORS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return None
    if not torch.isfinite(own):  # the isolation check refuses such a model
        return None
    candidates = {True: F.cross_entropy(logits[:-1], tokens[0, 1:]), False: F.cross_entropy(logits, tokens[0])}
    off = {shifted: (abs(loss - own) / own.abs().clamp_min(1e-6)).item() for shifted, loss in candidates.items()}
    shifted: bool = off[True] <= off[False]
    if off[shifted] > (1e-5 if output.logits.dtype == torch.float32 else 1e-2):
        raise UnsupportedModelError(
            f"the loss of {name} is not the mean nll of its labels, with or without a shift by one: it is {own:.4f}, "
            f"not {candidates[True]:.4f} or {candidates[False]:.4f}. It adds a second loss, which delib_fast does not "
            "compute; turn that off in the model's config"
        )
    return shifted
