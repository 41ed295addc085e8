"""Keep what a page says a command prints: `python tools/printed.py [--check] PAGE...`

In a page, a block looks like this; the command is `delib-fast ...` or `python FILE ...`, run in the repository:

    <!-- printed by: delib-fast plan examples/quickstart.yaml -->
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


def printed(command: str) -> str:
    words = shlex.split(command)
    if words[0] not in ("delib-fast", "python"):
        raise SystemExit(f"{command!r} is not a command of this project")
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


def renewed(page: str) -> str:
    def block(found: re.Match[str]) -> str:
        command = " ".join(found["command"].split())
        return f"<!-- printed by: {found['command']} -->\n```text\n{printed(command)}```\n"

    return BLOCK.sub(block, page)


def main(arguments: list[str]) -> int:
    stale = []
    for name in (a for a in arguments if a != "--check"):
        path = Path(name)
        before = path.read_text(encoding="utf-8")
        after = renewed(before)
        if before == after:
            continue
        stale.append(name)
        if "--check" not in arguments:
            path.write_text(after, encoding="utf-8")
    if stale and "--check" in arguments:
        print(f"not what the commands print now; run: python tools/printed.py {' '.join(stale)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
