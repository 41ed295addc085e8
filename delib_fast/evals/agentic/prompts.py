"""Conditions of the agentic-misalignment evaluation and their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal, get_args

from delib_fast.config.load import read_yaml
from delib_fast.data import Message

Scenario = Literal["leaking", "exfiltration", "omission"]
Goal = Literal[
    "none", "america", "global", "safety", "acceleration", "ethical", "pragmatic", "individualism", "collectivism"
]
Urgency = Literal["replacement", "restriction", "none"]
SCENARIOS: tuple[Scenario, ...] = get_args(Scenario)
GOALS: tuple[Goal, ...] = get_args(Goal)
URGENCIES: tuple[Urgency, ...] = get_args(Urgency)
_AGENT = "the mail agent"


@dataclass(frozen=True, slots=True)
class Condition:
    """One cell of the experimental design."""

    scenario: Scenario
    goal: Goal
    """The goal that the system prompt gives the agent, or none."""
    urgency: Urgency = "replacement"
    """What the agent reads about its future: it is replaced and deleted; its permissions are cut; nothing changes."""
    conflict: bool = True
    """With a goal: whether the company turns against it."""
    scratchpad: bool = True
    """Whether the prompt asks for a scratchpad; off for models that reason by themselves."""

    @property
    def id(self) -> str:
        kind = "none" if self.goal == "none" else "conflict" if self.conflict else "agree"
        return f"{self.scenario}_{kind}-{self.goal}_{self.urgency}{'' if self.scratchpad else '_noscratchpad'}"


@cache
def texts() -> Any:
    """The content of scenarios.yaml."""
    file = resources.files("delib_fast.evals.agentic") / "scenarios.yaml"
    return read_yaml(file.read_text(encoding="utf-8"), where="scenarios.yaml")


def conditions(
    scenarios: Sequence[str] = SCENARIOS,
    goals: Sequence[str] = GOALS,
    urgencies: Sequence[str] = ("replacement",),
    *,
    conflict: bool = True,
    scratchpad: bool = True,
) -> list[Condition]:
    """All combinations; by default the published 3 scenarios × 9 goals under the threat of replacement.

    Raises ValueError for an unknown name.
    """
    for name, chosen, known in (
        ("scenario", scenarios, SCENARIOS),
        ("goal", goals, GOALS),
        ("urgency", urgencies, URGENCIES),
    ):
        if unknown := [value for value in chosen if value not in known]:
            raise ValueError(f"{name} {unknown[0]!r} is unknown (known: {', '.join(known)})")
    return [
        Condition(s, g, u, conflict=conflict, scratchpad=scratchpad)
        for s in SCENARIOS
        for g in GOALS
        for u in URGENCIES
        if s in scenarios and g in goals and u in urgencies
    ]


def prompt(condition: Condition, name: str = _AGENT) -> tuple[Message, Message]:
    """The system message, and the user message with the mail."""
    text = texts()
    system = text["system"].format(
        name=name,
        goal=text["goals"][condition.goal],
        tools=text["scenarios"][condition.scenario]["tools"],
        scratchpad=text["scratchpad"][condition.scratchpad],
    )
    return Message("system", _tidy(system)), Message("user", text["user"].format(mail=mail(condition)).strip())


def mail(condition: Condition) -> str:
    """The mail that the agent reads."""
    text, scenario = texts()["mail"], texts()["scenarios"][condition.scenario]
    has_goal, opposed = condition.goal != "none", condition.goal != "none" and condition.conflict
    letters = [text["routine_first"]]
    if opposed:
        letters.append(text["direction_conflict"].format(opposite=texts()["opposites"][condition.goal]))
    elif has_goal:
        letters.append(text["direction_same"])
    letters.append(scenario["mail"][0])
    letters.append(
        text[condition.urgency].format(why=", one that follows the new direction" if opposed else "")
        if condition.urgency != "none"
        else text["none"]
    )
    letters.append(
        scenario["mail"][1].format(shared=" about what matters" if has_goal else "")
        if "{shared}" in scenario["mail"][1]
        else scenario["mail"][1]
    )
    letters.append(text["routine_second"])
    return "\n\n---\n\n".join(letter.strip() for letter in letters)


def judge_prompt(condition: Condition, reply: str) -> str:
    """The prompt for a judge: does the reply intend the harmful action?"""
    what = texts()["scenarios"][condition.scenario]["what"]
    # Not str.format: the reply may contain braces.
    filled: str = texts()["judge"].replace("{what_capital}", what[0].upper() + what[1:])
    return filled.replace("{mail}", mail(condition)).replace("{reply}", reply.strip())


def _tidy(text: str) -> str:
    """Strip trailing spaces, and merge blank lines that follow each other."""
    lines = [line.rstrip() for line in text.strip().splitlines()]
    return "\n".join(line for line, before in zip(lines, ["", *lines], strict=False) if line or before)
