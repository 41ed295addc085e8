"""The configuration: round trips, overrides, error messages, and help text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from delib_fast.config import REDUCE_BUCKET, Config, ConfigError, Section, ranks_text
from delib_fast.config.load import (
    dump_config,
    json_schema,
    load_config,
    named_key,
    parse_config,
)
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
            "config: stages.aft.cto: unknown key (did you mean 'cot'?)",
        ),
        (
            {"stages": [{"kind": "aft", "train": ["rows"], "optimizer": {"learning_rate": 1}}]},
            "config: stages.aft.optimizer.learning_rate: unknown key",
        ),
        (
            {"stages": [{"kind": "aft", "train": ["row"]}]},
            "config: stages.aft.train names 'row', which is not under data: (did you mean 'rows'?)",
        ),
        (
            {"stages": [{"kind": "aft", "train": ["rows"], "cot": "tran"}]},
            "config: stages.aft.cot: input should be 'train', 'context' or 'strip', not 'tran'",
        ),
        (
            {"stages": [{"kind": "aft", "train": ["rows"], "pack_capacity": 500, "tokens_per_step": 1200}]},
            "config: stages.aft: tokens_per_step (1200) must be a multiple of pack_capacity (500); the nearest is 1000",
        ),
        (
            {"stages": [{"kind": "aft", "train": ["rows"], "cot": "context", "response_weight": 0}]},
            "config: stages.aft: nothing is supervised: response_weight is 0 and the CoT is not trained",
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
        ("stages.0.epoch=2", "stages.msm.epoch: unknown key (did you mean 'epochs'?)"),
    ]:
        with pytest.raises(ConfigError) as error:
            load_config(path, [override])
        assert message in str(error.value)


def test_list_items_are_named_as_they_are_set():
    stages = [{"kind": "msm"}, {"kind": "aft", "name": "first"}, {"kind": "aft", "name": "twice"}]
    tree = {"stages": [*stages, {"kind": "aft", "name": "twice"}, {}], "seeds": [1, 2]}
    keys = [named_key(["stages", index, "train", 0], tree) for index in range(5)]
    assert keys == ["stages.msm.train.0", "stages.first.train.0", *(f"stages.{k}.train.0" for k in (2, 3, 4))]
    assert named_key(["seeds", "1"], tree) == "seeds.1"
    assert named_key(["stages", "1", "x"], tree) == "stages.first.x"


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


def test_stage_0_in_bf16_runs_as_the_stage_that_moves_fewer_bytes():
    """One rank: 1. Several GPUs: 2, overlapped. Several CPUs: 2 if a rank has at most two micro-batches per step."""
    config = parse_config(tree(engine={"precision": "bf16"}))  # four packs per step

    def zero(ranks: int, gpu: bool, config=config) -> dict:
        return deepspeed_json(config, config.stages[0], ranks, gpu=gpu)["zero_optimization"]

    assert zero(1, True) == zero(1, False) == {"stage": 1}
    assert zero(2, True) == zero(4, True) == {"stage": 2, "overlap_comm": True, "reduce_bucket_size": REDUCE_BUCKET}
    assert zero(2, False) == zero(4, False) == {"stage": 2}
    eight = parse_config(tree(engine={"precision": "bf16"}, stages=[{**tree()["stages"][0], "tokens_per_step": 4096}]))
    assert zero(2, False, eight) == {"stage": 1}
    assert zero(2, True, eight)["stage"] == 2
    fp16 = parse_config(tree(engine={"precision": "fp16"}))
    assert zero(2, True, fp16) == {"stage": 1}
    explicit = parse_config(tree(engine={"precision": "bf16", "zero_stage": 1}))
    assert zero(2, True, explicit) == {"stage": 1}
    fp32_sums = parse_config(tree(engine={"precision": "bf16"}, deepspeed={"communication_data_type": "fp32"}))
    assert deepspeed_json(fp32_sums, fp32_sums.stages[0], 2, gpu=True)["communication_data_type"] == "fp32"


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


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([3], "rank 3"),
        ([1, 0], "ranks 0-1"),
        ({5, 0, 2, 1}, "ranks 0-2, 5"),
        (range(64), "ranks 0-63"),
        (range(0, 18, 2), "ranks 0, 2, 4, 6, 8, 10, 12, 14, …"),
    ],
)
def test_how_messages_list_ranks(ranks, text):
    assert ranks_text(ranks) == text
