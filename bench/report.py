"""Write the README's tables from what was measured: no figure there is typed by hand.

    python bench/report.py                        # rewrites the blocks between the README's markers
    python bench/report.py --check                # exits 1 if the README says something else

Reads bench/results/<device>/*.json (pytest-benchmark's, with our extra_info) and quickstart.txt beside them (what
`make quickstart` printed at its end).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def benchmarks(name: str) -> list[tuple[str, dict[str, Any]]]:
    """(device folder, benchmark) of every stored result in files called `name`.json."""
    return [(path.parent.name, entry) for path in sorted(RESULTS.glob(f"*/{name}.json"))
            for entry in json.loads(path.read_text())["benchmarks"]]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [header, ["--"] * len(header), *rows]]
    return "\n".join(lines)


def step_table() -> str:
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for device, entry in benchmarks("step"):
        info = entry["extra_info"]
        found.setdefault((device, info["shape"]), {})[info["contender"]] = info
    rows = []
    for (device, shape), by in found.items():
        ours, hand = by["ours"], by["by-hand"]
        rows.append([shape, ours["precision"], f"{ours['supervised_tokens_per_s']:,.0f}",
                     f"{hand['supervised_tokens_per_s']:,.0f}",
                     f"{ours['supervised_tokens_per_s'] / hand['supervised_tokens_per_s']:.2f}×", device])
    header = ["model", "precision", "supervised tokens/s, ours", "by hand, sorted and padded", "ratio", "device"]
    return table(header, rows)


def loss_table() -> str:
    rows = []
    for device, entry in benchmarks("linear_cross_entropy"):
        info = entry["extra_info"]
        case = entry["name"].partition("[")[2].rstrip("]").replace("-", " ")
        peak = info.get("peak_extra_mib")
        rows.append([case, f"{info['times_the_roof']:.2f}×", "" if peak is None else f"{peak:,.0f}", device])
    return table(["case", "time ÷ three bare GEMMs", "extra MiB", "device"], rows)


def quickstart_block() -> str:
    path = next(iter(sorted(RESULTS.glob("*/quickstart.txt"))), None)
    return "" if path is None else "```\n" + path.read_text().rstrip() + "\n```"


def figures_block() -> str:
    parts = []
    if benchmarks("step"):
        parts += ["A whole step (`pytest bench/bench_step.py`): the same model, rows and update on both sides, "
                  "one run, medians.", "", step_table(), ""]
    if benchmarks("linear_cross_entropy"):
        parts += ["The loss with both gradients (`pytest bench/bench_linear_cross_entropy.py`), against the three "
                  "bare matrix products on the supervised rows, measured in the same run:", "", loss_table(), ""]
    parts.append("What was measured while building, with its commands: [bench/README.md](bench/README.md).")
    return "\n".join(parts)


def replaced(text: str, name: str, block: str) -> str:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"


def main() -> int:
    path = ROOT / "README.md"
    old = path.read_text()
    new = replaced(replaced(old, "quickstart", quickstart_block()), "figures", figures_block())
    if "--check" in sys.argv[1:]:
        if new != old:
            print("README.md does not say what bench/results holds; run: python bench/report.py", file=sys.stderr)
        return int(new != old)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
