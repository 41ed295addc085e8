"""The folder of the tokenizer that a run trains, with a record of what it was trained on and of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from delib_fast.digests import DamagedError, hash_files, read_json, write_json
from delib_fast.files import remove_tree, sync_file
from delib_fast.models import save_tokenizer
from delib_fast.training.run_directory import TRAINED_ON


def is_intact(folder: Path, trained_on: str) -> bool:
    """Whether the folder has a tokenizer that was trained on exactly this, and its files are as they were written.

    Args:
        trained_on: the hash of everything that the tokenizer depends on.
    """
    try:
        record = read_json(folder / TRAINED_ON)
        files = {name: sha256 for name, sha256 in hash_files(folder).items() if name != TRAINED_ON}
        return bool(record == {"trained_on": trained_on, "files": files})
    except (OSError, DamagedError):
        return False


def store(tokenizer: Any, folder: Path, trained_on: str) -> None:
    """Write a tokenizer to the folder, whose earlier content is deleted. After a kill, `is_intact` is false."""
    remove_tree(folder)
    save_tokenizer(tokenizer, folder)
    for file in folder.iterdir():
        sync_file(file)
    record = {"trained_on": trained_on, "files": hash_files(folder)}
    write_json(folder / TRAINED_ON, record)  # written last: without it, the tokenizer is trained again
