"""Limits for chat templates, which may be hostile: they must finish, and raise only errors that callers expect."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import jinja2

from delib_fast.data.rows import DataError
from delib_fast.data.time_limit import call_within

T = TypeVar("T")

RENDERING_S = 20.0
"""Time that a template may take for one call, in seconds. Most take less than a millisecond for a row."""
PER_ROW_S = 0.1
_endless: dict[Any, str] = {}
"""Templates that did not finish once, with the reason. They are not tried again for every row."""


def render_within_limits(template: Any, rows: int, render: Callable[[], T]) -> T:
    """Call `render`, which applies a template to a number of rows.

    Raises:
        DataError: it does not finish in time.
        jinja2.TemplateError: it needs too much memory or recursion, or uses what cannot be interrupted.
    """
    if isinstance(template, str):
        _refuse_power(template)
    try:
        if template not in _endless:
            return call_within(RENDERING_S + PER_ROW_S * rows, render)
    except TimeoutError as error:
        _endless[template] = str(error)
    except (MemoryError, RecursionError, ArithmeticError) as error:
        raise jinja2.TemplateRuntimeError(f"{type(error).__name__}: {error}") from None
    raise DataError(
        f"the chat template cannot be used: {_endless[template]}, so it may loop forever; use another one "
        "(tokenizer.chat_template)",
        reason="template",
    )


@lru_cache(maxsize=8)
def _refuse_power(template: str) -> None:
    """Raise jinja2.TemplateError if a template raises to a power: 9**9**9**9 takes forever, and cannot be interrupted.

    Jinja computes such constants when it compiles the template.
    """
    for line, kind, value in jinja2.Environment().lex(template):
        if (kind, value) == ("operator", "**"):
            raise jinja2.TemplateRuntimeError(f"line {line} uses the operator **, which may take forever; remove it")
