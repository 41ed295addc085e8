"""The learning rate of each step, at the corners of the schedules."""

from __future__ import annotations

import pytest


def rates(steps: int, **keys) -> list[float]:
    from delib_fast.config import OptimizerConfig
    from delib_fast.engine.optimizer import learning_rate

    config = OptimizerConfig(lr=1.0, **keys)
    return [learning_rate(step, steps, config) for step in range(steps)]


def test_wsd_rises_stays_constant_and_falls_at_the_end():
    assert rates(10, schedule="wsd", warmup=0.2, decay=0.3) == pytest.approx(
        [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3]
    )
    assert rates(4, schedule="wsd", warmup=0, decay=0.5, min_lr_ratio=0.5) == pytest.approx([1, 1, 1, 0.75])


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_wsd_of_few_steps_is_never_zero(steps):
    """If the decay is longer than what the warm-up leaves, it begins where the warm-up ends."""
    assert all(0 < rate <= 1 for rate in rates(steps, schedule="wsd", warmup=0.9, decay=1.0))


def test_every_schedule_reaches_lr_after_the_warm_up():
    for schedule in ("cosine", "linear", "constant", "wsd"):
        assert rates(20, schedule=schedule, warmup=0.1)[2] == 1.0
