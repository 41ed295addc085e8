"""Kill TRL's SFTTrainer and this project in the middle of a save, or delete an optimizer state, and restart both.

    python bench/experiments/killed_saves.py    # needs trl (pip install 'delib-fast[peers]'); some minutes on a CPU

A tiny run saves at every step. SIGKILL ends it during its second save (ours: the first save of a stage), when a file is
half written. Then the same command runs again, at most twice, as a scheduler would restart it. TRL resumes from
`get_last_checkpoint(folder)`. In a further case, the optimizer state of a complete checkpoint is deleted. The script
prints a table.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STEPS = 4
# the files that are left half written: of TRL's second save, and of a checkpoint of this project
TRL_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
OUR_FILES = ("state-00000-of-00001.safetensors", "trainer.json", "manifest.json")


# --- TRL, in its own process --------------------------------------------------------------------------------------


def train_with_trl(folder: str) -> None:
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.trainer_utils import get_last_checkpoint
    from trl import SFTConfig, SFTTrainer

    die_while_writing(os.environ.get("DIE_AT"))
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2", unk_token="w0")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "qwen3",
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            head_dim=16,
            num_key_value_heads=1,
            vocab_size=64,
        )
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(64, (STEPS * 2, 32)).tolist()]
    config = SFTConfig(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        max_length=None,
        gradient_checkpointing=False,
        learning_rate=0.01,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    trainer.train(resume_from_checkpoint=last)
    print(f"END {trainer.state.global_step} {sum(float(p.detach().double().sum()) for p in model.parameters()):.12f}")


def die_while_writing(name: str | None) -> None:
    """Arrange that this process gets SIGKILL when the second checkpoint's file of this name is half written."""
    if name is None:
        return
    import safetensors.torch
    import torch
    import transformers.modeling_utils

    def dying(original: Callable[..., None], path_index: int) -> Callable[..., None]:
        def write(*args: Any, **options: Any) -> None:
            path = Path(str(args[path_index]))
            original(*args, **options)
            if path.name == name and path.parent.name == "checkpoint-2":
                data = path.read_bytes()
                path.write_bytes(data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)

        return write

    torch.save = dying(torch.save, 1)
    transformers.modeling_utils.safe_save_file = safetensors.torch.save_file = dying(safetensors.torch.save_file, 1)
    from transformers import TrainerState

    TrainerState.save_to_json = dying(TrainerState.save_to_json, 1)  # type: ignore[method-assign]


# --- both, as commands that return (exit code, output) ------------------------------------------------------------

Run = Callable[..., tuple[int, str]]


def trl(folder: Path, **env: str) -> tuple[int, str]:
    return command([__file__, "--trl", str(folder)], **env)


def ours(folder: Path, **env: str) -> tuple[int, str]:
    program = "import sys; from helpers import faults, tiny_run; faults.install(); sys.exit(tiny_run.run(sys.argv[1]))"
    return command(["-c", program, str(folder / "run.yaml")], FAULT_DIR=str(folder / "run"), **env)


def command(arguments: list[str], **env: str) -> tuple[int, str]:
    path = os.pathsep.join(str(ROOT / part) for part in (".", "tests", "tests/engine"))
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": path, **env},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        check=False,
    )
    return done.returncode, done.stdout


def last_error(output: str) -> str:
    """The last exception that the output reports, without the folders of paths."""
    lines = [line.strip() for line in output.splitlines() if re.match(r"^\w*(\.\w+)*(Error|Exception)\b", line.strip())]
    return re.sub(r"'/\S*/", "'", lines[-1])[:90] if lines else ""


def restarts(run: Run, folder: Path, undisturbed: str, result_of: Callable[[Path, str], str]) -> str:
    """Run the same command again, at most twice, and describe the outcome."""
    for number in (1, 2):
        code, output = run(folder)
        if code == 0:
            same = "the weights of the undisturbed run" if result_of(folder, output) == undisturbed else "OTHER weights"
            return f"restart {number} finishes, with {same}"
    return f"every restart fails: {last_error(output)}"


def trl_result(_folder: Path, output: str) -> str:
    return next(line for line in output.splitlines() if line.startswith("END "))


def our_result(folder: Path, _output: str) -> str:
    return hashlib.sha256((folder / "run" / "model" / "model.safetensors").read_bytes()).hexdigest()


def trl_rows(top: Path) -> Iterator[tuple[str, str, str]]:
    undisturbed = trl_result(top, trl(top / "trl")[1])
    for name in TRL_FILES:
        folder = top / f"trl-{name}"
        assert trl(folder, DIE_AT=name)[0] == -signal.SIGKILL, f"TRL never wrote {name}"
        yield "TRL SFTTrainer", f"killed while {name} is written", restarts(trl, folder, undisturbed, trl_result)
    for lost in (None, "optimizer.pt"):
        folder = top / f"trl-lost-{lost}"
        assert trl(folder, DIE_AT="model.safetensors")[0] == -signal.SIGKILL
        shutil.rmtree(folder / "checkpoint-2")  # a person would delete the incomplete one
        if lost is not None:
            (folder / "checkpoint-1" / lost).unlink()
        what = "the last complete checkpoint intact" if lost is None else f"{lost} of the last complete checkpoint lost"
        yield (
            "TRL SFTTrainer",
            f"incomplete folder deleted, {what}",
            restarts(trl, folder, undisturbed, trl_result),
        )


def our_rows(top: Path) -> Iterator[tuple[str, str, str]]:
    from helpers.tiny_run import short_run

    short_run(top / "whole")
    assert ours(top / "whole")[0] == 0
    undisturbed = our_result(top / "whole", "")
    for name in OUR_FILES:
        folder, label = top / f"ours-{name}", re.sub(r"\d{4,}", "N", name)
        short_run(folder)
        written = label if name.startswith("state") else f".{label}.N.tmp"  # JSON is written to a temporary file first
        fault = f"write checkpoints/aft/.writing-step-N/{written}"
        assert ours(folder, FAULT=fault)[0] == -signal.SIGKILL, fault
        yield "delib_fast", f"killed while {name} is written", restarts(ours, folder, undisturbed, our_result)
    folder = top / "ours-lost"
    short_run(folder)
    assert ours(folder, FAULT="mkdir .model.writing-N")[0] == -signal.SIGKILL
    max((folder / "run" / "checkpoints" / "aft").glob("step-*/state-*")).unlink()
    yield "delib_fast", "the state of the newest checkpoint lost", restarts(ours, folder, undisturbed, our_result)


def main() -> None:
    with tempfile.TemporaryDirectory() as top:
        rows = [*trl_rows(Path(top)), *our_rows(Path(top))]
    print("| trainer | what happens | the same command again |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trl:
        train_with_trl(options.trl)
    else:
        sys.path[:0] = [str(ROOT / part) for part in ("", "tests")]
        main()
