"""YAML: values that seem to mean something else are refused, and what is written is read as the same text."""

from __future__ import annotations

import random

import pytest
import yaml
from test_config import YAML, write

from delib_fast.config import ConfigError
from delib_fast.config.load import load_config, read_yaml
from delib_fast.config.yaml_text import dump_yaml


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.optimizer.lr=.inf", "stages.msm.optimizer.lr: input should be a finite number, not inf"),
        ("stages.0.optimizer.lr=inf", "stages.msm.optimizer.lr: input should be a finite number, not 'inf'"),
        ("stages.0.optimizer.lr=1e400", "stages.msm.optimizer.lr: input should be a finite number"),
        ("stages.0.optimizer.lr=.nan", "stages.msm.optimizer.lr: input should be a finite number"),
        ("stages.0.optimizer.betas=[0.9, .nan]", "stages.msm.optimizer.betas.1: input should be a finite number"),
        ("stages.0.mix={docs: .inf}", "stages.msm.mix.docs: input should be a finite number"),
        ("data.docs.repeat=.nan", "data.docs.repeat: input should be a finite number"),
        ("stages.0.epochs=true", "stages.msm.epochs: a number is expected, not true"),
        ("stages.0.max_steps=false", "stages.msm.max_steps: a number is expected, not false"),
        ("stages.0.optimizer.betas=[true, 0.9]", "stages.msm.optimizer.betas: a number is expected, not true"),
        ("stages.0.mix={docs: true}", "stages.msm.mix: a number is expected, not true"),
        ("engine.zero_stage=true", "engine.zero_stage: a number is expected, not true"),
        ("stages.0.epochs=010", "010 means different things in YAML 1.1 and 1.2; write the number without a leading 0"),
        ("stages.0.epochs=08", "08 means different things"),
        ("stages.0.epochs=1:30", "1:30 means different things in YAML 1.1 and 1.2; write a decimal number"),
        ("stages.0.epochs=0b11", "0b11 means different things"),
        ("stages.0.epochs=0o17", "0o17 means different things"),
        ("engine.deterministic=yes", "yes means different things in YAML 1.1 and 1.2; write true or false"),
        ("stages.0.name=on", 'on means different things in YAML 1.1 and 1.2; write true or false, or "on" for a text'),
        ("cache_dir=None", 'None is a text in YAML; write null for no value, or "None" for the text'),
        ("stages.0.epochs=2026-11-30", "stages.msm.epochs: input should be a valid integer"),
        (f"seed={'9' * 5000}", "999999999999… is not an integer, or has too many digits"),
        (f"stages.0.epochs={1 << 63}", "stages.msm.epochs: the number is too large; it must fit in 64 bits"),
        (
            "stages.0.epochs=1e20",
            "stages.msm.epochs: unable to parse input string as an integer, exceeded maximum size",
        ),
        (f"stages.0.epochs='{1 << 70}'", "stages.msm.epochs: the number is too large"),
        (f"stages.0.optimizer.lr={10**400}", "stages.msm.optimizer.lr: the number is too large"),
        ("stages.0.epochs=2.5", "stages.msm.epochs: input should be a valid integer"),
        ("model={path: a, path: b}", "--set model:1: not valid YAML: the key 'path' is given twice"),
        ("deepspeed={1: a, 1: b}", "the key 1 is given twice"),
        ("deepspeed={<<: {a: 1}, <<: {b: 1}}", "the key '<<' is given twice"),
        ("deepspeed=!!binary aGk=", "the tag '!!binary' is not supported; only plain data can be read"),
        ("deepspeed={[a]: b}", "a key must be a text or a number"),
        ("deepspeed=&x {a: *x}", "not valid YAML"),
        ("deepspeed=&x [*x]", "not valid YAML"),
        ("deepspeed=" + "[" * 500, "values are nested too deeply"),
    ],
)
def test_a_value_that_seems_to_mean_something_else_is_refused(tmp_path, override, message):
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, YAML), [override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        (".5", 0.5),
        ("1_000", 1000),
        ("0x10", 16),
        ("-0", 0),
        ("~", None),
        ("", None),
        ("False", False),
        ("2026-11-30", "2026-11-30"),
        ('"010"', "010"),
        ("'yes'", "yes"),
        ("y", "y"),
        ("=", "="),
        ("{<<: {a: 1, b: 1}, b: 2}", {"a": 1, "b": 2}),
        ("[&x {a: 1}, *x]", [{"a": 1}, {"a": 1}]),
    ],
)
def test_plain_values_are_read(text, value):
    read = read_yaml(f"k: {text}", where="test")["k"]
    assert read == value
    assert type(read) is type(value)


def test_aliases_that_repeat_more_than_a_file_can_hold_are_refused():
    lines = ["a0: &a0 [x]", *(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 12))]
    with pytest.raises(ConfigError, match=r"aliases repeat its values more than 1,000,000 times"):
        read_yaml("\n".join(lines), where="test")


def test_what_is_written_is_read_as_the_same_text():
    """Also by YAML 1.1, which other tools read, and whatever the text looks like."""
    draw = random.Random(0)
    parts = [
        *" \n\t\r\x85\u2028:#-'\"\\{}[],&*!|>%@`019.eExob_~<=+ynN",
        "yes",
        "None",
        "null",
        "1:30",
        "1e-4",
        "é",
        "😀",
    ]
    for _ in range(400):
        text = "".join(draw.choices(parts, k=draw.randrange(6)))
        tree = {"key": text, "list": [text], "x" + text: 1}
        assert read_yaml(dump_yaml(tree), where="test") == tree
        assert yaml.safe_load(dump_yaml(tree)) == tree
