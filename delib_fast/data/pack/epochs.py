"""Plan the epochs of a stage: which examples share a pack, which packs a step, and in which order.

A plan is a pure function of (lengths, prompts, seed, epoch, packs per step). Every epoch has the same number of packs.

Sizes: N examples, P packs of an epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from delib_fast.data.encode.tokenized_dataset import TokenizedDataset
from delib_fast.data.pack.packing import PackPlan, plan_packs, seeded_permutation
from delib_fast.data.pack.shared_prompts import bundle, plan_bundles

_UNEVEN = 1.02  # if the maximum cost of a pack is within this factor of the mean, packs are shuffled regardless of cost


@dataclass(frozen=True, slots=True)
class PromptSharing:
    """What an epoch saves by computing shared prompts once."""

    prompts: int
    """Prompts that are computed once for several replies."""
    examples: int
    """Examples that share a prompt with another one."""
    tokens: int
    """Tokens that are saved."""
    share: float
    """Saved tokens ÷ tokens without prompt sharing."""


@dataclass(frozen=True, slots=True, eq=False)
class StageTotals:
    """Totals over all steps of a stage."""

    repeats: NDArray[np.int64]
    """(N,) how often each example is trained on."""
    tokens: int
    """Tokens in all packs."""
    shared_tokens: int
    """Prompt tokens that are saved by prompt sharing."""


class EpochPlanner:
    """Plans epochs on demand, and caches the last two plans."""

    def __init__(
        self,
        examples: TokenizedDataset,
        *,
        pack_capacity: int,
        packs_per_step: int,
        seed: int,
        quadratic_cost: float,
        share_prompts: bool,
    ) -> None:
        self._examples, self._capacity, self._packs_per_step = examples, pack_capacity, packs_per_step
        self._seed, self._quadratic_cost = seed, quadratic_cost
        self._bundles = bundle(examples, pack_capacity) if share_prompts else None
        self.plan = lru_cache(maxsize=2)(self._plan)
        self.costs = lru_cache(maxsize=2)(self._costs)
        self.steps_per_epoch = -(-self.plan(0)[0].num_packs // packs_per_step)

    @property
    def shares_prompts(self) -> bool:
        """Whether packs share prompts."""
        return self._bundles is not None

    def step(self, index: int) -> tuple[PackPlan, NDArray[np.int64]]:
        """Return (the plan of the step's epoch, the indices of the step's packs in it)."""
        epoch, step = divmod(index, self.steps_per_epoch)
        plan, order = self.plan(epoch)
        return plan, order[step * self._packs_per_step : (step + 1) * self._packs_per_step]

    def _plan(self, epoch: int) -> tuple[PackPlan, NDArray[np.int64]]:
        """Return (the packs of an epoch, their order)."""
        seed = self._seed * 1_000_003 + epoch
        plan = (
            plan_packs(self._examples.lengths, self._capacity, seed=seed)
            if self._bundles is None
            else plan_bundles(self._bundles, self._capacity, seed=seed)
        )
        order = seeded_permutation(plan.num_packs, seed ^ 0x5EED)
        if self._quadratic_cost > 0:
            costs = self._costs_of(plan, self._quadratic_cost)
            if costs.max() > _UNEVEN * costs.mean():
                order = bucket_by_cost(order, costs, self._packs_per_step, seed ^ 0xC057)
        return plan, order

    def _costs(self, epoch: int, quadratic_cost: float) -> NDArray[np.float64]:
        return self._costs_of(self.plan(epoch)[0], quadratic_cost)

    def _costs_of(self, plan: PackPlan, quadratic_cost: float) -> NDArray[np.float64]:
        return pack_costs(plan, self._examples.lengths, quadratic_cost, self._examples.prompt_keys[:, 0])

    # --- totals ---------------------------------------------------------------------------------------------

    def prompt_sharing(self) -> PromptSharing | None:
        """Return what prompt sharing saves in an epoch; None without shared prompts."""
        plan = self.plan(0)[0]
        if plan.continues is None:
            return None
        leads = int((plan.continues[1:] & ~plan.continues[:-1]).sum())
        saved = int(self._examples.lengths.sum()) - plan.num_tokens
        return PromptSharing(leads, leads + int(plan.continues.sum()), saved, saved / (saved + plan.num_tokens))

    def totals(self, num_steps: int) -> StageTotals:
        """Return the totals of the first `num_steps` steps. The last epoch may be incomplete."""
        lengths = self._examples.lengths
        epochs, steps = divmod(num_steps, self.steps_per_epoch)
        repeats, tokens = np.full(len(lengths), epochs), epochs * self.plan(0)[0].num_tokens
        if steps:
            plan, order = self.plan(epochs)
            in_steps = np.zeros(plan.num_packs, bool)
            in_steps[order[: steps * self._packs_per_step]] = True
            used = np.repeat(in_steps, np.diff(plan.pack_offsets))
            repeats[plan.examples[used]] += 1
            tokens += int(lengths[plan.examples[used]].sum())
            if plan.continues is not None:
                tokens -= int(self._examples.prompt_keys[plan.examples[used & plan.continues], 0].sum())
        return StageTotals(repeats, tokens, int(repeats @ lengths) - tokens)

    def first_step_without(self, wanted: NDArray[np.bool_], num_steps: int) -> int | None:
        """Return the first step without any of the wanted (N,) examples; None if every step has one."""
        if wanted.all():
            return None
        for epoch in range(-(-num_steps // self.steps_per_epoch)):
            plan, order = self.plan(epoch)
            packs = np.logical_or.reduceat(wanted[plan.examples], plan.pack_offsets[:-1])[order]
            steps = np.logical_or.reduceat(packs, np.arange(0, len(packs), self._packs_per_step))
            missing = np.flatnonzero(~steps)
            if len(missing) and epoch * self.steps_per_epoch + missing[0] < num_steps:
                return int(epoch * self.steps_per_epoch + missing[0])
        return None


def pack_costs(
    plan: PackPlan, lengths: NDArray[np.int64], quadratic_cost: float, prompt_lengths: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """Return (P,) the cost of each pack: Σ n + q·n² over its examples, minus p + q·p² for each prompt computed once."""

    def cost(tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        n = tokens.astype(np.float64)
        return n + quadratic_cost * n * n

    costs = cost(lengths[plan.examples])
    if plan.continues is not None and prompt_lengths is not None:
        costs -= plan.continues * cost(prompt_lengths[plan.examples])
    return np.add.reduceat(costs, plan.pack_offsets[:-1])


def bucket_by_cost(
    order: NDArray[np.int64], costs: NDArray[np.float64], packs_per_step: int, seed: int
) -> NDArray[np.int64]:
    """Put packs of similar cost into one step, and shuffle the steps.

    An incomplete step comes last, and consists of the cheapest packs.
    """
    by_cost = order[np.argsort(costs[order], kind="stable")]  # packs of equal cost stay in their random order
    short = len(by_cost) % packs_per_step
    steps = by_cost[short:].reshape(-1, packs_per_step)
    if len(steps):
        steps = steps[seeded_permutation(len(steps), seed)]
    return np.concatenate([steps.ravel(), by_cost[:short]])
