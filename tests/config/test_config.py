"""The configuration: round trips, overrides, error messages, and help text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from delib_fast.config import Config, ConfigError, Section, SourceConfig
from delib_fast.config.load import (
    dump_config,
    flatten,
    is_same_value,
    json_schema,
    load_config,
    parse_config,
    read_yaml,
)
from delib_fast.config.yaml_text import dump_yaml
from delib_fast.engine.deepspeed_json import deepspeed_json
from delib_fast.redaction import redact

EXAMPLES = Path(__file__).parents[2] / "examples"


def tree(**changes):
    base = {
        "run_dir": "runs/x",
        "model": {"path": "some/model"},
        "data": {"rows": "rows.jsonl"},
        "stages": [{"kind": "aft", "train": ["rows"], "pack_capacity": 512, "tokens_per_step": 2048}],
    }
    return {**base, **changes}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


YAML = """
run_dir: out
model: {path: some/model}
data:
  rows: rows.jsonl
  docs: {path: sub/docs.md, cut: headings}
stages:
  - {kind: msm, train: [docs]}
  - {kind: aft, train: [rows], optimizer: {lr: 1e-4}}
"""


def test_round_trip(tmp_path):
    config = load_config(write(tmp_path, YAML))
    (tmp_path / "other").mkdir()
    again = load_config(write(tmp_path / "other", dump_config(config)))
    assert again == config.model_copy(update={"run_dir": str(Path.cwd() / "out")})
    assert config.stages[1].optimizer.lr == 1e-4  # YAML 1.1 alone would read the string "1e-4"


def test_relative_paths_start_at_the_file(tmp_path):
    config = load_config(write(tmp_path, YAML), ["data.rows.path=elsewhere.jsonl"])
    assert config.data["docs"].path == str(tmp_path / "sub/docs.md")
    assert config.data["rows"].path == "elsewhere.jsonl"  # an override is relative to the working directory
    assert config.model.path == "some/model"  # no folder of that name next to the file: a hub name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stagse": []}, "config: stagse: unknown key (did you mean 'stages'?)"),
        (
            {"stages": [{"kind": "aft", "train": ["rows"], "cto": "train"}]},
            "config: stages.0.cto: unknown key (did you mean 'cot'?)",
        ),
        (
            {"stages": [{"kind": "aft", "train": ["rows"], "optimizer": {"learning_rate": 1}}]},
            "config: stages.0.optimizer.learning_rate: unknown key",
        ),
        (
            {"stages": [{"kind": "aft", "train": ["row"]}]},
            "config: stages.0.train names 'row', which is not under data: (did you mean 'rows'?)",
        ),
        (
            {"stages": [{"kind": "aft", "train": ["rows"], "cot": "tran"}]},
            "config: stages.0.cot: input should be 'train', 'context' or 'strip', not 'tran'",
        ),
        (
            {"stages": [{"kind": "aft", "train": ["rows"], "pack_capacity": 500, "tokens_per_step": 1200}]},
            "config: stages.0: tokens_per_step (1200) must be a multiple of pack_capacity (500); the nearest is 1000",
        ),
        (
            {"stages": [{"kind": "aft", "train": ["rows"], "cot": "context", "response_weight": 0}]},
            "config: stages.0: nothing is supervised: response_weight is 0 and the CoT is not trained",
        ),
        ({"stages": [{"train": ["rows"]}]}, "config: stages.0: needs kind: msm or kind: aft"),
        (
            {"stages": [{"kind": "aft", "train": ["rows"]}] * 2},
            "config: two stages are called 'aft': give each its own name",
        ),
        (
            {"model": {}},
            "config: model: give exactly one of model.path (a Hugging Face folder or name) and "
            "model.architecture (a new model)",
        ),
        (
            {"model": {"architecture": {"model_type": "qwen3"}}},
            "config: a new model (model.architecture) needs tokenizer.path or tokenizer.train",
        ),
        (
            {"data": {"rows": {"path": "rows.jsonl", "holdout": 1.5}}},
            "config: data.rows.holdout: input should be less than 1, not 1.5",
        ),
    ],
)
def test_refuses_invalid_configurations(change, message):
    with pytest.raises(ConfigError) as error:
        parse_config(tree(**change))
    assert message in str(error.value)


def test_every_error_is_listed():
    with pytest.raises(ConfigError) as error:
        parse_config(tree(seed=-1, runs_dir="x", stages=[{"kind": "msm", "train": ["rows"], "epochs": 0}]))
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "run.yaml:2: not valid YAML: the key 'a' is given twice"),
        ("a: [1\n", "run.yaml:2: not valid YAML"),
        ("- 1\n", "run.yaml: a configuration must be a mapping of keys, but it holds a YAML list"),
        (
            "a: !!python/object/apply:os.system [echo]\n",
            "not valid YAML: the tag '!!python/object/apply:os.system' is not supported",
        ),
    ],
)
def test_refuses_invalid_yaml(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, text))
    assert message in str(error.value)


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.yaml")


def test_a_configuration_that_version_0_1_saved_is_read():
    """Every config.yaml of that version has the defaults of keys and values that were removed since."""
    old = tree(
        model={"path": "some/model", "layers": "auto"}, engine={"cpu_adam": "torch", "nvme_path": None, "zero_stage": 2}
    )
    assert parse_config(old) == parse_config(tree(engine={"zero_stage": 2}))


def test_overrides_are_applied_or_refused(tmp_path):
    path = write(tmp_path, YAML)
    config = load_config(
        path, ["stages.aft.cot=strip", "stages.0.epochs=3", "engine.zero_stage=2", "data.rows.holdout=0.25"]
    )
    assert (config.stages[1].cot, config.stages[0].epochs) == ("strip", 3)
    assert (config.engine.zero_stage, config.data["rows"].holdout) == (2, 0.25)
    for override, message in [
        ("seed", "write it as key.sub=value"),
        ("stages.sft.epochs=2", "stages.sft does not exist; the list has 0, 1, msm, aft"),
        ("seed.a=1", "seed: input should be a valid integer"),
        ("stages.0.epoch=2", "stages.0.epoch: unknown key (did you mean 'epochs'?)"),
    ]:
        with pytest.raises(ConfigError) as error:
            load_config(path, [override])
        assert message in str(error.value)


def test_secrets_are_redacted():
    block = {
        "wandb": {"api_key": "CANARY", "token": "${WANDB}"},
        "url": "https://me:CANARY@host/x",
        "num_memory_tokens": 4,
    }
    shown = redact(block)
    assert "CANARY" not in json.dumps(shown)
    assert shown["wandb"]["token"] == "${WANDB}"
    assert shown["num_memory_tokens"] == 4
    assert "CANARY" not in dump_config(parse_config(tree(deepspeed=block)))


def sections_under(section: type[Section]) -> set[type[Section]]:
    """A section and all sections that its keys can hold."""
    found = {section}

    def visit(annotation: Any) -> None:
        if isinstance(annotation, type) and issubclass(annotation, Section) and annotation not in found:
            found.update(sections_under(annotation))
        for argument in get_args(annotation):
            visit(argument)

    for field in section.model_fields.values():
        visit(field.annotation)
    return found


def test_json_schema_forbids_unknown_keys():
    assert json.loads(json_schema())["additionalProperties"] is False


@pytest.mark.parametrize("section", sorted(sections_under(Config), key=lambda s: s.__name__))
def test_every_key_has_a_help_text(section):
    """A sentence that begins with a capital or with one of the values, and ends with a full stop."""
    for name, field in section.model_fields.items():
        text = field.description or ""
        assert text.rstrip().endswith("."), f"{section.__name__}.{name}: {text!r}"
        assert text[0].isupper() or text[0] == "`" or text.startswith(name), f"{section.__name__}.{name}: {text!r}"


def runs() -> list[Path]:
    """The example runs; other YAML files there configure other commands."""
    return [path for path in sorted(EXAMPLES.rglob("*.yaml")) if "stages:" in path.read_text()]


@pytest.mark.parametrize("path", runs(), ids=lambda p: str(p.relative_to(EXAMPLES)))
def test_examples_are_valid(path):
    load_config(path)


def test_deepspeed_json_has_the_batch_arithmetic_and_the_users_keys():
    config = parse_config(
        tree(
            engine={"precision": "fp32"},
            deepspeed={"zero_optimization": {"overlap_comm": False}, "prescale_gradients": False},
        )
    )
    block = deepspeed_json(config, config.stages[0], 2)
    assert block["train_batch_size"] == 4
    assert block["gradient_accumulation_steps"] == 2
    assert block["zero_optimization"] == {"stage": 0, "overlap_comm": False}
    assert block["gradient_clipping"] == 1.0


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"gradient_clipping": 5},
            "deepspeed.gradient_clipping: 5 conflicts with what this configuration decides "
            "(here 1.0); set stages.N.optimizer.grad_clip instead",
        ),
        ({"zero_optimization": {"stage": 2}}, "deepspeed.zero_optimization.stage: 2 conflicts"),
        ({"optimizer": {"type": "Adam"}}, "; set stages.N.optimizer instead"),
        (
            {"train_micro_batch_size_per_gpu": 2},
            "train_micro_batch_size_per_gpu: 2 conflicts with what this configuration decides (here 1); remove it",
        ),
    ],
)
def test_refuses_reserved_deepspeed_keys(block, message):
    config = parse_config(tree(deepspeed=block))
    with pytest.raises(ConfigError) as error:
        deepspeed_json(config, config.stages[0], 1)
    assert message in str(error.value)


def test_refuses_packs_that_the_ranks_cannot_divide():
    config = parse_config(tree())
    with pytest.raises(ConfigError) as error:
        deepspeed_json(config, config.stages[0], 3)
    assert str(error.value) == (
        "stage 'aft': tokens_per_step 2048 makes 4 packs of 512 tokens, which cannot be "
        "divided evenly among 3 ranks; the nearest valid tokens_per_step is 1536"
    )


# --- values that seem to mean something else ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.optimizer.lr=.inf", "stages.0.optimizer.lr: input should be a finite number, not inf"),
        ("stages.0.optimizer.lr=inf", "stages.0.optimizer.lr: input should be a finite number, not 'inf'"),
        ("stages.0.optimizer.lr=1e400", "stages.0.optimizer.lr: input should be a finite number"),
        ("stages.0.optimizer.lr=.nan", "stages.0.optimizer.lr: input should be a finite number"),
        ("stages.0.optimizer.betas=[0.9, .nan]", "stages.0.optimizer.betas.1: input should be a finite number"),
        ("stages.0.mix={docs: .inf}", "stages.0.mix.docs: input should be a finite number"),
        ("data.docs.repeat=.nan", "data.docs.repeat: input should be a finite number"),
        ("stages.0.epochs=true", "stages.0.epochs: a number is expected, not true"),
        ("stages.0.max_steps=false", "stages.0.max_steps: a number is expected, not false"),
        ("stages.0.optimizer.betas=[true, 0.9]", "stages.0.optimizer.betas: a number is expected, not true"),
        ("stages.0.mix={docs: true}", "stages.0.mix: a number is expected, not true"),
        ("engine.zero_stage=true", "engine.zero_stage: a number is expected, not true"),
        ("stages.0.epochs=010", "010 means different things in YAML 1.1 and 1.2; write the number without a leading 0"),
        ("stages.0.epochs=08", "08 means different things"),
        ("stages.0.epochs=1:30", "1:30 means different things in YAML 1.1 and 1.2; write a decimal number"),
        ("stages.0.epochs=0b11", "0b11 means different things"),
        ("stages.0.epochs=0o17", "0o17 means different things"),
        ("engine.deterministic=yes", "yes means different things in YAML 1.1 and 1.2; write true or false"),
        ("stages.0.name=on", 'on means different things in YAML 1.1 and 1.2; write true or false, or "on" for a text'),
        ("cache_dir=None", 'None is a text in YAML; write null for no value, or "None" for the text'),
        ("stages.0.epochs=2026-11-30", "stages.0.epochs: input should be a valid integer"),
        (f"seed={'9' * 5000}", "999999999999… is not an integer, or has too many digits"),
        (f"stages.0.epochs={1 << 63}", "stages.0.epochs: the number is too large; it must fit in 64 bits"),
        ("stages.0.epochs=1e20", "stages.0.epochs: unable to parse input string as an integer, exceeded maximum size"),
        (f"stages.0.epochs='{1 << 70}'", "stages.0.epochs: the number is too large"),
        (f"stages.0.optimizer.lr={10**400}", "stages.0.optimizer.lr: the number is too large"),
        ("stages.0.epochs=2.5", "stages.0.epochs: input should be a valid integer"),
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


# --- paths --------------------------------------------------------------------------------------------------

PATHS = {
    "run_dir": "runs/x",
    "cache_dir": "cache",
    "data.rows.path": "rows.jsonl",
    "data.docs.path": "docs.md",
    "model.path": "model",
    "model.lora.path": "adapter",
    "tokenizer.path": "tokenizer",
    "tokenizer.chat_template": "chat.jinja",
    "stages.1.spec": "spec.md",
}


@pytest.mark.parametrize("written", ["~/sub/{}", "${{MY_FILES}}/sub/{}", "$MY_FILES/sub/{}"])
@pytest.mark.parametrize("by", ["file", "override", "python"])
def test_home_and_variables_are_expanded_in_every_path(tmp_path, monkeypatch, written, by):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MY_FILES", str(tmp_path))
    given = {key: written.format(name) for key, name in PATHS.items()}
    if by == "override":
        config = load_config(write(tmp_path, YAML), [f"{key}={value}" for key, value in given.items()])
    else:
        values = read_yaml(YAML, where="test")
        values["data"]["rows"], values["model"], values["tokenizer"] = {}, {"lora": {}}, {}
        for key, value in given.items():
            *parents, last = key.split(".")
            holder = values
            for part in parents:
                holder = holder[int(part)] if isinstance(holder, list) else holder[part]
            holder[last] = value
        config = load_config(write(tmp_path, dump_yaml(values))) if by == "file" else parse_config(values)
    flat = flatten(config.model_dump(mode="json"))
    assert {key: flat[key] for key in PATHS} == {key: f"{tmp_path}/sub/{name}" for key, name in PATHS.items()}


def test_paths_of_deepspeed_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    block = {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "~/nvme"}}, "wandb": {"group": "~"}}
    config = parse_config(tree(deepspeed=block))
    assert config.deepspeed["zero_optimization"]["offload_param"] == {"device": "nvme", "nvme_path": "/home/me/nvme"}
    assert config.deepspeed["wandb"] == {"group": "~"}
    with pytest.raises(ConfigError, match=r"deepspeed: \$\{NOT_SET_HERE\}: the environment variable"):
        parse_config(tree(deepspeed={"tensorboard": {"output_path": "${NOT_SET_HERE}"}}))


def test_a_path_that_cannot_be_expanded_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    path = write(tmp_path, YAML.replace("rows: rows.jsonl", "rows: ${NOT_SET}/rows.jsonl"))
    with pytest.raises(ConfigError, match=r"data.rows.path: .*the environment variable 'NOT_SET' is not set; set it"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"run_dir: ~nobody-here/x: the home folder of ~nobody-here is not known"):
        load_config(write(tmp_path, YAML), ["run_dir=~nobody-here/x"])
    with pytest.raises(ConfigError, match=r"run_dir: the path is empty; write null for no path"):
        load_config(write(tmp_path, YAML), ['run_dir=""'])
    assert load_config(write(tmp_path, YAML), ["run_dir=a$b"]).run_dir == "a$b"  # may be part of a name


def test_a_saved_configuration_runs_again_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "model").mkdir()
    text = YAML.replace("some/model", "model") + "cache_dir: cache\n"
    (tmp_path / "project" / "run.yaml").write_text(text)
    monkeypatch.chdir(tmp_path / "project")
    config = load_config("run.yaml")
    assert config.data["rows"].path == "rows.jsonl"  # messages show paths as they were given
    saved = tmp_path / "saved.yaml"
    saved.write_text(dump_config(config))
    monkeypatch.chdir("/")
    flat = flatten(load_config(saved).model_dump(mode="json"))
    for key, name in {
        "run_dir": "out",
        "cache_dir": "cache",
        "data.rows.path": "rows.jsonl",
        "model.path": "model",
    }.items():
        assert flat[key] == str(tmp_path / "project" / name)
    assert dump_config(load_config(saved)) == saved.read_text()


def test_the_same_file_by_another_path_is_the_same_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder, other = tmp_path / "data", tmp_path / "link"
    folder.mkdir()
    other.symlink_to(folder)
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    (folder / "hard.jsonl").hardlink_to(folder / "rows.jsonl")
    (folder / "equal.jsonl").write_text('{"text": "a"}\n')
    same = ["~/data/rows.jsonl", f"{folder}/./rows.jsonl", f"{other}/rows.jsonl", f"{folder}/../data//rows.jsonl"]
    first = SourceConfig(path=f"{folder}/rows.jsonl")
    for path in [*same, f"{folder}/hard.jsonl"]:
        assert is_same_value("data.rows.path", first.path, SourceConfig(path=path).path)
    for path in same:
        assert SourceConfig(path=path).identity() == first.identity()
    assert not is_same_value("data.rows.path", first.path, f"{folder}/equal.jsonl")
    assert not is_same_value("data.rows.split", first.path, f"{other}/rows.jsonl")
    assert is_same_value("model.path", str(folder), f"{other}/")
    assert not is_same_value("model.path", "Qwen/a", "Qwen/b")
    assert SourceConfig(path="hub:a/b").identity()["path"] == "hub:a/b"


def test_a_parent_folder_of_a_link_is_the_parent_of_what_it_leads_to(tmp_path):
    (tmp_path / "elsewhere" / "data").mkdir(parents=True)
    (tmp_path / "elsewhere" / "rows.jsonl").write_text("{}")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere" / "data")
    config = load_config(write(tmp_path / "here", YAML.replace("rows: rows.jsonl", "rows: link/../rows.jsonl")))
    assert Path(config.data["rows"].path).read_text() == "{}"
