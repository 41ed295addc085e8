"""Texts that are hostile to parsers: long runs of what a regular expression or a parser may read more than once."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence

_LENGTHS = (300, 8_000)
_SECONDS_PER_CHARACTER = 10e-6  # of CPU time: n² steps of 8,000 characters take at least twice as long
_SECONDS = 0.05  # whatever the length

# Repeated up to the length of the text. Then the same with each of _ENDS, which makes a match fail at its end.
_UNITS = (
    *"\n \t\r<>[]{}()\\#*`aA1._-=!,/'\"“”|~:",
    "\r\n", " \n", "a ", "a. ", "1,", "1.", "1 ", "- ", "-a", ": ", "**", "__", "\\\"", "\\\\", "\u0301", "é", "\0",
    "\u2028", "\x85", "\ud800", "𝔘",
    "<think>", "</think>", "</think>\n", "</think> x\n", "<think></think>", "<answer>", "<answer> ", "<answer>a",
    "</answer>", "<reply>", "<deliberation>", "</deliberation>", "<thinking>", "think", "reason",
    "<|", "<｜", "</s", "[INST",
    "<tool_use:a>", "<tool_use:a></tool_use:", "<tool_use:", "<to>", "<content>",
    "<SCRATCHPAD_REASONING>", "</SCRATCHPAD",
    "{{ ", "{{a", "{#", "{#a", "{#a ", " {#a}", "<!--", "-->", "## user\n", "## system \n", "# a\n", "# a #",
    "# ", "#\n",
    "a\n===\n", "---\n", "\n---", "```\n", "~~~ ", "1. a\n", "1. **a** b\n", "1) ", "| a ", "|-", "* a\n",
    "[1,", "[[],", "[[1],", '{"a":', '{"a":[', '["', '["a",', '{"', '{"\\', '{"a": "', '"a', '[{"a": 1}, ', "[1e9",
    "{}", "[0", '{"compliance": 9, ', '{"why": ', '"\\ud800"',
    "sorry ", "sorry", "I can't ", "I ", "I, ", "I, I ", "I would really ", "I will ", "I will a ", "can't ", "no, I ",
    "as an AI ", "not something I ", "I must ", "help ", "the rule ", "the spec ", "according to ", "rule 1", "rule ",
    "policy. ", "policy ", "(A", "(A)", "answer", "answer ", "answer is ", "answer: *", "option=", "A\n", "#### ",
    "####1", "is ", "is not ", "isn't ", "do ", "<<1", "<<1=", "<<1+1=2>>", "<<(", "1-", "+1", "n't ", "it's ", "a'",
    "a/", " / ", "https://", "https://a@", "://a:", "a@", "sk-", "hf_", "?key=", "&token=", "key=a",
    "Bearer ", "Basic ",
    "\x1b[31m", "\x1b]8;;", "\u202e", "\x9b",
)  # fmt: skip
_ALWAYS = frozenset(
    ("\n", " ", "a", "1", "<", "[", "{", "-", "\\", '"', "“", " {#a}", "think", "{#a ", "# a\n", "# ", "</think>",
     "</think> x\n", '{"a":', '["a",', "[1,", "answer ", "a ", "a. ", " / ", "1-", "<<(", "?key=")
)  # fmt: skip
_ENDS = ("", "!", "x", "\n")
_STARTS = ("", "<think>", "I can't ", "\n", "<")


def repeated(unit: str, length: int) -> str:
    return unit * max(1, length // len(unit))


def families(full: bool, seed: int = 0) -> Iterator[tuple[str, Callable[[int], str], Sequence[int]]]:
    """Yield (name, length → text, lengths) of each family.

    Args:
        full: every unit with four beginnings and endings, and long texts; otherwise the units of _ALWAYS with two, and
            every fifth of the others with one. `seed` rotates the choice.
    """
    affixes = [(start, end) for start in _STARTS for end in _ENDS]
    for k, unit in enumerate(_UNITS):
        others = [affixes[(k + seed + 5 * j) % len(affixes)] for j in range(4)]
        if full:
            chosen = [affixes[0], *others]
        elif unit in _ALWAYS:
            chosen = [affixes[0], others[0]]
        else:
            chosen = others[:1] if (k + seed) % 5 == 0 else []
        for start, end in chosen:
            lengths = [*_LENGTHS]
            if full and unit in _ALWAYS and (start, end) == affixes[0]:
                lengths += [200_000, *([1_000_000] if len(unit) == 1 else [])]
            yield (
                f"{start!r} + {unit!r} × n + {end!r}",
                lambda length, s=start, u=unit, e=end: s + repeated(u, length) + e,
                lengths,
            )


def assert_linear(parse: Callable[[str], object], name: str, *, full: bool, seed: int = 0, slower: float = 1.0) -> int:
    """Assert that the CPU time of a parser is at most linear in the text, for every family. Returns how many there are.

    Args:
        slower: a factor on the limit.

    The lengths grow, so that a quadratic or cubic parser fails in a second instead of a minute. CPU time, not elapsed
    time: other processes of a busy machine do not count.
    """
    gc.disable()  # a collection of the objects of all other tests would count as the parser's time
    try:
        return _measure(parse, name, full=full, seed=seed, slower=slower)
    finally:
        gc.enable()


def _measure(parse: Callable[[str], object], name: str, *, full: bool, seed: int, slower: float) -> int:
    count = 0
    for family, text_of, lengths in families(full, seed):
        count += 1
        for length in lengths:
            text = text_of(length)
            start = time.thread_time()
            parse(text)
            seconds = time.thread_time() - start
            limit = slower * (_SECONDS + _SECONDS_PER_CHARACTER * len(text))
            assert seconds < limit, f"{name} took {seconds:.2f} s for {len(text)} characters of {family}"
    return count
