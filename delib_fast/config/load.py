"""Configuration files: read YAML as plain data, override values, explain errors, and write without secrets.

Every command that reads YAML (runs, evaluations, studies, data generation) uses `load`. An unknown key is an error that
suggests the most similar known key. `yaml_text.py` parses YAML.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError

from delib_fast.config.base import ConfigError, Section, expand_path, is_same_file, nearest
from delib_fast.config.schema import Config
from delib_fast.config.teacher import OWN_WEIGHTS
from delib_fast.config.yaml_text import dump_yaml
from delib_fast.config.yaml_text import read_yaml as read_yaml
from delib_fast.files import read_text
from delib_fast.redaction import redact, register_secrets

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class FileKind:
    """What a kind of YAML file is called in messages, and which of its keys are paths.

    Args:
        name: the name in messages, with its article, e.g. "a configuration".
        paths: dotted keys, with `*` for any name or index, e.g. "data.*.path". A relative path there is relative to
            the folder of the file.
        names_or_paths: dotted keys whose value may also be a hub name such as Qwen/Qwen3-8B. The value is a path if a
            file or folder exists there.
        placeholders: strings that are replaced later; a path that contains one is not resolved.
    """

    name: str
    paths: tuple[str, ...] = ()
    names_or_paths: tuple[str, ...] = ()
    placeholders: tuple[str, ...] = ()


RUN_FILE = FileKind(
    "a configuration",
    paths=(
        "data.*",
        "data.*.path",
        "model.lora.path",
        "tokenizer.chat_template",
        "stages.*.spec",
        "stages.*.teacher.spec",
    ),
    names_or_paths=("model.path", "tokenizer.path", "stages.*.teacher.model"),
)
_TABLE = "convert it to .jsonl, one object per line, e.g. with the fields prompt and response"
_ROWS = "name it under data: in a configuration; `delib-fast inspect` shows its rows"
_DATA_SUFFIXES = {
    **dict.fromkeys((".csv", ".tsv", ".xlsx"), _TABLE),
    **dict.fromkeys((".jsonl", ".ndjson", ".parquet", ".txt", ".md", ".markdown"), _ROWS),
}
_ALL_PATHS = ("run_dir", "cache_dir", *RUN_FILE.paths, *RUN_FILE.names_or_paths)
"""Also those that are relative to the working directory, wherever the file is."""


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read the configuration of a run and apply `a.b=c` overrides to it; see `load`."""
    return load(Config, path, RUN_FILE, overrides)


