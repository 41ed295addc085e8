"""Read and write YAML as plain data. A value that could be misread is refused.

The subset on which YAML 1.1 and 1.2 agree is read. What they read differently (010, yes, 1:30) is refused with its line
and the remedy, except 1e-4, which is a number, and dates, which are texts. Merge keys (`<<`) are supported. Tags that
make anything but plain data are refused, so that YAML cannot run code.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar, NoReturn

import yaml

from delib_fast.config.base import ConfigError

MAX_VALUES = 1_000_000
"""Largest number of values in a file, where an alias counts as often as it is used."""
_PREFIX = "tag:yaml.org,2002:"
_AMBIGUOUS = "!ambiguous"
_NUMBER_START = list("-+0123456789.")
_RESOLVERS: tuple[tuple[str, str, list[str]], ...] = (
    ("null", r"|~|null|Null|NULL", ["", "~", "n", "N"]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("merge", r"<<", ["<"]),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        _NUMBER_START,
    ),
    (
        _AMBIGUOUS,
        r"[-+]?0[0-9_]+|[-+]?0[bB][01_]+|0o[0-7_]+|[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?"
        r"|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF|None",
        [*_NUMBER_START, *"yYnNoO"],
    ),
)


def _add_resolvers(owner: Any) -> None:
    for tag, pattern, first in _RESOLVERS:
        full = tag if tag.startswith("!") else _PREFIX + tag
        owner.add_implicit_resolver(full, re.compile(f"^(?:{pattern})$"), first)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]  # the stubs differ
    yaml_constructors: ClassVar[dict[Any, Any]] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes every text that this loader, or one of YAML 1.1, would not read as that text."""


def _error(node: Any, problem: str) -> NoReturn:
    raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    if not isinstance(node, yaml.MappingNode):
        _error(node, "a mapping is expected here")
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = "<<" if key_node.tag == _PREFIX + "merge" else loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            _error(key_node, "a key must be a text or a number, not a list or a mapping")
        if key in seen:
            _error(key_node, f"the key {key!r} is given twice")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


def _sequence(loader: yaml.SafeLoader, node: yaml.SequenceNode) -> list[Any]:
    return loader.construct_sequence(node, deep=True)


def _scalar(loader: yaml.SafeLoader, node: Any) -> str:
    return str(loader.construct_scalar(node))


def _integer(loader: yaml.SafeLoader, node: Any) -> int:
    text = _scalar(loader, node).replace("_", "")
    try:
        return int(text, 16 if "x" in text.lower() else 10)
    except ValueError:
        _error(node, f"{text[:12]}{'…' if len(text) > 12 else ''} is not an integer, or has too many digits")


def _float(loader: yaml.SafeLoader, node: Any) -> float:
    text = _scalar(loader, node).replace("_", "")
    try:
        return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    except ValueError:
        _error(node, f"{text[:12]!r} is not a number")


def _boolean(loader: yaml.SafeLoader, node: Any) -> bool:
    text = _scalar(loader, node)
    if text.lower() not in ("true", "false"):
        _error(node, f"{text[:12]!r} is not true or false")
    return text.lower() == "true"


def _null(loader: yaml.SafeLoader, node: Any) -> None:
    loader.construct_scalar(node)


def _ambiguous(loader: yaml.SafeLoader, node: Any) -> NoReturn:
    text = _scalar(loader, node)
    if text == "None":
        _error(node, 'None is a text in YAML; write null for no value, or "None" for the text')
    if text[0].isalpha():
        remedy = "write true or false"
    elif re.fullmatch(r"[-+]?0[0-9_]+", text):
        remedy = "write the number without a leading 0"
    else:
        remedy = "write a decimal number"
    _error(node, f'{text[:40]} means different things in YAML 1.1 and 1.2; {remedy}, or "{text[:40]}" for a text')


def _unknown(loader: yaml.SafeLoader, node: Any) -> NoReturn:
    _error(node, f"the tag {node.tag.replace(_PREFIX, '!!')!r} is not supported; only plain data can be read")


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    unusual_break = any(c in text for c in "\r\x85\u2028\u2029")  # which PyYAML's other styles do not preserve
    return dumper.represent_scalar(_PREFIX + "str", text, style='"' if unusual_break else None)


_Dumper.add_representer(str, _text)
_add_resolvers(_Loader)
_add_resolvers(_Dumper)
_CONSTRUCTORS: dict[str, Any] = {"map": _mapping, "seq": _sequence, "str": _scalar, "int": _integer, "float": _float}
for _name, _construct in (_CONSTRUCTORS | {"bool": _boolean, "null": _null}).items():
    _Loader.add_constructor(_PREFIX + _name, _construct)
_Loader.add_constructor(_AMBIGUOUS, _ambiguous)
_Loader.add_constructor(None, _unknown)


def read_yaml(text: str, *, where: str) -> Any:
    """Parse YAML.

    Args:
        where: what the text is, for messages.
    Raises:
        ConfigError: with `where` and the line. The text is not valid YAML, repeats a key, contains a value that YAML
            1.1 and 1.2 read differently, or contains itself.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}{line}: not valid YAML: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{where}: not valid YAML: values are nested too deeply") from None
    if _count(value, {}) > MAX_VALUES:
        raise ConfigError(f"{where}: aliases repeat its values more than {MAX_VALUES:,} times; write fewer of them")
    return value


def _count(value: Any, known: dict[int, int]) -> int:
    """The number of values in a value. Each list and mapping is visited once, however often it is repeated."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        children = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(child, known) for child in children)
    return known[id(value)]


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """Write plain data as YAML, which `read_yaml` reads as the same data. What is not printable is escaped."""
    text = str(yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110))
    if all(map(str.isprintable, text.split("\n"))):
        return text
    return str(yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=110))
