"""Run by test_ranks_differ.py on each rank: the tiny run, in which rank 1 has something else than rank 0.

Each rank has a folder of its own, as on two machines whose paths are the same: configuration and data are read from the
working directory. `run_dir` is shared.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import yaml
from helpers.tiny_run import run

import delib_fast.train
from delib_fast.training import agreement

CONFIG = Path("run.yaml")


def main(folder: str, case: str) -> int:
    rank = os.environ["RANK"]
    own = Path(folder) / f"rank-{rank}"
    shutil.copytree(Path(folder) / "given", own, dirs_exist_ok=True)
    os.chdir(own)
    overrides = globals()[case]() if rank == "1" else None
    return run(CONFIG, *(overrides or ()))


def alone(folder: str) -> int:
    """One rank, in the folder of rank 0."""
    shutil.copytree(Path(folder) / "given", Path(folder) / "rank-0")
    os.chdir(Path(folder) / "rank-0")
    return run(CONFIG, "checkpoint.every_steps=1")


def with_key(change) -> None:
    """Change the configuration file of this rank."""
    tree = yaml.safe_load(CONFIG.read_text())
    change(tree)
    CONFIG.write_text(yaml.safe_dump(tree, sort_keys=False))


def nothing():
    return []


def other_rows():
    """One word of one row differs; the number of rows is the same."""
    path = Path("documents.jsonl")
    first, rest = path.read_text().split("\n", 1)
    path.write_text(f"{first.replace(' the ', ' a ', 1)}\n{rest}")


def other_held_out_rows():
    path = Path("documents_heldout.jsonl")
    path.write_text(path.read_text().replace(" the ", " a ", 1))


def fewer_rows():
    path = Path("deliberation.jsonl")
    path.write_text("\n".join(path.read_text().splitlines()[:-12]) + "\n")


def a_bad_row():
    with Path("deliberation.jsonl").open("a") as file:
        file.write("{broken\n")


def no_data():
    Path("documents.jsonl").unlink()


def learning_rate():
    with_key(lambda tree: tree["stages"][0]["optimizer"].update(lr=0.02))


def seed():
    return ["seed=7"]


def batch_size():
    return ["stages.aft.tokens_per_step=4096"]


def number_of_steps():
    return ["stages.aft.max_steps=3"]


def one_stage():
    with_key(lambda tree: tree["stages"].pop())


def precision():
    return ["engine.precision=bf16"]


def shared_prompts():
    return ["stages.aft.share_prompts=never"]


def log_interval():
    """Reading metrics is a collective, so that ranks with another interval would hang."""
    return ["log.every_steps=3"]


def zero_stage():
    return ["engine.zero_stage=3"]


def no_config():
    CONFIG.unlink()


def bad_config():
    with_key(lambda tree: tree.update(sede=1))


def bad_command_line():
    sys.exit(delib_fast.train.main(["--config"]))


def no_such_device():
    return ["engine.device=cuda"]


def environment():
    os.environ["NVIDIA_TF32_OVERRIDE"] = "1"


def threads():
    import torch

    torch.set_num_threads(2)


def package_version():
    plain = agreement.version
    agreement.version = lambda name: "4.0.0" if name == "transformers" else plain(name)


def package_files():
    agreement.package_hash = lambda: "0" * 64


def own_run_dir():
    """The path is the same, but it is a disk of this machine."""
    with_key(lambda tree: tree.update(run_dir="run"))


def killed():
    delib_fast.train.load_config = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def killed_while_encoding():
    import delib_fast.training.encoding

    delib_fast.training.encoding.encode_stream = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)


def fails_while_encoding():
    import delib_fast.training.encoding

    def encode(*_, **__):
        raise RuntimeError("a fault of this test")

    delib_fast.training.encoding.encode_stream = encode


def number_of_ranks():
    os.environ["WORLD_SIZE"] = "3"


def same_rank():
    os.environ["RANK"] = "0"


def chat_template():
    path = Path("template.jinja")
    path.write_text(path.read_text() + " ")


def weights():
    """One bit of one weight differs."""
    path = Path("model/model.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def model_config():
    path = Path("model/config.json")
    path.write_text(path.read_text().replace('"use_cache"', '"unused": 1, "use_cache"'))
