"""Update the command output that pages quote: `python tools/printed.py [--check] PAGE...`

A quoted output looks like this in a page. The command is `delib-fast ...` or `python FILE ...`, and runs in the root of
the repository:

    <!-- printed by: delib-fast plan examples/quickstart_tiny.yaml -->
    ```text
    ...
    ```
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"<!-- printed by: (?P<command>.+?) -->\n```text\n(?P<printed>.*?)```\n", re.DOTALL)


def output_of(command: str) -> str:
    """What a command prints to stdout, without trailing spaces. Exits with an error if the command fails."""
    words = shlex.split(command)
    if words[0] not in ("delib-fast", "python"):
        raise SystemExit(f"{command!r} cannot be run: it must begin with delib-fast or python")
    program = ["-c", "from delib_fast.cli.main import main; main()"] if words[0] == "delib-fast" else []
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *program, *words[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": path},
    )
    if done.returncode:
        raise SystemExit(f"{command}: exit code {done.returncode}\n{done.stderr}")
    return "".join(line.rstrip() + "\n" for line in done.stdout.strip("\n").splitlines())


def update(page: str) -> str:
    """The text of a page with the output of each of its commands replaced by what the command prints now."""

    def new_block(old: re.Match[str]) -> str:
        command = " ".join(old["command"].split())
        return f"<!-- printed by: {old['command']} -->\n```text\n{output_of(command)}```\n"

    return BLOCK.sub(new_block, page)


def main(arguments: list[str]) -> int:
    stale = []
    for name in (a for a in arguments if a != "--check"):
        path = Path(name)
        before = path.read_text(encoding="utf-8")
        after = update(before)
        if before == after:
            continue
        stale.append(name)
        if "--check" not in arguments:
            path.write_text(after, encoding="utf-8")
    if stale and "--check" in arguments:
        print(f"the quoted output is out of date; run: python tools/printed.py {' '.join(stale)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
