"""Generate the tables and plots of README.md and docs/benchmarks.md from stored results: no figure is typed by hand.

    python bench/report.py --record out.json ...  # store the results of pytest bench --benchmark-json out.json
    python bench/report.py                        # rewrite the blocks between the markers, and redraw the plots
    python bench/report.py --check                # exit with 1 if a page differs from the stored results
    python bench/report.py --history              # plot bench/results/<device>/history.jsonl

Input: bench/results/<device>/*.json (see recording.py), and quickstart.txt in the same folder (the last lines that
`make quickstart` printed). The plots need matplotlib (extra: report).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from recording import HISTORY, RESULTS, read_results, record

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
OURS = "delib_fast"
BASELINE = "hand-written loop"
STEP_NAMES = {
    "ours-compile": f"{OURS}, compiled blocks",
    "ours-eager": f"{OURS}, eager blocks",
    "by hand": BASELINE,
    "trl": "TRL",
    "trainer": "transformers' Trainer",
}
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
    "sdpa_loop": "sdpa, one document at a time",
}
# The four rows of the README's table: the label, and the stored case. They include a case in which a peer is faster.
HEADLINE_DEVICE = "cpu-avx512bf16-2-cores"
HEADLINE_STEPS = {
    "Training step, vocabulary of 8,192 (supervised tokens/s)": ("hidden256-vocab8k", "short: STAR-1", "bf16"),
    "Training step, vocabulary of 151,936 (supervised tokens/s)": ("hidden512-vocab152k", "short: STAR-1", "bf16"),
}
HEADLINE_OPS = {
    "Loss and its gradients, 10 % of 2,048 rows supervised, vocabulary of 151,936 (time / bare matrix products)": (
        "linear_cross_entropy",
        "T=2048 H=896 V=151936 10% bfloat16",
    ),
    "Attention, pack of mixed lengths (time / one matrix product of equal FLOPs)": ("varlen_attention", "mixed full"),
}


def benchmarks(name: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (device folder, benchmark) of every stored result in files called `name`.json."""
    return [
        (path.parent.name, entry)
        for path in sorted(RESULTS.glob(f"*/{name}.json"))
        for entry in json.loads(path.read_text())["benchmarks"]
    ]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [header, ["--"] * len(header), *rows]]
    return "\n".join(lines)


def with_best_in_bold(cells: list[str], best: Callable[[Iterable[float]], float]) -> list[str]:
    """Put the best cells of a row in bold: `best` is min or max. Ties are all bold, unless every cell is equal."""
    numbers = {cell: float(re.sub("[^0-9.e-]", "", cell)) for cell in cells if cell}
    if len(set(numbers.values())) < 2:
        return cells
    winner = best(numbers.values())
    return [f"**{cell}**" if cell and numbers[cell] == winner else cell for cell in cells]


Steps = dict[tuple[str, str, str], dict[str, dict[str, Any]]]


def steps_of(device: str) -> Steps:
    """Return {(shape, data, precision): {contender: extra_info}} of the whole-step bench on one device."""
    found: Steps = {}
    for where, entry in benchmarks("step"):
        info = entry["extra_info"]
        if where == device and "ratio" in info:  # results without a ratio are from an earlier form of the bench
            found.setdefault((info["shape"], info["data"], info["precision"]), {})[info["contender"]] = info
    return found


def step_speeds(by: dict[str, dict[str, Any]], names: Iterable[str]) -> list[str]:
    """Supervised tokens/s of each contender; the baseline's is from the run in which it alternated with ours."""
    paired = min(by.items(), key=lambda item: item[0] == "trl")[1]
    speeds = {name: info["supervised_tokens_per_s"] for name, info in by.items()}
    speeds["by hand"] = paired["by_hand_supervised_tokens_per_s"]
    return [f"{speeds[name]:,.0f}" if name in speeds else "" for name in names]


def step_tables(device: str) -> str:
    """Two tables: the speed of every contender; its ratio to the baseline in the same run, and its MFU."""
    steps = steps_of(device)
    names = [name for name in STEP_NAMES if name == "by hand" or any(name in by for by in steps.values())]
    speeds = [
        [shape, data, precision, *with_best_in_bold(step_speeds(by, names), max)]
        for (shape, data, precision), by in steps.items()
    ]
    shares = [
        [shape, data, precision, STEP_NAMES[name], f"{info['ratio']:.2f}×", f"{info['mfu']:.0%}"]
        for (shape, data, precision), by in steps.items()
        for name, info in by.items()
    ]
    return "\n\n".join(
        [
            table(["model", "rows", "precision", *(STEP_NAMES[name] for name in names)], speeds),
            table(["model", "rows", "precision", "trainer", f"speed over the {BASELINE}'s", "MFU"], shares),
        ]
    )


Cases = dict[tuple[str, str], dict[str, dict[str, Any]]]


def cases_of(suite: str) -> Cases:
    """Return {(device, case): {contender: extra_info}}; the fastest of our backends is called "ours"."""
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


def times_the_roof(by: dict[str, dict[str, Any]], names: Iterable[str]) -> list[str]:
    return [f"{by[name]['times_the_roof']:.2f}×" if name in by else "" for name in names]


