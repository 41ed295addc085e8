"""What is printed: text from outside cannot control the terminal, end a command, or hide what it says."""

from __future__ import annotations

import ast
import io
import json
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from delib_fast import terminal
from delib_fast.digests import write_json
from delib_fast.terminal import PlainConsole, echo, plain, printable, report_error

PACKAGE = Path(__file__).parents[1] / "delib_fast"
FORMAT = 2  # of a ledger
# Markup of Rich that fails, markup that works, an emoji, ESC and C1 sequences, a link (OSC 8), a bell, an override of
# the reading direction, characters without a width, a half surrogate, NUL, a line separator.
HOSTILE = (
    "[/bold][red]:smile:\x1b[2J\x1b]0;title\x07\x1b]8;;https://a\x1b\\b\x9b31m\x85\x7f\u202e\u2066\u200b\ufeff\ud800\0"
    "\u2028\r\t\x08[link=https://a]"
)
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
LIVE = re.compile(r"\x1b\[\?25[lh]|\x1b\[[0-9]*[ABCDGHJK]|\r")  # what a progress bar of Rich itself writes


def assert_clean(output: str, *, shows: str = "[/bold][red]:smile:") -> None:
    """No character of the output but line breaks controls a terminal; and the markup is shown as it is."""
    found = sorted({f"U+{ord(c):04X}" for c in output if c != "\n" and unicodedata.category(c)[0] == "C"})
    assert not found, output
    assert shows in output.replace("\n", ""), output


# --- one place --------------------------------------------------------------------------------------------------

