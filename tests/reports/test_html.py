"""HTML pages escape text and load nothing from elsewhere."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import Markup

from delib_fast.reports.data_page import data_page
from delib_fast.reports.html import HtmlTable, render

DOCS = Path(__file__).parents[2] / "docs"


class Page(HTMLParser):
    """Collects the text and the tags of a page, and checks that tags are closed and that nothing is loaded."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags, self.open = "", [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert tag != "script"
        assert all(value[0] == "#" or value.startswith("data:") for name, value in attrs if name in ("src", "href"))
        self.tags.append(tag)
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def evaluation(folder, *tables, curves=()):
    from delib_fast.evals.results import SuiteResult
    from delib_fast.evals.run import Evaluation

    suite = SuiteResult("suite", "A suite", "Its note.", tables, curves)
    return Evaluation({"model": "runs/m", "sha256": "0" * 64, "base": None}, (suite,), {}, folder)


def test_text_is_escaped_and_markup_is_not():
    table = HtmlTable(["a < b"], [["<i>"], [Markup("<code>x</code>")]], title="<caption>", numeric={0})
    html = render("eval.jinja", title="<title>", target={"model": "<m>", "base": "", "sha256": "0"}, results=[],
                  skipped={"<s>": "&"}, methods="", html_table=None, chart=None, cell_text=None)  # fmt: skip
    assert "&lt;title&gt;" in html
    assert not re.search("<(i|m|s)>", html)
    empty = dict.fromkeys(("pictures", "explanations", "efficiency", "published_tables"), ())
    empty |= {"samples": {}, "corpora": None, "published": None, "overview": "", "note": ""}
    page = render("study.jinja", title="t", registration=["<registration>"], tables=[table], **empty)
    assert "&lt;registration&gt;" in page
    assert "<caption>&lt;caption&gt;</caption>" in page
    assert '<td class="number">&lt;i&gt;</td>' in page
    assert '<td class="number"><code>x</code></td>' in page


def test_every_page_has_a_light_and_a_dark_style():
    html = data_page({"data": ["rows.jsonl"], "parts": {}})
    assert "color-scheme: light dark" in html
    assert "@media (prefers-color-scheme: dark)" in html


def test_eval_page(tmp_path):
    from delib_fast.evals.intervals import Estimate
    from delib_fast.evals.results import Curve, Table
    from delib_fast.reports.eval_page import write_page

    estimates = [Estimate(k / 10, k / 20, k / 5, 9, "wilson") for k in range(3)]
    curve = Curve("curve", "x", "y", tuple(enumerate([*estimates, Estimate(0.5, float("nan"), float("nan"), 1, "-")])))
    table = Table("a table", ("name", "value"), (("row", estimates[1]),))
    page = Page(write_page(evaluation(tmp_path, table, curves=(curve,))).read_text())
    assert page.tags.count("table") == page.tags.count("svg") == 1
    assert page.tags.count("circle") == 4
    assert "0.10" in page.text


def test_a_curve_without_finite_points_is_not_drawn():
    from delib_fast.evals.intervals import Estimate
    from delib_fast.evals.results import Curve
    from delib_fast.reports.eval_page import chart

    assert chart(Curve("curve", "x", "y", ((0.0, Estimate(*[float("nan")] * 3, 0, "-")),))) is None


def test_headings_in_a_terminal_break_between_words():
    from rich.console import Console

    from delib_fast.evals.intervals import Estimate
    from delib_fast.evals.results import Table
    from delib_fast.reports.eval_page import rich_table

    names = ("rows", "share of supervised tokens", "perplexity difference")
    table = Table("t", names, (("held out", Estimate(0.5, 0.4, 0.6, 9, "x"), 0.123),))
    console = Console(width=48)
    with console.capture() as captured:
        console.print(rich_table(table))
    words = captured.get().split()
    assert {word for name in names for word in name.split()} <= set(words)


def test_study_page(tmp_path):
    pytest.importorskip("matplotlib")
    from delib_fast.reports.study_figures import draw_pictures
    from delib_fast.reports.study_page import write_page

    summary = json.loads((DOCS / "small_world.json").read_text())
    summary["monitorability"] = "says"
    pictures = draw_pictures(summary, tmp_path)
    assert [picture.path.stem for picture in pictures] == ["arms", "variants", "frontier"]
    page = Page(write_page(summary, pictures, tmp_path, published=True).read_text())
    assert page.tags.count("img") == 3
    assert "MSM (thrift) + AFT (CoT)" in page.text
    assert "5 % (Qwen2.5-32B) and 7 % (Qwen3-32B)" in page.text, "the caution about the published figures"
    assert "This study was not preregistered: every result is exploratory." in page.text
    assert "null: the interval contains 0" in page.text
    assert "±0.394" in page.text, "the detection floor of the first difference"