def peer_table(cases: Cases, device: str) -> str:
    """Time over that of the roof, for delib_fast and every peer that ran."""
    mine = {case: by for (where, case), by in cases.items() if where == device}
    names = ["ours", *(name for name in PEER_NAMES if any(name in by for by in mine.values()))]
    rows = [[case, *with_best_in_bold(times_the_roof(by, names), min)] for case, by in mine.items()]
    return table(["case", OURS, *(PEER_NAMES[name] for name in names[1:])], rows)


def gain_sentence() -> str:
    """What a training step gains over the baseline and TRL, over every stored case of the headline device."""
    pairs = [(by["ours-compile"]["ratio"], by["trl"]["ratio"]) for by in steps_of(HEADLINE_DEVICE).values()]
    over_baseline = [ours for ours, _ in pairs]
    over_trl = [ours / trl for ours, trl in pairs]
    return (
        "On two CPU cores, a training step of a small model runs at "
        f"{min(over_baseline):.2f} to {max(over_baseline):.2f} times the speed of a compiled {BASELINE}\n"
        f"and at {min(over_trl):.1f} to {max(over_trl):.1f} times that of TRL ([benchmarks](docs/benchmarks.md))."
    )


def headline_table() -> str:
    """The README's table: one case per row, with the best of the row in bold."""
    rows = []
    steps = steps_of(HEADLINE_DEVICE)
    for label, case in HEADLINE_STEPS.items():
        ours, baseline, trl = with_best_in_bold(step_speeds(steps[case], ["ours-compile", "by hand", "trl"]), max)
        rows.append([label, ours, f"{baseline} ({BASELINE})", trl])
    for label, (suite, case) in HEADLINE_OPS.items():
        by = cases_of(suite)[HEADLINE_DEVICE, case]
        peer = min((name for name in by if name in PEER_NAMES), key=lambda name: by[name]["times_the_roof"])
        ours, other = with_best_in_bold(times_the_roof(by, ["ours", peer]), min)
        rows.append([label, ours, f"{other} ({PEER_NAMES[peer]})", ""])
    return table(["2 CPU cores (AMD EPYC, Zen 4), bf16", OURS, "best alternative", "TRL trainer"], rows)


def memory_and_error_table(cases: Cases, device: str) -> str:
    rows = []
    for (where, case), by in cases.items():
        if where == device:
            contenders = [by.get(name) for name in ("ours", "compile-compact", "eager-compact")]
            memory = with_best_in_bold([_mib(info) for info in contenders], min)
            rows.append([case, *memory, *with_best_in_bold([_error(info) for info in contenders], min)])
    names = [OURS, "torch.compile", "eager"]
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
    for device in sorted({device for device, _ in benchmarks("step") if steps_of(device)}):
        parts += [
            f"## A whole training step, {device}",
            "Command: `pytest bench/bench_step.py`. Every trainer runs the same model, rows and optimizer step; the "
            "speeds are supervised tokens per second, medians. Each trainer is timed together with the "
            f"{BASELINE} in the same process, and the ratios are taken within that run.",
            step_tables(device),
        ]
    loss, attention = cases_of("linear_cross_entropy"), cases_of("varlen_attention")
    for device in sorted({device for device, _ in loss}):
        parts += [
            f"## The loss and both of its gradients, {device}",
            "Command: `pytest bench/bench_linear_cross_entropy.py`. The figures are the time divided by that of the "
            "three bare matrix products on the supervised rows (the roof), measured in the same run.",
            peer_table(loss, device),
            memory_and_error_table(loss, device),
            f"![Roofline of the loss on {device}](../bench/results/{device}/roofline.svg)",
        ]
    for device in sorted({device for device, _ in attention}):
        parts += [
            f"## Attention in packs, {device}",
            "Command: `pytest bench/bench_varlen_attention.py`. The figures are the time divided by that of one square "
            "matrix product of as many FLOPs (the roof), measured in the same run.",
            peer_table(attention, device),
        ]
    if completions := completions_table():
        parts += [
            "## Shared prompts",
            "Command: `pytest bench/bench_varlen_attention.py -k completions`. Eight completions per prompt; with a "
            "shared prompt, the pack holds the prompt once.",
            completions,
        ]
    return "\n\n".join(parts)


def replaced(text: str, name: str, block: str) -> str:
    """Return `text` with the block between the markers of `name` replaced by `block`."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"


def generated_pages() -> dict[Path, str]:
    """Return the text of each page with its generated blocks regenerated."""
    readme = README.read_text()
    for name, block in (
        ("gain", gain_sentence()),
        ("quickstart", quickstart_block()),
        ("figures", headline_table()),
    ):
        readme = replaced(readme, name, block)
    return {
        README: readme,
        BENCHMARKS: replaced(BENCHMARKS.read_text(), "figures", figures_block()),
    }


def draw_rooflines() -> None:
    import plots  # needs delib_fast and matplotlib, which --record and --check do not

    cases = cases_of("linear_cross_entropy")
    for device in sorted({device for device, _ in cases}):
        plots.roofline(
            {case: by for (where, case), by in cases.items() if where == device},
            device,
            RESULTS / device / "roofline.svg",
            PEER_NAMES,
        )


def draw_histories() -> None:
    import plots

    for path in sorted(RESULTS.glob(f"*/{HISTORY}")):
        plots.history(
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
    stale = {path: page for path, page in generated_pages().items() if page != path.read_text()}
    if options.check:
        for path in stale:
            print(f"{path.name} differs from bench/results; run: python bench/report.py", file=sys.stderr)
        return int(bool(stale))
    draw_rooflines()
    for path, page in stale.items():
        path.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
