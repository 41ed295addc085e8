"""Compare every causal LM of transformers with itself, one document at a time, and generate docs/architectures.md.

`python tests/models/sweep.py` examines all of them and writes the page, in about two minutes on one core.
`python tests/models/sweep.py llama mamba` examines these and updates their rows.
test_architectures.py compares the page with the current outcomes.
"""

from __future__ import annotations

import copy
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from helpers.architectures import NOT_BUILT, TOKENS, build  # noqa: E402
from helpers.small_models import pack  # noqa: E402

PAGE = ROOT / "docs" / "architectures.md"
# Longer and shorter than windows (6) and chunks (4).
LENGTHS = (9, 5, 13)
LOSS, GRADIENT = 1e-5, 2e-5
"""The largest allowed relative differences."""
_NOISE = 5e-3
"""A gradient below this share of the model's largest one is compared relative to that: a bias of keys, for example, has
an exact gradient of 0, and both sides compute only rounding."""
FORMS = ("padded right", "padded left", "position_ids", "cu_seq_lens")
_HOW = {
    "packed": "whole packs in one pass",
    "mixers": "whole packs in one pass, except for the {} layers, which run one document at a time",
    "documents": "one document at a time: {}",
}


@dataclass(frozen=True)
class Outcome:
    """What delib_fast does with an architecture."""

    result: str
    """same, refused or not built."""
    how: str
    """How the documents of a pack are kept apart, or why the architecture is refused."""


def examine(model_type: str) -> Outcome:
    """Train a small model of the type in every way. Raises AssertionError if a result is not that of transformers."""
    import delib_fast
    from delib_fast.models import TrainableLM, UnsupportedModelError, check_isolation

    if model_type in NOT_BUILT:
        return Outcome("not built", NOT_BUILT[model_type])
    model = build(model_type)
    try:
        trainable = TrainableLM(copy.deepcopy(model)).train()
        applied = delib_fast.apply(copy.deepcopy(model))
    except UnsupportedModelError as error:
        return Outcome("refused", str(error))
    documents = _documents()
    batch = pack([(tokens, torch.ones(len(tokens))) for tokens in documents])
    loss = trainable(batch).loss_sum / (batch.targets != -100).sum()
    loss.backward()
    _compare(loss, trainable.model, _truth(model, documents, shift=1), "TrainableLM")
    check_isolation(trainable, "cpu")
    stock = _truth(model, documents, shift=_shift_of_own_loss(model, documents[0]))
    for form in FORMS:
        applied.zero_grad()
        loss = applied(**_batch(documents, form), use_cache=False).loss
        loss.backward()
        _compare(loss, applied, stock, form)
    _check_without_labels(model, applied, documents)
    delib_fast.unapply(applied)
    assert not any("forward" in vars(module) for module in applied.modules())
    assert "delib_fast" not in str(applied.config._attn_implementation)
    assert torch.equal(_logits(applied, documents[0]), _logits(model, documents[0]))
    separation = trainable.separation
    return Outcome("same", _HOW[separation.kind].format(", ".join(separation.mixers) or separation.reason))


def _documents() -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(0, TOKENS, (length,), generator=draw) for length in LENGTHS]


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens[None], use_cache=False).logits


