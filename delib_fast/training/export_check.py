"""The check of a stage's export against the model in training, on a few rows (`export.check`).

On rank 0, each exported folder is loaded as a user would load it. Its tensors must be those that were trained, bitwise,
and its logits those of the model in training, up to the rounding of the dtype. `models/export_check.py` compares them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delib_fast.config.dtypes import DTYPES
from delib_fast.data import Example, Segment, encode_rows, evaluation_batches

if TYPE_CHECKING:
    from torch import Tensor

    from delib_fast.config import AFTConfig, StageConfig
    from delib_fast.engine import Engine
    from delib_fast.training.context import RunContext

MAX_DOCUMENTS = 4
MAX_TOKENS = 512
MAX_LOGITS = 1 << 25
"""Limits of what is compared; the logits take at most 128 MiB."""
MAX_SCORED_TOKENS = 2048
MAX_SCORED_DOCUMENT = 256
MAX_SCORED_DOCUMENTS = 32
MIN_GAIN_NATS = 0.01
"""A merge is judged by its share of the adapter's gain only if the gain is at least this large."""


@dataclass(frozen=True)
class Probe:
    """What exported models are compared on."""

    rows: str
    """Whether these rows are "held-out" or "training" rows."""
    documents: list[Tensor]
    """Token ids, each (n,) int64; of rank 0's shard if packs are sharded."""
    logits: list[Tensor]
    """For each document (n, V) float32: the logits of the model in training. Empty on other ranks than 0."""
    scored: tuple[Sequence[Tensor], Sequence[Tensor]] = ((), ())
    """With LoRA: documents whose nll is measured, and for each (n,) bool the tokens that count."""


