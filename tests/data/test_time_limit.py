"""Calls that take too long are interrupted, in any thread and after a fork."""

from __future__ import annotations

import threading
import time

import jinja2
import pytest

from delib_fast.data.encode import template_limits
from delib_fast.data.encode.template_limits import render_within_limits
from delib_fast.data.rows import DataError
from delib_fast.data.time_limit import _deadlines, call_within


def forever() -> None:
    while True:
        try:
            time.sleep(0.001)
        except Exception:  # noqa: BLE001 (code that catches every exception is interrupted all the same)
            continue


def test_a_call_that_returns_in_time():
    assert call_within(60, lambda: 3) == 3
    with pytest.raises(KeyError):
        call_within(60, lambda: {}["a"])
    assert not _deadlines


def test_a_call_that_loops_is_interrupted_in_any_thread():
    found = []

    def in_thread() -> None:
        try:
            call_within(0.3, forever)
        except TimeoutError as error:
            found.append(str(error))

    thread = threading.Thread(target=in_thread)
    thread.start()
    in_thread()
    thread.join(60)
    assert found == ["it did not finish within 0.3 s"] * 2
    assert not _deadlines


def test_a_template_that_loops_is_refused(monkeypatch):
    template = jinja2.Environment().from_string(
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    )
    monkeypatch.setattr(template_limits, "RENDERING_S", 0.2)
    monkeypatch.setattr(template_limits, "_endless", {})
    for render in (template.render, pytest.fail):  # it is not tried again
        with pytest.raises(DataError, match=r"it did not finish within 0.3 s, so it may loop forever; use another one"):
            render_within_limits("a loop", 1, render)
    assert render_within_limits("another", 1, list) == []


def test_a_template_that_fails_in_its_own_way_is_a_template_error():
    for error in (MemoryError(), RecursionError("too deep"), ZeroDivisionError("division by zero")):

        def fails(error: Exception = error) -> None:
            raise error

        with pytest.raises(jinja2.TemplateError, match=type(error).__name__):
            render_within_limits("", 1, fails)


def test_a_template_that_raises_to_a_power_is_refused():
    with pytest.raises(jinja2.TemplateError, match=r"uses the operator \*\*, which may take forever"):
        render_within_limits("{% generation %}\n{{ 9**9**9**9 }}{% endgeneration %}", 1, list)
    assert render_within_limits("{% generation %}{{ '**' ~ 9 * 9 }} ** {# ** #}{% endgeneration %}", 1, list) == []
