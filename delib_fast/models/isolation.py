"""The check before the first step: does the model isolate the sequences of a pack from each other?

Packed training is silently wrong if attention (or a convolution, or a recurrent state) reads across a document's
boundary: the losses look fine, or even better. So no architecture or backend is trusted. A pack of three short
sequences runs through the whole model, one token is changed, and only later tokens of its sequence may be affected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from delib_fast.data import PackedBatch
from delib_fast.models.eval_mode import eval_mode
from delib_fast.models.lm import TrainableLM
from delib_fast.models.rope import lowered_switch
from delib_fast.models.separation import LEAK_TOLERANCE, probe_pack, probe_tokens
from delib_fast.models.ulysses import gather_tokens

# The lengths differ, so that a wrong boundary shows; the middle sequence has two neighbours.
_LENGTHS = (7, 6, 5)
# Largest difference between the nll in the pack and alone, relative to the largest nll. Rounding stays below it; the
# effect of a wrong position is far above it.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class LeakError(ValueError):
    """Sequences of a pack influence each other. The message says which, how much, and what to do."""


def check_isolation(
    trainable: TrainableLM | nn.Module, device: torch.device | str, *, shares_prompts: bool = False
) -> None:
    """Raise LeakError if the sequences of a pack are not computed as if each were alone.

        for each token changed:   nll of other sequences, and of its sequence's earlier tokens, must not change
        for each sequence:        nll in the pack = nll alone
        shares_prompts:           nll of two replies that share one prompt = nll of each after its own copy
        backward pass:            the nll of a sequence has no gradient at the embeddings of other sequences

    Args:
        trainable: a `TrainableLM`, or a wrapper that calls its forward (a DeepSpeed engine, DDP). With ZeRO-3 all
            ranks must call this together, as with any forward pass; under sequence parallelism the probe is sharded
            across the ranks like any pack.
        device: the device of the model's inputs.
        shares_prompts: whether packs will hold replies that share their prompt.
    Raises:
        LeakError: tokens leak, or a changed token has no effect at all, so that a leak could not be seen.

    Rotary frequencies that change with the length of a text do so within the probe, as they do in long documents.

    Cost: eight forward passes (11 with shares_prompts) on at most 18 tokens without gradients, and one forward and
    backward pass, which gives no gradients to parameters. At ZeRO 3 the backward pass is not checked. Leaks are checked
    in the mode (train or eval) that the model is in, with the same random numbers each time. The comparison with
    separate sequences runs in eval mode. Modes and the global random generators are restored.
    """
    with lowered_switch(trainable, _LENGTHS[1]):  # the first sequence is past the switch, the others are not
        _check_isolation(trainable, torch.device(device), shares_prompts)


def _check_isolation(trainable: nn.Module, device: torch.device, shares_prompts: bool) -> None:
    inner = _trainable_lm(trainable)
    tokens, vocab_size = probe_tokens(inner.model, sum(_LENGTHS))
    tokens = tokens.cpu()
    nll_of = _Probe(trainable, device, inner.sequence_group)
    packed = nll_of(tokens, _LENGTHS)
    if not torch.isfinite(packed).all():
        raise LeakError(
            "the isolation check cannot see leaks: the model's nll is not finite on a probe of 18 tokens; check its "
            "weights"
        )
    bounds = list(pairwise(accumulate(_LENGTHS, initial=0)))
    for index, (start, end) in enumerate(bounds):
        changed = tokens.clone()
        position = start + 2
        changed[position] = (changed[position] + vocab_size // 2) % vocab_size
        _check_change(index, position, (start, end), (nll_of(changed, _LENGTHS) - packed).abs(), packed)
    if (gradient := nll_of.gradient(tokens, _LENGTHS, of=1)) is not None:
        _check_gradient(gradient, bounds[1])
    tolerance = _TOLERANCE.get(next(inner.parameters()).dtype, 5e-2)
    _compare_alone(nll_of.in_eval_mode(), tokens, bounds, tolerance)
    if shares_prompts:
        _compare_shared(nll_of.in_eval_mode(), tokens, bounds, tolerance)


def _compare_alone(nll_of: _Probe, tokens: Tensor, bounds: Sequence[tuple[int, int]], tolerance: float) -> None:
    packed = nll_of(tokens, _LENGTHS)
    for index, (start, end) in enumerate(bounds):
        difference = _relative_difference(nll_of(tokens[start:end], (end - start,)), packed[start:end], packed)
        if difference > tolerance:
            raise LeakError(
                f"sequence {index + 1} of a pack has a different loss than alone (relative difference "
                f"{difference:.1e}), though no other sequence affects it: the model does not respect the batch's "
                "position_ids, or the longest sequence changes the positions of the others. Use another "
                "architecture, or train without packing (one example per pack)"
            )


def _compare_shared(nll_of: _Probe, tokens: Tensor, bounds: Sequence[tuple[int, int]], tolerance: float) -> None:
    """Compare with the first sequence as a prompt and the others as replies that continue it."""
    prompt, *replies = bounds
    prompt_length = prompt[1]
    shared = nll_of(tokens, _LENGTHS, prefix=(-1, 0, 0))
    for start, end in replies:
        own_copy = torch.cat([tokens[slice(*prompt)], tokens[start:end]])
        alone = nll_of(own_copy, (prompt_length + end - start,))[prompt_length:]
        difference = _relative_difference(alone, shared[start:end], shared)
        if difference > tolerance:
            raise LeakError(
                f"replies that share a prompt have a different loss than with a separate prompt each (relative "
                f"difference {difference:.1e}); set share_prompts: never in every stage"
            )


def _relative_difference(a: Tensor, b: Tensor, scale: Tensor) -> float:
    return ((a - b).abs().max() / scale.abs().max().clamp_min(1e-6)).item()


def _check_change(index: int, position: int, bounds: tuple[int, int], change: Tensor, packed: Tensor) -> None:
    """Check where the nll changed after the token at `position`, in sequence `index`, was changed."""
    start, end = bounds
    token = f"token {position - start + 1} of sequence {index + 1}"
    # The nll at position - 1 is that of predicting the changed token, and the nll at position depends on the token
    # itself even if nothing mixes tokens. Both change in any model.
    expected = change[position + 1 : end].max().item()
    if expected <= 1e-6 * packed.abs().max().item():
        raise LeakError(
            f"the isolation check cannot see leaks: changing {token} changes no later loss, so a leak would not show "
            "either. The model does not use its context (a layer initialised to zero?); give it weights that do"
        )
    for name, elsewhere in (
        ("the sequences before it", change[:start]),
        ("the sequences after it", change[end:]),
        ("the earlier tokens of its own sequence", change[start : position - 1]),
    ):
        leak = elsewhere.max().item() if elsewhere.numel() else 0.0
        if leak > LEAK_TOLERANCE * expected:
            raise LeakError(
                f"packed documents leak: changing {token} changes the loss of {name} by {leak:.1e} (of the later "
                f"tokens of its own sequence by {expected:.1e}). The model's attention, or another layer that mixes "
                "tokens, ignores cu_seqlens. Train with model.attention: auto on an architecture in which every layer "
                "takes its attention from transformers' AttentionInterface"
            )


def _check_gradient(gradient: Tensor, bounds: tuple[int, int]) -> None:
    """Check where the loss of the second sequence, with these bounds, has a gradient; (T,) the largest per token."""
    start, end = bounds
    own, elsewhere = gradient[start:end].max().item(), torch.cat([gradient[:start], gradient[end:]]).max().item()
    if not elsewhere <= LEAK_TOLERANCE * own:
        raise LeakError(
            f"packed documents leak in the backward pass: the loss of sequence 2 has a gradient of {elsewhere:.1e} at "
            f"other sequences (of {own:.1e} at its own tokens), though its value does not depend on them. Set "
            "model.attention to another backend, and please report this"
        )


class _Probe:
    """Runs token ids through the model as packs; returns the nll (T,) float64 of every token with a target, else 0."""

    def __init__(
        self, trainable: nn.Module, device: torch.device, group: dist.ProcessGroup | None, *, in_eval_mode: bool = False
    ) -> None:
        self._trainable, self._device, self._group, self._in_eval_mode = trainable, device, group, in_eval_mode

    def in_eval_mode(self) -> _Probe:
        return _Probe(self._trainable, self._device, self._group, in_eval_mode=True)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, lengths: Sequence[int], prefix: tuple[int, ...] | None = None) -> Tensor:
        devices = [self._device] if self._device.type == "cuda" else []
        mode: contextlib.AbstractContextManager[None] = (
            eval_mode(self._trainable) if self._in_eval_mode else contextlib.nullcontext()
        )
        with mode, torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)  # dropout elsewhere in the model is then the same in every pass
            return self._nll(probe_pack(tokens, lengths, prefix)).double().cpu()

    def gradient(self, tokens: Tensor, lengths: Sequence[int], of: int) -> Tensor | None:
        """The largest entry (T,) float64 of the gradient of one sequence's loss at each token's embedding.

        None if the embeddings are not a module's output (T, H), or the weights are sharded (ZeRO 3). Parameters get no
        gradient.
        """
        inner = _trainable_lm(self._trainable)
        if any(hasattr(parameter, "ds_id") for parameter in inner.parameters()):
            return None
        found: list[Tensor] = []

        def capture(_module: nn.Module, _args: Any, output: Any) -> Any:
            if not isinstance(output, Tensor):
                return output
            found.append(output.detach().requires_grad_())
            return found[-1].clone()  # some models write into it

        pack = probe_pack(tokens, lengths)
        bounds = pack.cu_seqlens_host
        own = torch.zeros_like(pack.loss_weights)
        own[bounds[of] : bounds[of + 1] - 1] = 1
        pack = self._of_rank(replace(pack, loss_weights=own, loss_positions=own.nonzero().squeeze(-1)))
        embeddings: Any = inner.model.get_input_embeddings()
        handle = embeddings.register_forward_hook(capture)
        devices = [self._device] if self._device.type == "cuda" else []
        try:
            with torch.enable_grad(), torch.random.fork_rng(devices=devices):
                loss = inner(pack).loss_sum
                gradients = torch.autograd.grad(loss, found, allow_unused=True) if found else ()
        finally:
            handle.remove()
        largest = [
            torch.zeros(x.shape[1]) if gradient is None else gradient[0].abs().amax(-1).double().cpu()
            for x, gradient in zip(found, gradients, strict=True)
            if x.dim() == 3
        ]
        per_token = torch.cat(largest) if largest else torch.zeros(0)
        if self._group is not None:
            per_token = gather_tokens(per_token.float().to(self._device), self._group)[: len(tokens)].double().cpu()
        return per_token if len(per_token) == len(tokens) else None

    def _nll(self, pack: PackedBatch) -> Tensor:
        nll: Tensor = self._trainable(self._of_rank(pack)).nll
        return nll if self._group is None else gather_tokens(nll, self._group)[: pack.num_tokens]

    def _of_rank(self, pack: PackedBatch) -> PackedBatch:
        """This rank's shard of the pack, on the device."""
        if self._group is not None:
            pack = pack.shard_of(dist.get_rank(self._group), dist.get_world_size(self._group))
        return pack.to(self._device)


def _trainable_lm(trainable: nn.Module) -> TrainableLM:
    """The TrainableLM inside a wrapper."""
    inner = next((module for module in trainable.modules() if isinstance(module, TrainableLM)), None)
    if inner is None:
        raise TypeError(f"check_isolation takes a TrainableLM or a module around one, not {type(trainable).__name__}")
    return inner
