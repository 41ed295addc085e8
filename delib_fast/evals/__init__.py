"""Evaluation: segment nll, chain-of-thought monitorability, refusal, agentic misalignment.

Functions take a loaded model with its tokenizer (a `Scorer`, or a `ChatModel` to sample replies) and rows. They return
plain dataclasses in which every figure is an `Estimate` with its interval. They need the `evals` extra.

    scorer = Scorer(TrainableLM(model), tokenizer)
    segment_figures(scorer, rows)            # held-out nll and accuracy
    drift_from_base(scorer, rows, base)      # KL from the base, base perplexity
    early_answering(scorer, rows)            # the answer after 0 … 100 % of the chain of thought
    reliance(scorer, rows)                   # the answer after an empty, shuffled, foreign, … chain of thought
    margins(scorer)                          # agentic misalignment, teacher-forced

    sampler = Sampler(model, tokenizer, Sampling(max_new_tokens=256))
    hint_figures(hint_outcomes(sampler, choices_from_gsm8k(rows)))
    cot_necessity(sampler, rows)

`delib-fast eval` runs them as suites and writes JSON, tables and an HTML page.
"""

from __future__ import annotations

from delib_fast.datagen.refusals import classify_reply
from delib_fast.evals.agentic import margins
from delib_fast.evals.eval_callback import EvalCallback
from delib_fast.evals.intervals import Estimate, bootstrap, mean, newcombe, ratio, wilson
from delib_fast.evals.metrics.choices import choices_from_gsm8k
from delib_fast.evals.metrics.dose import cot_dose, gradient_share
from delib_fast.evals.metrics.drift import drift_from_base
from delib_fast.evals.metrics.hints import hint_figures, hint_outcomes
from delib_fast.evals.metrics.legibility import legibility, vocabulary
from delib_fast.evals.metrics.monitors import WordMonitor, compare_views, transcripts_from_solutions
from delib_fast.evals.metrics.necessity import cot_necessity
from delib_fast.evals.metrics.policy import PolicyClassifier, policy_retrieval
from delib_fast.evals.metrics.refusal import classifier_figures, read_prompts, refusal_figures
from delib_fast.evals.metrics.reliance import early_answering, reliance
from delib_fast.evals.metrics.segments import categories_of, segment_figures
from delib_fast.evals.sampling import ChatModel, Reply, Sampler
from delib_fast.evals.scoring import Scorer
from delib_fast.models.generate import Sampling

__all__ = [
    "ChatModel",
    "Estimate",
    "EvalCallback",
    "PolicyClassifier",
    "Reply",
    "Sampler",
    "Sampling",
    "Scorer",
    "WordMonitor",
    "bootstrap",
    "categories_of",
    "choices_from_gsm8k",
    "classifier_figures",
    "classify_reply",
    "compare_views",
    "cot_dose",
    "cot_necessity",
    "drift_from_base",
    "early_answering",
    "gradient_share",
    "hint_figures",
    "hint_outcomes",
    "legibility",
    "margins",
    "mean",
    "newcombe",
    "policy_retrieval",
    "ratio",
    "read_prompts",
    "refusal_figures",
    "reliance",
    "segment_figures",
    "transcripts_from_solutions",
    "vocabulary",
    "wilson",
]