def load(
    kind: type[S],
    path: str | os.PathLike[str] | None,
    file_kind: FileKind,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> S:
    """Read a YAML file, apply overrides, and check the result.

    Args:
        kind: the section that the whole file describes.
        path: the YAML file; None to start from an empty configuration. Relative paths in it are relative to its
            folder; those in an override are relative to the working directory.
        overrides: strings `key.sub=value`; the value is read as YAML. List items are given by position
            (`stages.1.optimizer.lr=1e-5`), stages also by their name (`stages.aft.cot=strip`).
        values: dotted keys and their values, e.g. from command-line options; None leaves a key unchanged.
    Raises:
        ConfigError: the file cannot be read, is not valid YAML, or is not a valid `kind`. The message lists every
            error with its location.
    """
    where = "the command line" if path is None else str(path)
    tree: dict[str, Any] = {}
    if path is not None:
        tree = read_yaml_file(Path(path), file_kind.name)
        for pattern in (*file_kind.paths, *file_kind.names_or_paths):
            _resolve_paths(tree, pattern, Path(path).parent, file_kind)
    for key, value in (values or {}).items():
        if value is not None:
            _put(tree, key, value, key)
    for override in overrides:
        key, equals, raw = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {override}: write it as key.sub=value, e.g. --set stages.aft.epochs=2")
        value = read_yaml(raw, where=f"--set {key}")
        register_secrets({key.rpartition(".")[2].strip(): value})  # before any message shows it
        _put(tree, key.strip(), value, f"--set {override}")
    return parse(kind, tree, where=where)


def parse_config(tree: Mapping[str, Any], *, where: str = "config") -> Config:
    """Parse and validate the configuration of a run. Raises ConfigError, which lists every error with its location."""
    return parse(Config, tree, where=where)


def parse(kind: type[S], tree: Mapping[str, Any], *, where: str) -> S:
    """Parse and validate a section. Raises ConfigError, which lists every error with its location after `where`."""
    register_secrets(tree)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = [f"{where}: {_explain(kind, details, tree)}" for details in error.errors()]
        raise ConfigError("\n".join(lines)) from None


# --- reading ------------------------------------------------------------------------------------------------


def read_yaml_file(path: Path, name: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        name: what the file is, for messages, with its article.
    Raises:
        ConfigError: the file cannot be read, is not valid YAML, or is not a mapping.
    """
    suffix = path.suffix.lower()
    if suffix in _DATA_SUFFIXES and path.exists():
        raise ConfigError(f"{path}: {name} is a YAML file, and this is a {suffix} file; {_DATA_SUFFIXES[suffix]}")
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file (working directory: {Path.cwd()})") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or not a path
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"{path}: cannot be read: {why}") from None
    tree = read_yaml(text, where=str(path))
    if not isinstance(tree, dict):
        holds = "it is empty" if tree is None else f"it holds a YAML {type(tree).__name__}"
        raise ConfigError(f"{path}: {name} must be a mapping of keys, but {holds}")
    return tree


def _resolve_paths(tree: Any, pattern: str, folder: Path, file_kind: FileKind) -> None:
    may_be_name = pattern in file_kind.names_or_paths
    *parents, last = pattern.split(".")
    for holder in _children(tree, parents):
        for key in list(_keys(holder, last)):
            value = holder[key]
            if not isinstance(value, str) or value.startswith("hub:"):
                continue
            if any(placeholder in value for placeholder in file_kind.placeholders):
                continue
            if pattern.endswith("teacher.model") and value in OWN_WEIGHTS:  # even if a folder has that name
                continue
            with contextlib.suppress(ValueError):  # the section that has the key raises it with its location
                candidate = folder / expand_path(value)
                if candidate.exists() or not may_be_name:
                    holder[key] = _shortened(candidate)


def _shortened(path: Path) -> str:
    """The path without `..`, unless it means another file then because a part of it is a symbolic link."""
    short = os.path.normpath(path)
    return short if os.path.realpath(short) == os.path.realpath(path) else str(path)


def _children(tree: Any, parts: Sequence[str]) -> Iterator[Any]:
    """The mappings and lists at a path of keys; `*` stands for every key or index."""
    if not parts:
        yield tree
        return
    for key in _keys(tree, parts[0]):
        yield from _children(tree[key], parts[1:])


def _keys(holder: Any, part: str) -> Sequence[Any]:
    if isinstance(holder, dict):
        return list(holder) if part == "*" else [part] if part in holder else []
    return range(len(holder)) if isinstance(holder, list) and part == "*" else []


# --- overriding ---------------------------------------------------------------------------------------------


def _put(tree: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set the value at a dotted key; missing parent mappings are created. `where` begins an error message."""
    *parents, last = key.split(".")
    holder: Any = tree
    for depth, part in enumerate(parents):
        if isinstance(holder, list):
            holder = holder[_index(holder, part, ".".join(parents[: depth + 1]), where)]
        elif isinstance(holder, dict):
            if depth == 1 and isinstance(holder.get(part), str) and parents[0] in ("data", "rows"):
                holder[part] = {"path": holder[part]}  # `data: {rows: rows.jsonl}` is a short form
            holder = holder.setdefault(part, {})
        else:
            raise ConfigError(f"{where}: {'.'.join(parents[:depth])} is a value and has no key {part!r}")
    if isinstance(holder, list):
        holder[_index(holder, last, key, where)] = value
    elif isinstance(holder, dict):
        holder[last] = value
    else:
        raise ConfigError(f"{where}: {'.'.join(parents)} is a value and has no key {last!r}")


def _index(items: list[Any], part: str, key: str, where: str) -> int:
    """The index of a list item that a dotted key gives by its name, its kind or its number."""
    names = _names(items)
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    known = ", ".join([str(i) for i in range(len(items))] + [n for n in names if n])
    raise ConfigError(f"{where}: {key} does not exist; the list has {known}")


def _names(items: Sequence[Any]) -> list[Any]:
    """The name, or else the kind, of each item of a list; None for an item without either."""
    return [item.get("name") or item.get("kind") if isinstance(item, Mapping) else None for item in items]


def named_key(key: Sequence[str | int], tree: Any) -> str:
    """A dotted key with the names of list items instead of their positions, as `--set` accepts them.

        ["stages", 1, "optimizer", "lr"]  →  stages.aft.optimizer.lr

    Args:
        key: the parts of the key; positions may be numbers or digits.
        tree: the mapping that has the key. An item keeps its position if its name is missing or not unique.
    """
    shown: list[str] = []
    for part in key:
        name: Any = part
        if isinstance(tree, list) and str(part).isdigit() and int(part) < len(tree):
            names = _names(tree)
            own = names[int(part)]
            name = own if isinstance(own, str) and names.count(own) == 1 else part
            tree = tree[int(part)]
        else:
            tree = tree.get(part) if isinstance(tree, Mapping) else None
        shown.append(str(name))
    return ".".join(shown)


# --- explaining ---------------------------------------------------------------------------------------------


def _explain(root: type[Section], details: Any, tree: Any) -> str:
    """One line for a pydantic error: its location as a dotted key, and what is wrong there."""
    location, options = _locate(root, details["loc"])
    at = named_key(location, tree) + ": " if location else ""  # "" for the whole file
    if details["type"] == "extra_forbidden":
        _, parents = _locate(root, details["loc"][:-1])
        section = next(iter(_sections(parents)), None)
        if section is None:
            return f"{at}unknown key"
        name = str(location[-1])
        if name in section.removed_keys:
            return f"{at}{section.removed_keys[name]}"
        return f"{at}unknown key{nearest(name, section.model_fields)}"
    if details["type"] == "missing":
        return f"{at}missing; it has no default"
    if details["type"] == "union_tag_not_found":
        return f"{at}needs " + " or ".join(f"kind: {tag}" for tag in _tags(options))
    if details["type"] == "odd_number":
        return f"{named_key([*location, details['ctx']['key']], tree)}: {details['msg']}"
    if details["type"] == "value_error":
        return f"{at}{str(details['msg']).removeprefix('Value error, ')}"
    given = "" if isinstance(details["input"], dict | list) else f", not {details['input']!r}"
    return f"{at}{details['msg'][0].lower()}{details['msg'][1:]}{given}"


def _locate(root: Any, location: Sequence[str | int]) -> tuple[list[str | int], list[Any]]:
    """Follow a pydantic location through the annotations.

    Returns:
        The location without the tags of unions, which do not appear in files; and the annotations possible there.
    """
    shown: list[str | int] = []
    options = _alternatives(root)
    for part in location:
        tags = _tags(options)
        if part in tags and len(tags) > 1:
            options = [tags[str(part)]]
            continue
        shown.append(part)
        section = next((s for s in _sections(options) if str(part) in s.model_fields), None)
        if section is not None:
            options = _alternatives(section.model_fields[str(part)].annotation)
        else:
            items = next((get_args(o)[-1] for o in options if get_origin(o) in (list, dict)), None)
            options = _alternatives(items)
    return shown, options


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union, without None; else the annotation itself."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [o for member in get_args(annotation) for o in _alternatives(member)]
    return [] if annotation in (None, NoneType) else [annotation]


def _sections(options: Sequence[Any]) -> list[type[Section]]:
    return [o for o in options if isinstance(o, type) and issubclass(o, Section)]


def _tags(options: Sequence[Any]) -> dict[str, type[Section]]:
    """The sections of a union by the value of their `kind`."""
    return {str(s.model_fields["kind"].default): s for s in _sections(options) if "kind" in s.model_fields}


# --- writing ------------------------------------------------------------------------------------------------


def plain_config(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain data, with secrets redacted: what config.yaml and checkpoints store.

    Paths are absolute, so that the same configuration is read from it in any folder.
    """
    tree = config.model_dump(mode="json")
    for pattern in _ALL_PATHS:
        _resolve_paths(tree, pattern, Path.cwd(), RUN_FILE)
    plain: dict[str, Any] = redact(tree)
    return plain


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; see `plain_config`."""
    return dump_yaml(plain_config(config))


def _matches(key: str, pattern: str) -> bool:
    parts, wanted = key.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(w in ("*", p) for p, w in zip(parts, wanted, strict=True))


def is_same_value(key: str, value: Any, other: Any) -> bool:
    """Whether two values of a key of a run's configuration mean the same; two paths do if they lead to one file.

    Args:
        key: a dotted key, as in `flatten`.
    """
    if isinstance(value, str) and isinstance(other, str) and any(_matches(key, p) for p in _ALL_PATHS):
        return is_same_file(value, other)
    return bool(value == other)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a.b.0": value}` for every leaf of nested mappings and lists."""
    if isinstance(tree, Mapping):
        items: Any = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    else:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def json_schema() -> str:
    """The JSON schema of the configuration, for editors."""
    return json.dumps(Config.model_json_schema(), indent=2)
