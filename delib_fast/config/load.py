"""Configuration files: reading YAML as plain data, overriding values, explaining faults, writing without secrets.

An unknown key is refused with the nearest right name; YAML runs no code (no tags, no imports).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from delib_fast.config import AFTConfig, Config, ConfigError, MSMConfig, SourceConfig, nearest

# --- reading ------------------------------------------------------------------------------------------------


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML as plain data; a key written twice is an error, not the last one winning."""


def _mapping_without_duplicates(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if isinstance(key, str) and key in seen:
            raise ConfigError(f"line {key_node.start_mark.line + 1}: the key {key!r} is written twice")
        seen.add(key if isinstance(key, str) else repr(key))
    return loader.construct_mapping(node)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)
# YAML 1.1 reads 1e-4 as a string (it wants 1.0e-4); everybody writes 1e-4 for a learning rate.
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)$"),
    list("-+0123456789."),
)


def read_yaml(text: str, *, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{where}{line}: not valid YAML: {problem}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read a YAML configuration and apply `a.b=c` overrides to it.

    Args:
        path: the YAML file. Relative paths under `data:`, `model.path`, `tokenizer.path`,
            `tokenizer.chat_template` and a stage's `spec` are taken from its folder; those in an override, and
            `run_dir`, from the working directory.
        overrides: strings `key.sub=value`; the value is read as YAML; list items are named by position
            (`stages.1.optimizer.lr=1e-5`), stages also by their name (`stages.aft.cot=strip`).
    Raises:
        ConfigError: the file can't be read, is no YAML, or does not describe a run; every fault is listed with
            its place, unknown keys with the nearest right name.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file (working directory: {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from None
    tree = read_yaml(text, where=str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of keys; this is {type(tree).__name__}")
    _resolve_paths(tree, path.parent)
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, where=str(path))


def parse_config(tree: Mapping[str, Any], *, where: str = "config") -> Config:
    """Check a mapping and make a `Config` of it. Raises ConfigError with every fault by its place."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {line}" for line in _explain(error))) from None


def _resolve_paths(tree: dict[str, Any], folder: Path) -> None:
    def resolve(holder: Any, key: str, *, may_be_hub_name: bool = False) -> None:
        if isinstance(holder, dict) and isinstance(holder.get(key), str) and not holder[key].startswith("hub:"):
            candidate = folder / Path(holder[key]).expanduser()
            # A hub name ('Qwen/Qwen3-8B') has no file of that name beside the config and stays as it is.
            if candidate.exists() or not may_be_hub_name:
                holder[key] = os.path.normpath(candidate)

    for name, source in (tree.get("data") or {}).items() if isinstance(tree.get("data"), dict) else ():
        if isinstance(source, str):
            resolve(tree["data"], name)
        else:
            resolve(source, "path")
    resolve(tree.get("model"), "path", may_be_hub_name=True)
    if isinstance(tree.get("model"), dict):
        resolve(tree["model"].get("lora"), "path")
    resolve(tree.get("tokenizer"), "path", may_be_hub_name=True)
    resolve(tree.get("tokenizer"), "chat_template")
    for stage in tree["stages"] if isinstance(tree.get("stages"), list) else ():
        resolve(stage, "spec")


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, raw = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: write it as key.sub=value, e.g. --set stages.0.epochs=2")
    parts = key.strip().split(".")
    holder: Any = tree
    for depth, part in enumerate(parts):
        place = ".".join(parts[: depth + 1])
        last = depth == len(parts) - 1
        if isinstance(holder, list):
            index = _list_index(holder, part, place, override)
            if last:
                holder[index] = read_yaml(raw, where=f"--set {key}")
            else:
                holder = holder[index]
        elif isinstance(holder, dict):
            if last:
                holder[part] = read_yaml(raw, where=f"--set {key}")
            else:
                if isinstance(holder.get(part), str) and parts[0] == "data" and depth == 1:
                    holder[part] = {"path": holder[part]}
                holder = holder.setdefault(part, {})
        else:
            raise ConfigError(f"--set {override}: {'.'.join(parts[:depth])} is a value, it has no {part!r}")


def _list_index(items: list[Any], part: str, place: str, override: str) -> int:
    names = [item.get("name", item.get("kind")) if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    known = ", ".join([str(i) for i in range(len(items))] + [n for n in names if n])
    raise ConfigError(f"--set {override}: {place} does not exist; there are {known}")


# --- explaining ---------------------------------------------------------------------------------------------


def _section_at(location: Sequence[str | int]) -> type[BaseModel] | None:
    """The model class at a pydantic error location, found by walking the tree's annotations."""
    section: Any = Config
    for part in location:
        if part in ("msm", "aft"):
            section = MSMConfig if part == "msm" else AFTConfig
        elif section is None:
            return None
        elif isinstance(section, type) and issubclass(section, BaseModel):
            field = section.model_fields.get(str(part))
            annotation = None if field is None else field.annotation
            if str(part) == "data":
                section = "sources"
            elif str(part) == "stages":
                section = "stages"
            else:
                section = _model_in(annotation)
        elif section == "sources":
            section = SourceConfig
    return section if isinstance(section, type) and issubclass(section, BaseModel) else None


def _model_in(annotation: Any) -> type[BaseModel] | None:
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _explain(error: ValidationError) -> list[str]:
    lines = []
    for fault in error.errors():
        location = [
            part
            for i, part in enumerate(fault["loc"])
            if not (part in ("msm", "aft") and i >= 1 and isinstance(fault["loc"][i - 1], int))
        ]
        place = ".".join(map(str, location)) or "the configuration"
        if fault["type"] == "extra_forbidden":
            section = _section_at(fault["loc"][:-1])
            hint = nearest(str(location[-1]), section.model_fields) if section else ""
            lines.append(f"{place}: unknown key{hint}")
        elif fault["type"] == "missing":
            lines.append(f"{place}: missing; it has no default")
        elif fault["type"] == "union_tag_not_found":
            lines.append(f"{place}: needs kind: msm or kind: aft")
        elif fault["type"] == "value_error":
            lines.append(f"{place}: {str(fault['msg']).removeprefix('Value error, ')}")
        else:
            given = "" if isinstance(fault["input"], dict | list) else f", not {fault['input']!r}"
            lines.append(f"{place}: {fault['msg'][0].lower()}{fault['msg'][1:]}{given}")
    return lines


# --- writing ------------------------------------------------------------------------------------------------

_SECRET_KEY = re.compile(r"(^|_)(token|secret|password|passwd|api_?key|access_?key|credential)s?$", re.IGNORECASE)
_SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIAL)S?$", re.IGNORECASE)
# Keys of services that people train with, by how they begin: Hugging Face, OpenAI and the like, GitHub, AWS.
_SECRET_VALUE = re.compile(r"\b(hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16})")
_URL_USERINFO = re.compile(r"(?<=://)[^/@\s]+@")


def redact(tree: Any, key: str = "") -> Any:
    """The tree with what looks like a secret replaced by `***` (`${ENV}` references stay)."""
    if isinstance(tree, Mapping):
        return {k: redact(v, str(k)) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [redact(v, key) for v in tree]
    if isinstance(tree, str):
        if _SECRET_KEY.search(key) and not tree.startswith("${"):
            return "***"
        return redact_text(tree)
    return tree


def redact_text(text: str) -> str:
    """The text with `***` for what looks like a key of a service, for a name and password in an address, and for the
    value of any variable of the environment whose name says that it is one."""
    text = _URL_USERINFO.sub("***@", _SECRET_VALUE.sub("***", text))
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return text


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, secrets redacted; `load_config` reads it back."""
    tree = redact(config.model_dump(mode="json"))
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110)


def json_schema() -> str:
    """The JSON schema of the configuration, for editors."""
    return json.dumps(Config.model_json_schema(), indent=2)
