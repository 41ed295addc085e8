"""What a kill inside a save, and a lost optimizer state, do to TRL's SFTTrainer and to this project.

    python bench/killed_saves.py            # needs trl (pip install 'delib-fast[peers]'); some minutes on a CPU

A tiny run saves at every step. It is killed (SIGKILL) in its second save (ours: its first of a stage), while a file is
half written, then the same command is given again, twice at most, as a scheduler would. TRL's resumes from
`get_last_checkpoint(folder)`. And once more: of a whole checkpoint the optimizer's state is deleted. Prints a table.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
STEPS = 4
# The file of TRL's second save that is left half written, and its like in a checkpoint of this project.
PLACES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
OURS = ("state-00000-of-00001.safetensors", "trainer.json", "manifest.json")


# --- TRL, in a process of its own ---------------------------------------------------------------------------------


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
    """SIGKILL when the second checkpoint's file of this name is half written."""
    if name is None:
        return
    import safetensors.torch
    import torch
    import transformers.modeling_utils

    def dying(plain, path_at):
        def write(*args, **options):
            path = Path(str(args[path_at]))
            plain(*args, **options)
            if path.name == name and path.parent.name == "checkpoint-2":
                data = path.read_bytes()
                path.write_bytes(data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)

        return write

    torch.save = dying(torch.save, 1)
    transformers.modeling_utils.safe_save_file = safetensors.torch.save_file = dying(safetensors.torch.save_file, 1)
    from transformers import TrainerState

    plain = TrainerState.save_to_json
    TrainerState.save_to_json = dying(plain, 1)


# --- both, by command ---------------------------------------------------------------------------------------------


def trl(folder: Path, **env: str) -> tuple[int, str]:
    return command([__file__, "--trl", str(folder)], **env)


def ours(folder: Path, **env: str) -> tuple[int, str]:
    program = "import sys; from faults import install; install(); from tiny_run import run; sys.exit(run(sys.argv[1]))"
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


def last_line(told: str) -> str:
    lines = [line.strip() for line in told.splitlines() if re.match(r"^\w*(\.\w+)*(Error|Exception)\b", line.strip())]
    return re.sub(r"'/\S*/", "'", lines[-1])[:90] if lines else ""


def restarts(run, folder: Path, truth: str, end_of) -> str:
    for number in (1, 2):
        code, told = run(folder)
        if code == 0:
            same = "the weights of the undisturbed run" if end_of(folder, told) == truth else "OTHER weights"
            return f"restart {number} ends, with {same}"
    return f"every restart fails: {last_line(told)}"


def trl_end(_folder: Path, told: str) -> str:
    return next(line for line in told.splitlines() if line.startswith("END "))


def our_end(folder: Path, _told: str) -> str:
    import hashlib

    return hashlib.sha256((folder / "run" / "model" / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    from kill_matrix import short_run

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        top = Path(temporary)
        truth = trl_end(top, trl(top / "trl")[1])
        for name in PLACES:
            folder = top / f"trl-{name}"
            assert trl(folder, DIE_AT=name)[0] == -signal.SIGKILL, f"TRL never wrote {name}"
            rows.append(("TRL SFTTrainer", f"killed while {name} is written", restarts(trl, folder, truth, trl_end)))
        for what in ("nothing lost of the last whole checkpoint", "optimizer.pt of it lost"):
            folder = top / f"trl-{what[:8]}"
            assert trl(folder, DIE_AT="model.safetensors")[0] == -signal.SIGKILL
            shutil.rmtree(folder / "checkpoint-2")  # the torn one, as by a person
            if "optimizer" in what:
                (folder / "checkpoint-1" / "optimizer.pt").unlink()
            rows.append(("TRL SFTTrainer", f"torn folder deleted, {what}", restarts(trl, folder, truth, trl_end)))

        short_run(top / "whole")
        assert ours(top / "whole")[0] == 0
        truth = our_end(top / "whole", "")
        for name in OURS:
            folder, label = top / f"ours-{name}", re.sub(r"\d{4,}", "N", name)
            short_run(folder)
            suffix = "" if name.startswith("state") else ".tmp"
            location = f"write checkpoints/aft/.writing-step-N/{label}{suffix}"
            assert ours(folder, FAULT=location)[0] == -signal.SIGKILL, location
            rows.append(("delib_fast", f"killed while {name} is written", restarts(ours, folder, truth, our_end)))
        folder = top / "ours-lost"
        short_run(folder)
        assert ours(folder, FAULT="mkdir .model.writing-N")[0] == -signal.SIGKILL
        max((folder / "run" / "checkpoints" / "aft").glob("step-*/state-*")).unlink()
        rows.append(("delib_fast", "the state of the newest checkpoint lost", restarts(ours, folder, truth, our_end)))
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
        sys.path[:0] = [str(ROOT / part) for part in ("", "tests", "tests/engine")]
        main()
