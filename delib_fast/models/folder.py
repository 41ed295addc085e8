"""Model folders that may be damaged or hostile: unsafe files are refused, and all errors become ConfigErrors."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from delib_fast.config import ConfigError
from delib_fast.files import open_regular
from delib_fast.models.hf_utils import why_not_loaded

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_JSON_BYTES = 1 << 26  # the index of the largest published models has a few MB
_COUNTS = re.compile(r"(layers?|experts|blocks?|depth)$")
_PLAUSIBLE_COUNT = 4096  # layers, or experts in a layer; more is compared with the stored tensors


@contextlib.contextmanager
def loading(path: str, key: str, what: str, *, weights: bool = False) -> Iterator[None]:
    """Check a model folder, and raise ConfigError if the block, which loads from it, raises anything.

    transformers assumes files that it wrote itself: others make it raise any kind of error, wait for a named pipe, or
    build a billion layers.

    Args:
        path: a folder, or a hub name, of which nothing is checked.
        key: the configuration key that names it, for messages.
        what: what the block does, e.g. "load" or "read the config of".
        weights: whether the block loads weights.
    """
    if Path(path).is_dir():
        try:
            _refuse_folder(Path(path), weights=weights)
        except (OSError, ValueError) as error:
            reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
            raise ConfigError(f"{key}: cannot {what} {path!r}: {reason}") from None
    try:
        yield
    except Exception as error:  # anything: see above
        if type(error).__module__.startswith("delib_fast"):  # the run was stopped
            raise
        raise ConfigError(f"{key}: cannot {what} {path!r}: {_explain(path, error)}") from error


def _explain(path: str, error: Exception) -> str:
    if "ignore_mismatched_sizes" in str(error):
        return "its weights have other shapes than its config.json describes; restore the files that belong together"
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    why, kind = why_not_loaded(path, error), type(error).__name__
    return why if isinstance(error, OSError | ValueError | SafetensorError) or why == kind else f"{kind}: {why}"


# --- before anything is loaded ------------------------------------------------------------------------------


def _refuse_folder(folder: Path, *, weights: bool) -> None:
    """Raise OSError or ValueError, with the file and the reason, if a folder must not be loaded."""
    names = []
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        names.append(entry.name)
        mode = entry.stat().st_mode  # raises OSError for a symbolic link that leads nowhere
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            open_regular(entry.path).close()  # raises OSError, with what it is
    for name in sorted(names):
        if name == "config.json":
            _refuse_config(folder, _read_object(folder / name))
        elif name.endswith(".index.json"):
            _refuse_index(folder, name)
        elif name in ("tokenizer_config.json", "generation_config.json"):
            _read_object(folder / name)
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if weights and pickles and not any(name.endswith(".safetensors") for name in names):
        raise ValueError(
            f"its weights are pickles ({pickles[0]}), which can run code when they are loaded; convert them to "
            "safetensors: load the model with transformers, in a place where that is safe, and call save_pretrained"
        )


def _read_object(file: Path) -> dict[str, Any]:
    with open_regular(file) as stream:
        data = stream.read(_MAX_JSON_BYTES + 1)
    if len(data) > _MAX_JSON_BYTES:
        raise ValueError(f"{file.name} has more than {_MAX_JSON_BYTES >> 20} MiB")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} must be a JSON object, but is a {type(content).__name__}")
    return content


def _refuse_config(folder: Path, config: dict[str, Any]) -> None:
    tensors: int | None = None
    for key, value in _items(config, ""):
        name = key.rsplit(".", 1)[-1]
        if name.endswith("implementation") and isinstance(value, str) and "/" in value:
            raise ValueError(f"config.json sets {key} to {value!r}, which would load code from the hub; remove the key")
        if _COUNTS.search(name) and isinstance(value, int | float) and value > _PLAUSIBLE_COUNT:
            tensors = _count_tensors(folder) if tensors is None else tensors
            if value > tensors:
                raise ValueError(
                    f"config.json sets {key} to {value:g}, but the folder has {tensors} tensors; restore the "
                    "config.json that belongs to the weights"
                )


def _items(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _items(value, f"{prefix}.{key}" if prefix else key)
    elif not isinstance(tree, list):
        yield prefix, tree


def _count_tensors(folder: Path) -> int:
    total = 0
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, framework="pt") as tensors:
                total += len(tensors.keys())
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file.name} cannot be read: {error}") from None
    return total


def _refuse_index(folder: Path, name: str) -> None:
    index = _read_object(folder / name).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ValueError(f"{name} has no weight_map")
    for file in {str(file) for file in index.values()}:
        if os.path.basename(file) != file or file in ("", ".", ".."):
            raise ValueError(f"{name} names {file!r}, which is outside the folder; it must name files of the folder")
        if not (folder / file).is_file():
            raise ValueError(f"{name} names {file!r}, which is missing; copy the complete model")
