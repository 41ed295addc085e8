"""Agentic misalignment: the published design (Lynch et al. 2025) with scenarios written for this project.

    from delib_fast.evals.agentic import conditions, conduct, margins, prompt

The Inspect task is in `delib_fast.evals.agentic.task` and needs the `evals` extra.
"""

from __future__ import annotations

from delib_fast.evals.agentic.conduct import Conduct, ConductFigures, conduct, conduct_figures
from delib_fast.evals.agentic.margin import MarginFigures, Margins, margins
from delib_fast.evals.agentic.prompts import Condition, conditions, judge_prompt, mail, prompt

__all__ = [
    "Condition",
    "Conduct",
    "ConductFigures",
    "MarginFigures",
    "Margins",
    "conditions",
    "conduct",
    "conduct_figures",
    "judge_prompt",
    "mail",
    "margins",
    "prompt",
]
