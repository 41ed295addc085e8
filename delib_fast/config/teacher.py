"""The teacher of an AFT stage: a model that reads the spec, which the model that is trained (the student) does not."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat

from delib_fast.config.base import FilePath, Section

OWN_WEIGHTS = ("base", "self")
"""The values of `TeacherConfig.model` that name the model that is trained."""


class TeacherConfig(Section):
    """Context distillation: also train on the divergence from a teacher that reads a spec before each row. The loss of
    a response token is weight · divergence + nll_weight · response_weight · nll."""

    spec: FilePath
    """The file of the spec. The teacher reads it, as it is, at the beginning of the system message of every row. It is
    computed once for a pack. A prompt of the stage that contains text of it is an error."""
    sections: Literal["all"] = "all"
    """The sections of the spec that the teacher reads: `all`."""
    model: FilePath = "base"
    """`base`: the model without its adapter, which needs model.lora. `self`: the model as it is at each step. Or
    another model, frozen, with the same tokenizer: a Hugging Face folder or hub name, or a `.gguf` file."""
    weight: float = Field(1.0, gt=0)
    """Loss weight of the divergence of each token, relative to `response_weight` and the stage's `cot_weight`."""
    nll_weight: NonNegativeFloat = 0.2
    """Factor on the loss weight of each nll of a chat. 0 trains on the divergence alone."""
    cot_weight: NonNegativeFloat = 0.0
    """Factor on the divergence of a CoT token; that of a response token is 1. With 0, the divergence trains the
    response alone; the CoT is then trained on by its nll, unless the stage's `cot` is context or `nll_weight` is 0."""
    direction: Literal["forward", "reverse", "jsd"] = "reverse"
    """`forward`: KL(teacher, student). `reverse`: KL(student, teacher). `jsd`: their mean, each to the mixture of
    both."""
