"""Data sets of the `datasets` library become the rows that their JSONL would."""

import json

import pytest

from delib_fast.config import SourceConfig
from delib_fast.data import DataError, read_source

datasets = pytest.importorskip("datasets")
ROWS = [{"prompt": f"question {i}", "cot": "so" if i % 2 else None, "response": f"answer {i}"} for i in range(5)]


@pytest.fixture
def saved(tmp_path):
    data_set = datasets.Dataset.from_list(ROWS)
    data_set.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data_set, "test": data_set.select([1])}).save_to_disk(tmp_path / "several")
    return tmp_path


def read(path, **more):
    return read_source("s", SourceConfig(path=str(path), **more))


def test_a_saved_folder_is_its_rows(saved):
    (saved / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    ours, plain = read(saved / "one"), read(saved / "rows.jsonl")
    assert [(r.digest, r.cot, r.response) for r in ours] == [(r.digest, r.cot, r.response) for r in plain]
    assert ours[2].location == f"{saved / 'one'}:3"
    assert ours.sha256 == read(saved / "several").sha256


def test_splits(saved):
    assert len(read(saved / "several", split="test")) == 1
    with pytest.raises(DataError, match="has no split 'dev'; there are test, train: set split"):
        read(saved / "several", split="dev")


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="is a folder, and none that datasets saved"):
        read(tmp_path)


def test_a_bad_row_is_named(tmp_path):
    datasets.Dataset.from_list([{"text": "fine"}, {"text": " "}]).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match=r"d:2: 'text' is empty"):
        read(tmp_path / "d")


def test_a_hub_name_goes_to_datasets(monkeypatch):
    asked = []

    def load_dataset(name, subset, *, split, revision):
        asked.append((name, subset, split, revision))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read("hub:owner/name@abc", subset="main", split="train[:5]")) == 5
    assert asked == [("owner/name", "main", "train[:5]", "abc")]
