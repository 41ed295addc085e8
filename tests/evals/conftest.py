from __future__ import annotations

import pytest
from eval_models import ROOT, RuleModel, make_model

from delib_fast.config import SourceConfig
from delib_fast.data import read_source
from delib_fast.evals.scoring import Scorer
from delib_fast.models import train_tokenizer


@pytest.fixture(scope="session")
def rows():
    return read_source("held", SourceConfig(path=str(ROOT / "examples/data/deliberation_heldout.jsonl"), limit=6))


@pytest.fixture(scope="session")
def tokenizer(rows):
    texts = [text for row in rows for text in row.texts]
    return train_tokenizer([*texts, "secret blank one two three four five six seven eight nine ten"] * 2, 600)


@pytest.fixture
def scorer(tokenizer):
    return Scorer(make_model(tokenizer), tokenizer, pack_capacity=512)


@pytest.fixture
def rule_scorer(tokenizer):
    return lambda rule, **more: Scorer(RuleModel(tokenizer, rule, **more), tokenizer, pack_capacity=512)