def probe(run: RunContext, engine: Engine, stage: StageConfig) -> Probe | None:
    """Compute the logits of the model in training on a few rows; None if `export.check` is off. A collective."""
    if not run.config.export.check:
        return None
    import torch

    from delib_fast.models.export_check import trained_logits

    module: Any = engine.module
    rows, chosen = _examples(run, stage)
    examples = _shortened(chosen, min(MAX_TOKENS, MAX_LOGITS // int(module.vocab_size)))
    options: dict[str, Any] = {
        "pack_capacity": sum(map(len, examples)),
        "segment_weights": (1.0, 1.0, 1.0, 1.0),
    }
    ranks = run.ranks
    batches = evaluation_batches(
        examples,
        rank=ranks.rank,
        world_size=ranks.world_size,
        sequence_parallel=ranks.sequence_parallel,
        **options,
    )
    assert len(batches) == 1
    batch = batches[0].to(engine.device)
    if ranks.rank != 0:
        engine.evaluate(batch)
        return Probe(rows, [], [])
    logits = trained_logits(module, lambda: engine.evaluate(batch))
    (whole,) = evaluation_batches(examples, rank=0, world_size=1, **options)
    ends = [min(end, len(logits)) for end in whole.cu_seqlens_host]
    spans = [slice(start, end) for start, end in pairwise(ends) if end > start]
    documents = [whole.input_ids[span].to(torch.int64) for span in spans]
    longest = min(MAX_SCORED_DOCUMENT, MAX_LOGITS // int(module.vocab_size))
    with_adapter = run.config.model.lora is not None
    scored = _scored(_examples(run, stage, MAX_SCORED_DOCUMENTS)[1], longest) if with_adapter else ((), ())
    return Probe(rows, documents, [logits[span] for span in spans], scored)


def _scored(examples: Sequence[Example], longest: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The beginnings of examples as token ids, and which of their tokens count: all but those of prompts."""
    import torch

    documents, supervised, tokens = [], [], 0
    for example in random.Random(0).sample(list(examples), len(examples)):  # documents and chats, if there are both
        n = min(len(example), longest, MAX_SCORED_TOKENS - tokens)
        counts = torch.from_numpy(example.segments[:n] != Segment.PROMPT)
        if n > 1 and bool(counts[1:].any()):
            documents.append(torch.from_numpy(example.input_ids[:n].astype("int64")))
            supervised.append(counts)
            tokens += n
    return documents, supervised


def _examples(run: RunContext, stage: StageConfig, limit: int = MAX_DOCUMENTS) -> tuple[str, list[Example]]:
    """Examples of held-out rows, or of training rows if nothing is held out, spread over all of them."""
    held_out = run.dataset.held_out_rows()
    capacity = max(other.pack_capacity for other in run.config.stages)
    aft: list[AFTConfig] = [other for other in run.config.stages if other.kind == "aft"]
    if held_out:
        spread = held_out[:: -(-len(held_out) // limit)]
        system_prompt = aft[0].system_prompt if aft else None
        encoded = encode_rows(spread, run.dataset.tokenizer, pack_capacity=capacity, system_prompt=system_prompt)
        if len(encoded):
            return "held-out", [encoded[i] for i in range(min(len(encoded), limit))]
    trained = run.dataset.encoded(stage)
    return "training", [trained[i] for i in range(0, len(trained), -(-len(trained) // limit))]


def _shortened(examples: Sequence[Example], max_tokens: int) -> list[Example]:
    """The beginnings of examples, of at most `max_tokens` tokens together."""
    each = max(2, max_tokens // len(examples))
    return [Example(e.input_ids[:each], e.segments[:each], e.location) for e in examples]


class ExportChecker:
    """Checks what a stage exports, on rank 0. An adapter is checked before the model that it is merged into.

    Args:
        compared: what to compare on.
        warn: called with a message about a difference that is not an error.
    """

    def __init__(self, run: RunContext, compared: Probe, warn: Callable[[str], None]) -> None:
        self._run, self._compared, self._warn = run, compared, warn
        self.rows = compared.rows
        """Whether "held-out" or "training" rows are compared on."""
        self._adapted: tuple[list[Tensor], list[Tensor]] | None = None
        """Logits of the reloaded base without and with the reloaded adapter."""
        self._nll: dict[str, float] = {}
        """The mean nll of the reloaded base, and with the reloaded adapter."""

    @property
    def _is_exact(self) -> bool:
        """Whether the exported weights are those of the model in training. A 4-bit base is exported as it was."""
        lora = self._run.config.model.lora
        return lora is None or lora.quantize == "none"

    def model(self, folder: Path, exported: tuple[Any, Mapping[str, Tensor]]) -> dict[str, Any]:
        """Check an exported model.

        Args:
            exported: what `models.export_model` received: the model (for its names), and all its weights.
        Returns:
            The ledger's record: how many tensors are equal, and how far the logits are apart.
        Raises:
            ExportCheckError: a tensor or the logits differ.
        """
        from delib_fast.models.export_check import compare_weights, lost_effect, reload_model

        began = time.perf_counter()
        reloaded = reload_model(folder, trust_remote_code=self._run.config.model.trust_remote_code)
        tensors = compare_weights(reloaded, *exported)
        logits, record = self._compare(reloaded)
        if self._adapted is not None and self._is_exact:
            lost = lost_effect(logits, self._compared.logits, *self._adapted)
            record["lost_effect"] = lost
            self._judge_lost_effect(lost, folder)
        if self._nll:
            record["nll"] = self._nll | {"merged": self._mean_nll(reloaded), "tokens": self._scored_tokens}
        return {"tensors": tensors, **record, "wall_s": time.perf_counter() - began}

    def adapter(self, folder: Path, base: Any, exported: tuple[Any, Mapping[str, Tensor]]) -> dict[str, Any]:
        """Check an exported adapter next to its base; see `model`."""
        from delib_fast.models.export_check import compare_adapter, reload_adapter

        began = time.perf_counter()
        reloaded = reload_adapter(base, folder)
        tensors = compare_adapter(reloaded, *exported)
        adapted, record = self._compare(reloaded)
        nll = {"adapter": self._mean_nll(reloaded)} if self._scored_tokens else {}
        with reloaded.disable_adapter():
            self._adapted = self._logits(reloaded), adapted
            if nll:
                self._nll = {"base": self._mean_nll(reloaded), **nll}
        if self._nll:
            record["nll"] = {**self._nll, "tokens": self._scored_tokens}
        return {"tensors": tensors, **record, "wall_s": time.perf_counter() - began}

    @property
    def _scored_tokens(self) -> int:
        return sum(int(counts[1:].sum()) for counts in self._compared.scored[1])

    def _mean_nll(self, model: Any) -> float:
        from delib_fast.models.export_check import stock_nll

        return stock_nll(model, *self._compared.scored, _device(self._run, model))

    def _logits(self, model: Any) -> list[Tensor]:
        from delib_fast.models.export_check import stock_logits

        return stock_logits(model, self._compared.documents, _device(self._run, model))

    def _compare(self, reloaded: Any) -> tuple[list[Tensor], dict[str, Any]]:
        from delib_fast.models.export_check import TOLERANCE, ExportCheckError, compare_logits

        precision = self._run.config.engine.precision
        logits = self._logits(reloaded)
        found = compare_logits(self._compared.logits, logits)
        tolerance = TOLERANCE[DTYPES[precision]] if self._is_exact else None
        if tolerance is not None and not found.typical <= tolerance:
            raise ExportCheckError(
                f"its logits differ by {found.typical:.2g} (relative; the median of a document's tokens, at most "
                f"{found.largest:.2g}) from those of the model in training; {tolerance:g} is allowed in {precision}"
            )
        return logits, {
            "difference": found.typical,
            "largest_difference": found.largest,
            "tolerance": tolerance,
        }

    def _judge_lost_effect(self, lost: float | None, folder: Path) -> None:
        from delib_fast.models.export_check import MAX_LOST_EFFECT, ExportCheckError

        if lost is None or abs(lost) <= MAX_LOST_EFFECT:
            return
        what = f"the merged model lacks {lost:.0%} of the adapter's effect on the logits"
        if self._run.config.engine.precision == "fp32":
            raise ExportCheckError(f"{what}; {MAX_LOST_EFFECT:.0%} is allowed")
        self._warn(
            f"{folder}: {what}: in {self._run.config.engine.precision}, changes that are smaller than the rounding of "
            "a weight are lost when they are merged. The adapter itself is exact: use it, or set engine.precision: fp32"
        )


def merge_note(stage: str, checked: Mapping[str, Any], precision: str) -> str:
    """A line about what the merged model has kept of what the adapter learned; "" if it was not measured.

    Args:
        checked: the ledger's `export_check` of the stage.
        precision: that of the merged model.
    """
    nll = checked.get("model", {}).get("nll")
    if nll is None:
        return ""
    gain, lost = nll["base"] - nll["adapter"], nll["merged"] - nll["adapter"]
    text = (
        f"{stage}: nll of {nll['tokens']:,} {checked['rows']} tokens: base {nll['base']:.4f}, adapter "
        f"{nll['adapter']:.4f}, merged into {precision} {nll['merged']:.4f}"
    )
    if gain >= MIN_GAIN_NATS:
        text += f": merging lost {max(0.0, lost / gain):.1%} of what the adapter learned"
        if precision != "fp32" and lost > 0:
            text += "; export.dtype: fp32 merges without rounding"
    return text


def _device(run: RunContext, model: Any) -> Any:
    """The rank's GPU if the model fits next to what is there, else the CPU."""
    import torch

    device = run.ranks.device
    if device.type == "cuda":
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        if torch.cuda.mem_get_info(device)[0] < 1.5 * size:
            return torch.device("cpu")
    return device