FORBIDDEN = {"print", "typer.echo", "typer.secho", "click.echo", "Console", "Text", "Text.from_markup", "TextColumn"}


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_terminal_prints(path):
    if path.name == "terminal.py":
        return
    calls = {called(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
    assert not calls & FORBIDDEN
    assert not [c for c in calls if re.search(r"std(out|err)\.(buffer\.)?write|print_exc|rich\.print", c)]


# --- functions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain – ünï 漢字 🙂", "plain – ünï 漢字 🙂"),
        ("two\nlines", "two\nlines"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x9b31m", "\\x9b31m"),
        ("a\rb\x08\x07\0\x7f", "a\\rb\\x08\\x07\\x00\\x7f"),
        ("a\tb", "a    b"),
        ("\u202eevil\u2066", "\\u202eevil\\u2066"),
        ("zero\u200bwidth\ufeff", "zero\\u200bwidth\\ufeff"),
        ("half \ud800", "half \\ud800"),
        ("\u2028\u2029\x85", "\\u2028\\u2029\\x85"),
        ("private \U000f0000", "private \\U000f0000"),
        ("no\xa0break", "no break"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown


def test_lines(capsys):
    echo(HOSTILE)
    report_error(f"{HOSTILE} Authorization: Bearer hunter2")
    captured = capsys.readouterr()
    assert_clean(captured.out)
    assert_clean(captured.err, shows="error: [/bold]")
    assert captured.err.endswith("Authorization: ***\n")


def test_a_stream_that_cannot_encode_a_character_shows_its_escape(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    echo("1 → 2")
    out.flush()
    assert out.buffer.getvalue() == b"1 \\u2192 2\n"


def test_a_console_replaces_marks_that_a_stream_cannot_encode():
    """Marks and tables stay in their columns; other characters are shown as escapes."""
    from rich.table import Table

    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    out = PlainConsole(file=file, width=60)
    out.print(plain("│ a … ■ – é"))
    table = Table(title="t")
    table.add_column("x")
    table.add_row("0.5 × 2")
    out.print(table)
    file.flush()
    text = file.buffer.getvalue().decode()
    assert text.splitlines()[0].rstrip() == "| a ~ # - \\xe9"
    assert "0.5 x 2" in text


@pytest.mark.parametrize("forced", [False, True])
def test_a_console_shows_strings_and_text_as_they_are(forced):
    from rich.table import Table

    out = PlainConsole(file=io.StringIO(), width=200, force_terminal=forced)
    table = Table(title=HOSTILE, caption=HOSTILE)
    table.add_column(HOSTILE)
    table.add_column(plain(HOSTILE, "bold"))
    table.add_row(HOSTILE, plain(HOSTILE))
    out.print(table, HOSTILE, plain(HOSTILE, "dim"))
    out.rule(HOSTILE)
    assert_clean(COLOURS.sub("", out.file.getvalue()))
    assert out.file.getvalue().count("\\x1b]8;;https://a\\x1b\\b") == 9


# --- commands ---------------------------------------------------------------------------------------------------


def test_progress_and_tables_of_a_run(capsys, monkeypatch):
    from delib_fast.training.console import ConsoleLogger

    record = {"segments": {HOSTILE: {"nll": 1.0}}, "tokens_per_s": 5.0}
    stage = {
        "name": HOSTILE, "steps": 1, "tokens": 1, "supervised_tokens": {"cot": 1}, "tokens_per_s": 1.0,
        "supervised_tokens_per_s": 1.0, "fill": 1.0, "train_s": 1.0,
    }  # fmt: skip
    ledger = {
        "evaluations": [{"moment": HOSTILE, "segments": {HOSTILE: {"nll": 1.0, "tokens": 1}}}],
        "stages": [stage],
    }
    for live in (False, True):
        logger = ConsoleLogger(enabled=True)
        if live:
            logger._console = PlainConsole(file=sys.stdout, width=400, force_terminal=True)
        logger.begin_stage(HOSTILE, 0, 2)
        logger.log(1, record)
        logger.log(2, record)
        logger.print(HOSTILE)
        logger.end_stage()
        logger.print_tables(ledger, [(HOSTILE, HOSTILE)])
        output = capsys.readouterr().out
        assert_clean(LIVE.sub("", COLOURS.sub("", output)) if live else output, shows="[/bold]")


@pytest.mark.parametrize("live", [False, True])
def test_progress_of_data_generation(live):
    from delib_fast.datagen.progress import Meter

    out = PlainConsole(file=io.StringIO(), width=400, force_terminal=live)
    meter = Meter(console=out)
    meter.start(HOSTILE, 2, HOSTILE)
    meter.drop(HOSTILE)
    meter.retried(HOSTILE)
    meter.advance(2)
    meter.print(HOSTILE)
    meter.stop()
    assert_clean(LIVE.sub("", COLOURS.sub("", out.file.getvalue())))


@pytest.mark.parametrize(
    "ledger",
    [
        {"stages": [{}], "evaluations": []},
        {"stages": [1], "evaluations": []},
        {"stages": [], "evaluations": [{"moment": "a", "segments": {"cot": {"nll": "[/bold]", "tokens": 1}}}]},
        {"stages": [], "evaluations": [{"moment": "a", "segments": {"cot": None}}]},
        {"stages": [{"status": "finished", "name": HOSTILE}], "evaluations": []},
    ],
)
def test_ledger_that_is_damaged(tmp_path, ledger, capsys, monkeypatch):
    from delib_fast.cli.main import main

    write_json(tmp_path / "ledger.json", {"format": FORMAT, **ledger})
    monkeypatch.setattr(sys, "argv", ["delib-fast", "ledger", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert_clean(capsys.readouterr().err, shows="is damaged (")


def test_ledger_of_another_user(tmp_path, capsys):
    from delib_fast.cli.main import app

    segment = {"nll": 1.0, "tokens": 2}
    write_json(
        tmp_path / "ledger.json",
        {"format": FORMAT, "evaluations": [{"moment": HOSTILE, "segments": {HOSTILE: segment}}], "stages": []},
    )
    assert_clean(CliRunner().invoke(app, ["ledger", str(tmp_path)], env={"COLUMNS": "400"}).output)


def test_tables_of_an_evaluation():
    from delib_fast.evals.intervals import wilson
    from delib_fast.evals.results import SuiteResult, Table
    from delib_fast.evals.run import Evaluation
    from delib_fast.reports.eval_page import print_tables

    table = Table(HOSTILE, (HOSTILE, HOSTILE, "n"), ((HOSTILE, wilson(1, 2), 3), ("b", HOSTILE, None)), HOSTILE)
    result = SuiteResult("policy", HOSTILE, HOSTILE, (table,))
    out = PlainConsole(file=io.StringIO(), width=400)
    print_tables(Evaluation({"model": HOSTILE}, (result,), {"drift": HOSTILE}, Path()), out)
    assert_clean(out.file.getvalue())


def test_tables_of_a_study(capsys):
    from delib_fast.cli.study import print_arms
    from delib_fast.evals.intervals import wilson
    from delib_fast.evals.results import to_json_data

    estimate = to_json_data(wilson(1, 2))
    print_arms(
        {
            "metrics": {HOSTILE: {}},
            "arms": [{"label": HOSTILE, "size": 1, "figures": {HOSTILE: {"over seeds": estimate}}}],
            "contrasts": [
                {
                    "title": HOSTILE,
                    "metric": HOSTILE,
                    "estimate": estimate,
                    "exploratory": [HOSTILE],
                    "void": False,
                    "verdict": "null",
                    "expect": None,
                    "floor": 0.1,
                    "placebo": None,
                }
            ],
            "paired": [{"title": HOSTILE, "metric": HOSTILE, "estimate": estimate, "agreeing": 1, "rows": 2}],
            "preregistration": None,
        }
    )
    assert_clean(capsys.readouterr().out, shows="[/bold]")


def test_rows_and_names_of_a_preview(tmp_path, monkeypatch, capsys):
    from delib_fast.cli.main import app

    monkeypatch.setenv("COLUMNS", "400")
    text = HOSTILE.replace("\ud800", "").replace("\0", "")
    file = tmp_path / "a[red]\x1b[31m\u202e.jsonl"
    row = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}
    file.write_text(json.dumps(row) + "\n")
    done = CliRunner().invoke(app, ["inspect", str(file)])
    assert done.exit_code == 0, done.output
    assert_clean(done.output)
    file.write_text("{\n")
    done = CliRunner().invoke(app, ["inspect", str(file)])
    assert done.exit_code == 2
    assert_clean(done.output, shows="a[red]\\x1b[31m\\u202e.jsonl: has no rows")


def test_configurations(tmp_path):
    from delib_fast.cli.main import app
    from delib_fast.config.load import load_config

    text = HOSTILE.replace("\ud800", "") + " password=hunter2 is a given text"
    file = tmp_path / "run.yaml"
    base = json.loads(json.dumps(_config(), default=str))
    file.write_text(json.dumps({**base, "stages": [{**base["stages"][-1], "system_prompt": text}]}))
    done = CliRunner().invoke(app, ["config", str(file)])
    assert done.exit_code == 0, done.output
    assert_clean(done.output, shows="[/bold]")
    again = tmp_path / "printed.yaml"
    again.write_text(done.output)
    assert load_config(again).stages[0].system_prompt == text, "what is printed can be read again"


def _config() -> dict:
    import yaml

    return yaml.safe_load((PACKAGE.parent / "examples" / "quickstart_tiny.yaml").read_text())


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["config", "no[/bold]\x1b[31m\x9b\u202efile.yaml"], 2),
        (["[/bold]\x1b[31m\x9b\u202e"], 2),
        (["config", "--[/bold]\x1b[31m\u202e"], 2),
        (["plan", "a", "b[/bold]\x1b[31m\u202e"], 2),
        (["inspect", "[/bold]\x1b[31m\u202e", "--tokenizer", "a", "--kind", "b"], 2),
        (["config", "examples/quickstart.yaml", "--set", "[/bold]\x1b[31m\u202e"], 2),
    ],
)
def test_errors_of_the_command_line(arguments, code, capsys, monkeypatch):
    from delib_fast.cli.main import main

    monkeypatch.setattr(sys, "argv", ["delib-fast", *arguments])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert_clean(captured.err, shows="[/bold]")
    assert "error: " in captured.err


def test_errors_of_the_launch_script(capsys):
    from delib_fast.train import main

    with pytest.raises(SystemExit) as exit_:
        main(["--config", "x.yaml", "[/bold]\x1b[31m\x9b\u202e"])
    assert exit_.value.code == 2
    assert_clean(capsys.readouterr().err, shows="error: unrecognized arguments: [/bold]\\x1b[31m\\x9b\\u202e")
    assert main(["--config", "no[/bold]\x1b[31m.yaml"]) == 2
    assert_clean(capsys.readouterr().err, shows="error: no[/bold]\\x1b[31m.yaml: no such file")


def test_names_in_pictures_are_not_formulas(tmp_path):
    from delib_fast.reports.plots import pyplot, save

    plt = pyplot("a test draws", "report")
    figure, axes = plt.subplots()
    axes.set_title("a $\\frac$ b $ \\x [/bold]")
    axes.plot([0, 1], label="$\\frac$ $")
    axes.legend()
    save(figure, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").exists()


def test_tracebacks_and_log_records():
    code = (
        "import logging; from delib_fast.terminal import guard_process_output; guard_process_output(); "
        "logging.getLogger('x').warning(chr(27) + '[31m api_key=hunter2'); "
        "raise RuntimeError(chr(27) + '[/bold] https://me:hunter2@host/')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert_clean(done.stderr, shows="RuntimeError: \\x1b[/bold] https://***@host/")
    assert "\\x1b[31m api_key=***" in done.stderr
    assert "hunter2@" not in done.stderr.splitlines()[-1]


def test_traceback_of_a_command():
    code = (
        "import sys; from delib_fast.cli import main as m\n"
        "@m.app.command()\n"
        "def boom(): raise RuntimeError(chr(27) + '[/bold] Authorization: Bearer hunter2')\n"
        "sys.argv = ['delib-fast', 'boom']; m.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: \\x1b[/bold] Authorization: ***\n")
    assert_clean(done.stderr, shows="[/bold]")


def test_terminal_has_no_state():
    assert not [name for name, value in vars(terminal).items() if isinstance(value, list | dict | set)][1:]