def _truth(model: nn.Module, documents: list[Tensor], shift: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean nll of all tokens but the first of each document, and its gradients, by transformers alone.

    Args:
        shift: 1 if a label is predicted at the position before it, 0 if at its own.
    """
    model = copy.deepcopy(model).train()
    total = torch.zeros(())
    for tokens in documents:
        logits = model(input_ids=tokens[None], use_cache=False).logits[0].float()
        total = total + F.cross_entropy(logits[1 - shift : len(tokens) - shift], tokens[1:], reduction="sum")
    loss = total / sum(len(tokens) - 1 for tokens in documents)
    loss.backward()
    return loss.detach(), _gradients(model)


def _shift_of_own_loss(model: nn.Module, tokens: Tensor) -> int:
    """1 if transformers' own loss of the model shifts the labels, 0 if it does not."""
    try:
        with torch.no_grad():
            output = copy.deepcopy(model)(input_ids=tokens[None], labels=tokens[None], use_cache=False)
    except ValueError:  # GIT has a loss only for texts with an image
        return 1
    logits = output.logits[0].float()
    found = [
        shift
        for shift in (0, 1)
        if torch.allclose(F.cross_entropy(logits[: len(tokens) - shift], tokens[shift:]), output.loss, rtol=LOSS)
    ]
    assert len(found) == 1, "its own loss is another one, so it should have been refused"
    return found[0]


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


def _compare(loss: Tensor, model: nn.Module, truth: tuple[Tensor, dict[str, Tensor]], what: str) -> None:
    true_loss, true_gradients = truth
    assert abs(loss.item() / true_loss.item() - 1) <= LOSS, f"{what}: loss {loss.item()}, not {true_loss.item()}"
    gradients = _gradients(model)
    assert gradients.keys() == true_gradients.keys()
    largest = max(gradient.abs().max().item() for gradient in true_gradients.values())
    for name, gradient in true_gradients.items():
        scale = max(gradient.abs().max().item(), _NOISE * largest)
        off = (gradients[name] - gradient).abs().max().item() / scale
        assert off <= GRADIENT, f"{what}: the gradient of {name} is off by {off:.1e}"


def _batch(documents: list[Tensor], form: str) -> dict[str, Any]:
    """The documents in a form in which trainers pass them. The first token of each has no label."""
    if form.startswith("padded"):
        size = max(map(len, documents))
        left = form == "padded left"
        rows = {
            "input_ids": [(tokens, 0) for tokens in documents],
            "attention_mask": [(torch.ones_like(tokens), 0) for tokens in documents],
            "labels": [(F.pad(tokens[1:], (1, 0), value=-100), -100) for tokens in documents],
        }
        return {
            key: torch.stack(
                [F.pad(x, (size - len(x), 0) if left else (0, size - len(x)), value=fill) for x, fill in values]
            )
            for key, values in rows.items()
        }
    lengths = [len(tokens) for tokens in documents]
    batch: dict[str, Any] = {
        "input_ids": torch.cat(documents)[None],
        "labels": torch.cat([F.pad(tokens[1:], (1, 0), value=-100) for tokens in documents])[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
    }
    if form == "cu_seq_lens":
        bounds = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
        batch |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        batch |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return batch


def _check_without_labels(model: nn.Module, applied: nn.Module, documents: list[Tensor]) -> None:
    """A call without labels gives the logits that the model gave before, at every token that is not padding."""
    batch = _batch(documents, "padded right")
    batch.pop("labels")
    real = batch["attention_mask"].bool()
    for options in ({}, {"use_cache": False}):
        try:
            before = copy.deepcopy(model)(**batch, **options)
        except (ValueError, AttributeError):  # some cannot make a KV cache in training mode
            continue
        after = applied(**batch, **options)
        assert before.keys() == after.keys()
        scale = before.logits[real].abs().max()
        assert ((after.logits - before.logits)[real].abs().max() / scale) <= 1e-5


def page(rows: dict[str, str]) -> str:
    """The text of docs/architectures.md."""
    same, refused, missing = (
        sum(f"| {result} |" in row for row in rows.values()) for result in ("same", "refused", "not built")
    )
    in_one_pass = sum("| whole packs" in row for row in rows.values())
    lines = [
        "# Architectures",
        "",
        "This page lists every causal LM of transformers (`MODEL_FOR_CAUSAL_LM_MAPPING`), and whether it trains",
        "exactly as in transformers. A small model of each architecture, made from its default config, was trained in",
        "fp32: as a `TrainableLM`, and under `delib_fast.apply` with batches padded on the right and on the left, and",
        "with packs given by `position_ids` and by `cu_seq_lens`. `python tests/models/sweep.py` generates the page,",
        "and a test compares it with the code.",
        "",
        f"- *same*: the loss is within {LOSS:.0e}, and every gradient within {GRADIENT:.0e}, of those of transformers",
        "  with one document at a time. Models that cannot run whole packs in one pass are equally exact, but slower.",
        "- *refused*: `TrainableLM` and `apply` raise `UnsupportedModelError` before training.",
        "- *not built*: the test cannot create the model.",
        "",
        f"{len(rows)} architectures: {same} same ({in_one_pass} of them run whole packs in one pass), "
        f"{refused} refused, {missing} not built.",
        "",
        "| architecture | outcome | how, or why not |",
        "|---|---|---|",
    ]
    return "\n".join([*lines, *rows.values()]) + "\n"


def row(name: str, outcome: Outcome) -> str:
    """One row of the table."""
    how = " ".join(outcome.how.split()).replace("|", "\\|").replace("<", "&lt;")
    return f"| {name} | {outcome.result} | {how} |"


def model_types() -> list[str]:
    """Every model type of the mapping, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def rows_of_page() -> dict[str, str]:
    """The rows of docs/architectures.md by model type."""
    lines = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.exists() else []
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("| ") and "| outcome |" not in line}


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("delib_fast").setLevel(logging.ERROR)
    rows = rows_of_page() if sys.argv[1:] else {}
    for name in sys.argv[1:] or model_types():
        try:
            outcome = examine(name)
        except Exception as error:  # noqa: BLE001  # the others are examined too
            outcome = Outcome("WRONG", f"{type(error).__name__}: {error}")
        rows[name] = row(name, outcome)
        print(rows[name], flush=True)
    PAGE.write_text(page(dict(sorted(rows.items()))), encoding="utf-8")
