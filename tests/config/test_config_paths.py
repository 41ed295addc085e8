"""Paths in a configuration: home folders and variables, the working directory, and links."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_config import YAML, tree, write

from delib_fast.config import ConfigError, SourceConfig
from delib_fast.config.load import dump_config, flatten, is_same_value, load_config, parse_config, read_yaml
from delib_fast.config.yaml_text import dump_yaml

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
    "stages.1.teacher.spec": "read.md",
    "stages.1.teacher.model": "teacher",
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
        values["stages"][1]["teacher"] = {}
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
