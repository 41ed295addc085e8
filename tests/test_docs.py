"""The links of the documentation resolve, and its figures match their sources."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import draw_figures

ROOT = draw_figures.ROOT
PAGES = sorted(
    {*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "bench/README.md", ROOT / "delib_fast/ops/README.md"}
)
LINK = re.compile(r"""(?:\]\(|(?:src|srcset|href)=")(?P<target>[^)"\s]+)""")


def links_of(page: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [m["target"] for m in LINK.finditer(text) if not re.match(r"https?:|mailto:", m["target"])]


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page) -> None:
    for link in links_of(page):
        target, _, anchor = link.partition("#")
        path = (page.parent / target) if target else page
        assert path.exists(), f"{page.name} links to {link}, which does not exist"
        if anchor and path.suffix == ".md":
            assert anchor in anchors_of(path), f"{page.name} links to {link}, which has no such heading"


def test_the_file_map_lists_the_package() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"\]\(delib_fast/([\w.]+)\)", readme.partition("## Files")[2].partition("\n## ")[0])
    present = {
        path.name
        for path in (ROOT / "delib_fast").iterdir()
        if (path.suffix == ".py" and path.name != "__init__.py") or (path / "__init__.py").exists()
    }
    assert sorted(listed) == sorted(present)


def test_every_page_is_in_the_index() -> None:
    index = links_of(ROOT / "docs/README.md")
    assert {page.name for page in ROOT.glob("docs/*.md")} - {"README.md"} <= set(index)


@pytest.mark.parametrize("theme", draw_figures.THEMES)
def test_the_effect_plot_matches_the_study(theme) -> None:
    study = json.loads((ROOT / "docs/small_world.json").read_text())
    plot = draw_figures.draw_effect(study, draw_figures.THEMES[theme])
    assert (draw_figures.IMAGES / f"small_world_effect-{theme}.svg").read_text() == plot, (
        "run: python tools/draw_figures.py"
    )


@pytest.mark.slow
def test_the_row_figure_matches_the_encoder() -> None:
    seen = draw_figures.encoded_row()
    for theme, colours in draw_figures.THEMES.items():
        assert (draw_figures.IMAGES / f"row-{theme}.svg").read_text() == draw_figures.draw_row(seen, colours), (
            "run: python tools/draw_figures.py"
        )
