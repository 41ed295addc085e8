"""Render HTML pages: jinja2 templates with automatic escaping, and one style sheet and table for all pages.

A page is a single file: its styles and pictures are embedded, and it loads nothing from elsewhere.
"""

from __future__ import annotations

import base64
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from delib_fast.reports.plots import DPI

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
)
_CSS_PIXELS_PER_INCH = 96


@dataclass(frozen=True)
class HtmlTable:
    """A table of a page. A cell is text, which is escaped, or HTML as `Markup`."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Markup]]
    title: str = ""
    numeric: Container[int] = ()
    """Indices of the columns that are aligned to the right."""


@dataclass(frozen=True)
class Picture:
    """A PNG file and its caption."""

    path: Path
    caption: str
    section: str = ""

    @property
    def data(self) -> str:
        """The file as a data URI."""
        return f"data:image/png;base64,{base64.b64encode(self.path.read_bytes()).decode()}"

    @property
    def width(self) -> int:
        """Width on the page in CSS pixels, at which the file has its physical size."""
        return int.from_bytes(self.path.read_bytes()[16:20], "big") * _CSS_PIXELS_PER_INCH // DPI


def render(template: str, *, title: str, wide: bool = False, **values: Any) -> str:
    """Render a template of `templates/`; the page is HTML5 in UTF-8."""
    return _TEMPLATES.get_template(template).render(title=title, wide=wide, **values)
