"""The check before the first step: does the model, as it stands, keep the runs of a pack apart?

Packed training is silently wrong where attention (or a convolution, or a recurrent state) reads across a
document's border: the losses look fine, better even. So nothing is believed of architectures and backends: a
pack of three short runs goes through the whole model, one token is changed, and only that run's later tokens
may notice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from delib_fast.data import PackedBatch
from delib_fast.models.eval_mode import eval_mode
from delib_fast.models.lm import TrainableLM
from delib_fast.models.ulysses import gather_tokens

# The runs are of different lengths, so that an error in their borders shows; the middle one has both
# neighbours.
_LENGTHS = (7, 6, 5)
# How much of a change's proper effect may show where it must not. Kernels that keep runs apart show none, bit
# for bit; but a matrix product whose tiling depends on other rows (experts) may round differently.
_LEAST_LEAK = 1e-2
# Packed against alone, relative to the largest nll: rounding only. A wrong position is far above it.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class LeakError(ValueError):
    """Runs of one pack influence each other: says which way, how much, and what to do."""


def check_isolation(
    trainable: TrainableLM | nn.Module, device: torch.device | str, *, shares_prompts: bool = False
) -> None:
    """Refuse a model in which a pack's runs are not as if each were alone.

        for each token changed:   nll of other runs, and of the run's earlier tokens, must stay as they were
        for each run:             nll in the pack = nll alone
        shares_prompts:           nll of two replies behind one copy of their prompt = nll of each behind its own

    Args:
        trainable: a `TrainableLM`, or what wraps one and passes its forward on (a DeepSpeed engine, DDP).
            With ZeRO-3 every rank calls this together, as with any forward pass; under sequence parallelism the
            ranks share out the probe as they do a pack.
        device: where its inputs go.
        shares_prompts: whether packs will hold replies that share their prompt.
    Raises:
        LeakError: naming what leaks. Also where a changed token has no effect at all, since then nothing was
            seen.

    Eight forward passes (11 with shares_prompts) on at most 18 tokens, without gradients: leaks in the mode (train or
    eval) that the model is in, with the same random numbers each time, packed against alone in eval mode. Modes and
    global generators are left as they were.
    """
    device = torch.device(device)
    vocab_size, dtype, group = _facts(trainable)
    tokens = torch.arange(sum(_LENGTHS)) * 7919 % vocab_size  # all over the vocabulary
    run = _Probe(trainable, device, group)
    packed = run(tokens, _LENGTHS)
    if not torch.isfinite(packed).all():
        raise LeakError(
            "the isolation check can't see: the model's nll is not finite on a probe of 18 tokens; look at its weights"
        )
    borders = list(pairwise(accumulate(_LENGTHS, initial=0)))
    for index, (start, end) in enumerate(borders):
        changed = tokens.clone()
        location = start + 2
        changed[location] = (changed[location] + vocab_size // 2) % vocab_size
        _judge(index, location, (start, end), (run(changed, _LENGTHS) - packed).abs(), packed)
    _compare_alone(run.in_eval_mode(), tokens, borders, _TOLERANCE.get(dtype, 5e-2))
    if shares_prompts:
        _compare_shared(run.in_eval_mode(), tokens, borders, _TOLERANCE.get(dtype, 5e-2))


def _compare_alone(run: _Probe, tokens: Tensor, borders: Sequence[tuple[int, int]], tolerance: float) -> None:
    packed = run(tokens, _LENGTHS)
    for index, (start, end) in enumerate(borders):
        alone = run(tokens[start:end], (end - start,))
        off = ((alone - packed[start:end]).abs().max() / packed.abs().max().clamp_min(1e-6)).item()
        if off > tolerance:
            raise LeakError(
                f"run {index + 1} of a pack has another loss than alone (relative difference {off:.1e}), "
                "though no other run reaches it: the model does not heed the batch's position_ids. Use an "
                "architecture that does, or train without packing (one example a pack)"
            )


def _compare_shared(run: _Probe, tokens: Tensor, borders: Sequence[tuple[int, int]], tolerance: float) -> None:
    """The first run as a prompt, the others as replies that continue it."""
    prompt, *replies = borders
    shared = run(tokens, _LENGTHS, prefix=(-1, 0, 0))
    for start, end in replies:
        alone = run(torch.cat([tokens[slice(*prompt)], tokens[start:end]]), (prompt[1] + end - start,))[prompt[1] :]
        off = ((alone - shared[start:end]).abs().max() / shared.abs().max().clamp_min(1e-6)).item()
        if off > tolerance:
            raise LeakError(
                f"replies that share a prompt have another loss than with a prompt of their own (relative "
                f"difference {off:.1e}); set share_prompts: never in every stage"
            )


def _judge(index: int, location: int, border: tuple[int, int], moved: Tensor, packed: Tensor) -> None:
    start, end = border
    # The nll at place - 1 is that of predicting the changed token, the nll at place is that of the token itself
    # even where nothing mixes tokens: both move, and say nothing.
    proper = moved[location + 1 : end].max().item()
    if proper <= 1e-6 * packed.abs().max().item():
        raise LeakError(
            f"the isolation check can't see: changing token {location - start + 1} of run {index + 1} changes "
            "no loss behind it, so a leak would not show either. The model does not use its context (a layer "
            "initialised to zero?); give it weights that do"
        )
    for name, part in (
        ("the runs before it", moved[:start]),
        ("the runs behind it", moved[end:]),
        ("the tokens before it in its own run", moved[start : location - 1]),
    ):
        leak = part.max().item() if part.numel() else 0.0
        if leak > _LEAST_LEAK * proper:
            raise LeakError(
                f"packed documents leak: changing token {location - start + 1} of run {index + 1} changes the "
                f"loss of {name} by {leak:.1e} (of its own run's later tokens by {proper:.1e}). The model's "
                "attention or another layer that mixes tokens ignores cu_seqlens. Train with "
                "model.attention: auto on an architecture whose every layer takes its attention from "
                "transformers' AttentionInterface"
            )


class _Probe:
    """Runs token ids through the model as packs and gives the nll of every token but the last of each run."""

    def __init__(
        self, trainable: nn.Module, device: torch.device, group: dist.ProcessGroup | None, *, eval_mode: bool = False
    ) -> None:
        self._trainable, self._device, self._group, self._eval_mode = trainable, device, group, eval_mode

    def in_eval_mode(self) -> _Probe:
        return _Probe(self._trainable, self._device, self._group, eval_mode=True)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, lengths: Sequence[int], prefix: tuple[int, ...] | None = None) -> Tensor:
        devices = [self._device] if self._device.type == "cuda" else []
        mode: contextlib.AbstractContextManager[None] = (
            eval_mode(self._trainable) if self._eval_mode else contextlib.nullcontext()
        )
        with mode, torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)  # dropout elsewhere in the model is then the same in every pass
            return self._nll(_pack(tokens, lengths, prefix)).double().cpu()

    def _nll(self, pack: PackedBatch) -> Tensor:
        if self._group is None:
            return self._trainable(pack.to(self._device)).nll
        part = pack.shard_of(dist.get_rank(self._group), dist.get_world_size(self._group))
        return gather_tokens(self._trainable(part.to(self._device)).nll, self._group)[: pack.num_tokens]


def _pack(tokens: Tensor, lengths: Sequence[int], prefix: tuple[int, ...] | None) -> PackedBatch:
    borders = tuple(accumulate(lengths, initial=0))
    first = [0 if parent < 0 else lengths[parent] for parent in prefix or (-1,) * len(lengths)]
    targets = tokens.roll(-1)
    targets[[end - 1 for end in borders[1:]]] = -100
    supervised = targets >= 0
    return PackedBatch(
        input_ids=tokens,
        targets=targets,
        loss_weights=supervised.float(),
        segment_ids=torch.full_like(tokens, 3, dtype=torch.int8),
        position_ids=torch.cat([torch.arange(at, at + length) for at, length in zip(first, lengths, strict=True)]),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        max_seqlen=max(lengths),
        loss_positions=supervised.nonzero().squeeze(-1),
        cu_seqlens_host=borders,
        example_ids=tuple(range(len(lengths))),
        prefix=prefix,
    )


def _facts(trainable: nn.Module) -> tuple[int, torch.dtype, dist.ProcessGroup | None]:
    """The vocabulary, compute dtype and sequence group of the TrainableLM inside."""
    inner = next((module for module in trainable.modules() if isinstance(module, TrainableLM)), None)
    if inner is None:
        raise TypeError(f"check_isolation takes a TrainableLM or a module around one, not {type(trainable).__name__}")
    return inner.vocab_size, next(inner.parameters()).dtype, inner.sequence_group
