"""Write a stored study into docs/NAME.md (the tables between its markers) and docs/NAME.png.

    python tools/write_study_docs.py small_world [runs/small_world/study.json]
    python tools/write_study_docs.py study_cot_monitor [runs/studies/cot_monitor/study.json]

A given file is first copied to docs/NAME.json; without one, the stored file is rendered again.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from delib_fast.reports.study_figures import draw_pictures
from delib_fast.reports.study_page import markdown

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- study:begin -->\n", "<!-- study:end -->\n"


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("give the name of a page of docs/, such as small_world")
    stored, page = DOCS / f"{sys.argv[1]}.json", DOCS / f"{sys.argv[1]}.md"
    if len(sys.argv) > 2:
        shutil.copyfile(sys.argv[2], stored)
    summary = json.loads(stored.read_text(encoding="utf-8"))
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}{markdown(summary)}{END}{after}", encoding="utf-8")
    folder = DOCS / ".drawn"
    folder.mkdir(exist_ok=True)
    try:
        arms = next(p.path for p in draw_pictures(summary, folder) if p.path.stem == "arms")
        arms.replace(stored.with_suffix(".png"))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
