"""A step with a teacher has the same gradient however its rows are packed and split over ranks, at every ZeRO stage.

SGD steps in float32 on two real ranks, against one big pack in plain torch in float64. The error may be twice
that of plain torch in float32. With packs of 128 tokens, the second step follows a restart from a checkpoint. After
each step comes a forward pass without the teacher, as in an evaluation.
"""

from __future__ import annotations

from helpers.launch import result_of, run_ranks


def test_packs_ranks_and_sharding_do_not_matter(tmp_path, full):
    """Every teacher (the model, its base, another one), ZeRO stage, and two ranks that share a pack."""
    options = ["--full"] if full else []
    errors = result_of(run_ranks(["tests/engine/teacher_worker.py", str(tmp_path), *options], 2)[0])
    assert len(errors) == (36 if full else 6)
    assert {name: error for name, error in errors.items() if not error <= 2} == {}
