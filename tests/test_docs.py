"""The documentation is true of the code: links, commands, YAML, figures; and its prose fits 120 columns."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from delib_fast.cli.main import _LAZY_COMMANDS, app
from delib_fast.config.load import parse, parse_config, read_yaml

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import draw_figures

ROOT = draw_figures.ROOT
PAGES = sorted(
    {*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "bench/README.md", ROOT / "delib_fast/ops/README.md"}
)
GENERATED = {"architectures.md", "benchmarks.md", "refusals.md", "templates.md"}
EXAMPLES = sorted({*ROOT.glob("examples/**/*.yaml")} - {ROOT / "examples/studies/reason_decides/aft.yaml"})
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


# --- commands and YAML ----------------------------------------------------------------------------------------


def options_of_commands() -> dict[str, set[str]]:
    """The options of every command of `delib-fast`."""
    whole = typer.Typer()
    whole.callback()(lambda: None)  # makes typer build a group
    whole.registered_commands += app.registered_commands
    for module in {module for module, _ in _LAZY_COMMANDS.values()}:
        importlib.import_module(module).register(whole)
    group: Any = typer.main.get_command(whole)
    return {
        name: {"--help", *(option for parameter in command.params for option in parameter.opts)}
        for name, command in group.commands.items()
    }


def test_documented_commands_and_options_exist() -> None:
    options = options_of_commands()
    files = [*PAGES, *EXAMPLES, *ROOT.glob("examples/**/README.md"), *ROOT.glob("examples/**/*.sh")]
    seen = 0
    for path in files:
        text = re.sub(r"\\\n\s*(?:#\s*)?", " ", path.read_text(encoding="utf-8"))  # continued lines
        text = re.sub(r"\"[^\"\n]*\"|'[^'\n]*'", "''", text)  # a quoted value may begin with a dash
        for name, rest in re.findall(r"delib-fast\"? ([a-z][a-z-]*)\b([^`\n|;]*)", text):
            assert name in options, f"{path.name}: delib-fast {name}"
            for option in re.findall(r"(?<![\w-])--?[a-z][\w-]*", rest.partition("  #")[0]):
                assert option in options[name], f"{path.name}: delib-fast {name} {option}"
            seen += 1
    assert seen > 50


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_documented_files_exist(page) -> None:
    """Files of the repository that a page names in its commands, code and text; X is the name of any op."""
    not_files = {"delib_fast/agentic_misalignment": "a task of Inspect", "bench/cpu_adam_step.py": "removed"}
    named = re.findall(
        r"(?<![\w/.-])((?:tests|bench|tools|examples|csrc|docs|delib_fast)/[\w./*-]+)", page.read_text(encoding="utf-8")
    )
    for name in {name.rstrip(".") for name in named} - not_files.keys():
        if not re.search(r"[/_]X\b", name) and not name.startswith("bench/results"):
            assert any(ROOT.glob(name)) if "*" in name else (ROOT / name).exists(), f"{page.name} names {name}"


def yaml_blocks() -> list[Any]:
    return [
        pytest.param(block, id=f"{page.name}-{k}")
        for page in PAGES
        for k, block in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
        if "plugins:" not in block  # of axolotl
    ]


@pytest.mark.parametrize("block", yaml_blocks())
def test_yaml_blocks_are_valid(block) -> None:
    """A block is a study, a run, some sections of a run, or the optimizer of a stage."""
    found = read_yaml(block, where="block")
    if "arms" in found:
        from delib_fast.study.settings import StudyConfig  # imports torch

        parse(StudyConfig, found, where="block")
        return
    stage = {"kind": "aft", "train": ["rows"]}
    base = {"run_dir": "runs/x", "model": {"path": "some/model"}, "data": {"rows": "rows.jsonl"}, "stages": [stage]}
    parse_config({**base, **({"stages": [{**stage, **found}]} if "optimizer" in found else found)}, where="block")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_example_files_begin_with_their_purpose_and_command(path) -> None:
    head = re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))
    assert head, "it begins without a comment"
    commands = re.findall(r"^#   (\S.*)", head[0], re.MULTILINE)
    named = (str(path.relative_to(ROOT)), "examples/datagen/end_to_end.sh")
    assert any(name in command for command in commands for name in named), commands


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name not in GENERATED and page.parent.name != "bench"],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_prose_fits_120_columns(page) -> None:
    """Tables, code, generated blocks and lines that are one link may be wider."""
    text = re.sub(r"```.*?```|<!-- (\w+):begin.*?<!-- \1:end", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    wide = [line for line in text.split("\n") if len(line) > 120 and not line.startswith(("|", "    "))]
    assert wide == []
