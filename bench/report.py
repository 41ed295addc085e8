"""Tables and pictures from what was measured: no figure is typed by hand.

    python bench/report.py --record out.json ...  # store the results of pytest bench --benchmark-json out.json
    python bench/report.py                        # rewrites the blocks between the README's markers, and the pictures
    python bench/report.py --check                # exits 1 if the README says something else
    python bench/report.py --history              # draws bench/results/<device>/history.jsonl

Reads bench/results/<device>/*.json (recording.py) and quickstart.txt beside them (what `make quickstart` printed at its
end). Pictures need matplotlib (extra: study).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from recording import HISTORY, RESULTS, read_results, record

ROOT = Path(__file__).parent.parent
PEER_NAMES = {
    "compile-compact": "torch.compile",
    "eager-compact": "eager",
    "eager": "eager, all rows",
    "torch-fused": "torch fused",
    "torch-fused-tuned": "torch fused, tuned",
    "trl-chunked": "TRL chunked",
    "cut-cross-entropy": "CCE",
    "liger": "Liger",
    "quack": "QuACK",
    "sdpa_dense": "sdpa, dense mask",
    "sdpa_loop": "sdpa, run by run",
}


def benchmarks(name: str) -> list[tuple[str, dict[str, Any]]]:
    """(device folder, benchmark) of every stored result in files called `name`.json."""
    return [
        (path.parent.name, entry)
        for path in sorted(RESULTS.glob(f"*/{name}.json"))
        for entry in json.loads(path.read_text())["benchmarks"]
    ]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [header, ["--"] * len(header), *rows]]
    return "\n".join(lines)


def step_table() -> str:
    """A row a measured contender, each beside the loop by hand that was timed in turns with it."""
    rows = []
    for device, entry in benchmarks("step"):
        info = entry["extra_info"]
        if "ratio" not in info:  # of an earlier form of the bench
            continue
        rows.append(
            [
                info["shape"],
                info["data"],
                info["precision"],
                info["contender"],
                f"{info['supervised_tokens_per_s']:,.0f}",
                f"{info['by_hand_supervised_tokens_per_s']:,.0f}",
                f"{info['ratio']:.2f}×",
                f"{info['mfu']:.0%}",
                device,
            ]
        )
    header = ["model", "rows", "precision", "", "supervised tokens/s", "the loop by hand", "ratio", "MFU", "device"]
    return table(header, rows)


Cases = dict[tuple[str, str], dict[str, dict[str, Any]]]


def cases_of(suite: str) -> Cases:
    """{(device, case): {contender: extra_info}}; of our backends the fastest, as "ours"."""
    found: Cases = {}
    for device, entry in benchmarks(suite):
        if "share_of_roof" not in (info := entry["extra_info"]):
            continue
        by = found.setdefault((device, info["case"]), {})
        name = "ours" if info["contender"].startswith("ours") else info["contender"]
        if name not in by or info["share_of_roof"] > by[name]["share_of_roof"]:
            by[name] = info
    numbers = {key: [int(n) for n in re.findall(r"\d+", key[1])] for key in found}
    return {key: found[key] for key in sorted(found, key=lambda key: (key[0], numbers[key])) if "ours" in found[key]}


def peer_table(cases: Cases, device: str) -> str:
    """Time over that of the roof, for us and every peer that ran."""
    mine = {case: by for (where, case), by in cases.items() if where == device}
    peers = [name for name in PEER_NAMES if any(name in by for by in mine.values())]
    rows = []
    for case, by in mine.items():
        cells = [f"{by[name]['times_the_roof']:.2f}×" if name in by else "" for name in peers]
        rows.append([case, f"**{by['ours']['times_the_roof']:.2f}×**", *cells])
    return table(["case", "ours", *(PEER_NAMES[name] for name in peers)], rows)


def memory_and_error_table(cases: Cases, device: str) -> str:
    rows = []
    for (where, case), by in cases.items():
        if where == device:
            pair = [by.get(name) for name in ("ours", "compile-compact", "eager-compact")]
            rows.append([case, *(_mib(info) for info in pair), *(_error(info) for info in pair)])
    names = ["ours", "torch.compile", "eager"]
    return table(["case", *(f"extra MiB, {n}" for n in names), *(f"gradient error, {n}" for n in names)], rows)


def _mib(info: dict[str, Any] | None) -> str:
    peak = info and info.get("peak_extra_mib")
    return "" if peak is None else f"{peak:,.0f}"


def _error(info: dict[str, Any] | None) -> str:
    return "" if info is None else f"{max(info['error_grad_hidden'], info['error_grad_weight']):.1e}"


def completions_table() -> str:
    rows = []
    for device, entry in benchmarks("varlen_attention"):
        if "tokens_shared" in (info := entry["extra_info"]):
            rows.append(
                [
                    f"{info['prompts'].replace('_', ' ')}, {info['what']}",
                    f"{info['tokens_plain']:,}",
                    f"{info['tokens_shared']:,}",
                    f"{info['tokens_plain'] / info['tokens_shared']:.2f}×",
                    f"{info['times_as_fast']:.2f}×",
                    device,
                ]
            )
    header = ["prompts, what is timed", "tokens, plain packing", "tokens, shared prompt", "fewer", "faster", "device"]
    return table(header, rows) if rows else ""


def quickstart_block() -> str:
    path = next(iter(sorted(RESULTS.glob("*/quickstart.txt"))), None)
    return "" if path is None else "```\n" + path.read_text().rstrip() + "\n```"


def figures_block() -> str:
    parts = []
    if benchmarks("step"):
        parts += [
            "A whole step (`pytest bench/bench_step.py`): the same model, rows and update on both sides, "
            "one run, medians.",
            "",
            step_table(),
            "",
        ]
    loss, attention = cases_of("linear_cross_entropy"), cases_of("varlen_attention")
    for device in sorted({device for device, _ in loss}):
        parts += [
            f"The loss with both gradients on {device} (`pytest bench/bench_linear_cross_entropy.py`): time over "
            "that of the three bare matrix products on the supervised rows, the floor, measured in the same run.",
            "",
            peer_table(loss, device),
            "",
            memory_and_error_table(loss, device),
            "",
            f"![Roofline of the loss on {device}](bench/results/{device}/roofline.svg)",
            "",
        ]
    for device in sorted({device for device, _ in attention}):
        parts += [
            f"Attention of packs on {device} (`pytest bench/bench_varlen_attention.py`): time over that of "
            "one square matrix product of as many FLOPs, measured in the same run.",
            "",
            peer_table(attention, device),
            "",
        ]
    if completions := completions_table():
        parts += [
            "Eight completions a prompt, the prompt computed once (`pytest bench/bench_varlen_attention.py -k "
            "completions`):",
            "",
            completions,
            "",
        ]
    parts.append("What was measured while building, with its commands: [bench/README.md](bench/README.md).")
    return "\n".join(parts)


def replaced(text: str, name: str, block: str) -> str:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"


def draw_rooflines() -> None:
    cases = cases_of("linear_cross_entropy")
    for device in sorted({device for device, _ in cases}):
        import pictures

        pictures.roofline(
            {case: by for (where, case), by in cases.items() if where == device},
            device,
            RESULTS / device / "roofline.svg",
            PEER_NAMES,
        )


def draw_histories() -> None:
    import pictures

    for path in sorted(RESULTS.glob(f"*/{HISTORY}")):
        pictures.history(
            [json.loads(line) for line in path.read_text().splitlines()], path.parent.name, path.with_suffix(".svg")
        )
        print(path.with_suffix(".svg").relative_to(ROOT))


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/report.py")
    parser.add_argument("--record", nargs="+", type=Path, metavar="JSON")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--history", action="store_true")
    options = parser.parse_args()
    if options.record:
        for written in record(read_results(options.record)):
            print(written.relative_to(ROOT))
    if options.history:
        draw_histories()
    if options.record or options.history:
        return 0
    path = ROOT / "README.md"
    old = path.read_text()
    new = replaced(replaced(old, "quickstart", quickstart_block()), "figures", figures_block())
    if options.check:
        if new != old:
            print("README.md does not say what bench/results holds; run: python bench/report.py", file=sys.stderr)
        return int(new != old)
    draw_rooflines()
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
