"""The checks of linear_kl_divergence's arguments. They never read device memory."""

import math

import torch
from torch import Tensor

from delib_fast.ops._checks import check_devices, check_head, check_positions, check_rows
from delib_fast.ops.linear_kl_divergence._call import DIRECTIONS, OP


def check_teacher(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> None:
    """Raise ValueError if the teacher's tensors do not fit those of the student."""
    if teacher_hidden.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"{OP}: teacher_hidden has {teacher_hidden.shape[0]} rows and student_hidden {hidden.shape[0]}; "
            "row t of both must predict the same token, so select the teacher's rows first"
        )
    if teacher_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"{OP}: teacher_weight has {teacher_weight.shape[0]} rows and student_weight {weight.shape[0]}; both must "
            "have the same vocabulary. If rows only pad it, slice both weights to the number of tokens"
        )
    if teacher_hidden.dtype != hidden.dtype:
        raise ValueError(f"{OP}: teacher_hidden is {teacher_hidden.dtype} and student_hidden {hidden.dtype}; cast one")


def check_tensors(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None],
    targets: Tensor | None,
    loss_weights: Tensor | None,
    nll_weight: float | Tensor,
    loss_positions: Tensor | None,
) -> None:
    """Raise ValueError if shapes, dtypes or devices do not match; student and teacher are (hidden, weight, bias)."""
    check_head(OP, *student, prefix="student_")
    check_head(OP, *teacher, prefix="teacher_")
    check_teacher(*student[:2], *teacher[:2])
    rows = student[0].shape[0]
    check_rows(OP, "targets", targets, rows, torch.int64)
    check_rows(OP, "loss_weights", loss_weights, rows, None)
    check_rows(OP, "nll_weight", nll_weight if isinstance(nll_weight, Tensor) else None, rows, None)
    check_positions(OP, loss_positions)
    if targets is None and (isinstance(nll_weight, Tensor) or nll_weight != 0):
        raise ValueError(f"{OP}: nll_weight is given without targets; pass targets (T,), or nll_weight=0")
    check_devices(
        OP,
        student[0],
        student_weight=student[1],
        student_bias=student[2],
        teacher_hidden=teacher[0],
        teacher_weight=teacher[1],
        teacher_bias=teacher[2],
        targets=targets,
        loss_weights=loss_weights,
        nll_weight=nll_weight if isinstance(nll_weight, Tensor) else None,
        loss_positions=loss_positions,
    )


def check_objective(direction: str, beta: float, temperature: float, nll_weight: float | Tensor) -> None:
    """Raise ValueError if an option of the divergence is out of range."""
    if direction not in DIRECTIONS:
        raise ValueError(f"{OP}: direction={direction!r} does not exist; choose from {', '.join(DIRECTIONS)}")
    if not 0 < beta < 1:
        raise ValueError(
            f"{OP}: beta={beta}; it must be between 0 and 1, both excluded. "
            'At the ends use direction="forward" or "reverse"'
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"{OP}: temperature={temperature}; it must be a positive number, 1 for none")
    if not isinstance(nll_weight, Tensor) and not -math.inf < nll_weight < math.inf:
        raise ValueError(f"{OP}: nll_weight={nll_weight}; it must be a finite number, 0 for none, or a tensor (T,)")
