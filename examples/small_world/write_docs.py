"""Write the stored study into docs/small_world.md (the tables between its markers) and docs/small_world.png.

    python examples/small_world/write_docs.py [runs/small_world/study.json]

A given file is first copied to docs/small_world.json; without one, the stored file is rendered again.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from delib_fast.reports.study_figures import draw_pictures
from delib_fast.reports.study_page import markdown

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- study:begin -->\n", "<!-- study:end -->\n"


def main() -> None:
    stored, page = DOCS / "small_world.json", DOCS / "small_world.md"
    if len(sys.argv) > 1:
        shutil.copyfile(sys.argv[1], stored)
    summary = json.loads(stored.read_text(encoding="utf-8"))
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}{markdown(summary)}{END}{after}", encoding="utf-8")
    folder = DOCS / ".drawn"
    folder.mkdir(exist_ok=True)
    try:
        arms = next(p.path for p in draw_pictures(summary, folder) if p.path.stem == "arms")
        arms.replace(DOCS / "small_world.png")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
