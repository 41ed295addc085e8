"""Datasets of the `datasets` library are read like the JSONL file with the same rows."""

import json

import pytest

from delib_fast.config import SourceConfig
from delib_fast.data import DataError, SourceReader, read_source

datasets = pytest.importorskip("datasets")
ROWS = [{"prompt": f"question {i}", "cot": "so" if i % 2 else None, "response": f"answer {i}"} for i in range(5)]


@pytest.fixture
def saved(tmp_path):
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(tmp_path / "several")
    return tmp_path


def read(path, **more):
    return read_source("s", SourceConfig(path=str(path), **more))


def test_a_saved_folder_has_the_rows_of_its_jsonl(saved):
    (saved / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    ours, plain = read(saved / "one"), read(saved / "rows.jsonl")
    assert [(r.digest, r.cot, r.response) for r in ours] == [(r.digest, r.cot, r.response) for r in plain]
    assert ours[2].location == f"{saved / 'one'}:3"
    hashes = {SourceReader("s", SourceConfig(path=str(saved / name))).sha256 for name in ("one", "several")}
    assert len(hashes) == 1


def test_the_configured_split_is_read(saved):
    assert len(read(saved / "several", split="test")) == 1
    with pytest.raises(DataError, match="has no split 'dev'; set split to one of test, train"):
        read(saved / "several", split="dev")


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="is a folder, but was not written by datasets' save_to_disk"):
        read(tmp_path)


def test_an_error_names_the_bad_row(tmp_path):
    datasets.Dataset.from_list([{"text": "fine"}, {"text": " "}]).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match=r"d:2: 'text' is empty"):
        read(tmp_path / "d")


def test_a_hub_name_is_passed_to_datasets(monkeypatch):
    requests = []

    def load_dataset(name, subset, *, split, revision):
        requests.append((name, subset, split, revision))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read("hub:owner/name@abc", subset="main", split="train[:5]")) == 5
    assert requests == [("owner/name", "main", "train[:5]", "abc")]
