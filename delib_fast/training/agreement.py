"""Ranks that differ are refused before the first step: what they have is compared, and every difference is named.

Ranks with another learning rate, other rows or another version of torch may train to the end without an error, but the
result then belongs to no configuration. Other differences give collectives of different shapes, which hang or abort
without a reason. Three comparisons therefore come before the first collective that depends on what they compare:

    before the process group            configuration, packages, environment, device; run directory and checkpoints
    after the sources are read          the hash of each source
    after the stages are packed         tokenizer, model files, number of steps, order of the examples

Numbers of threads per process, visible devices and folders of caches may differ: a machine may have its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import secrets
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delib_fast.checkpoint.format import MANIFEST, list_steps, step_folder
from delib_fast.config import Config, StageConfig, ranks_text
from delib_fast.config.load import flatten
from delib_fast.digests import hash_file_once
from delib_fast.files import hash_file
from delib_fast.redaction import redact
from delib_fast.training.distillation import other_teacher, teacher_key
from delib_fast.training.errors import RanksDifferError

if TYPE_CHECKING:
    import torch

    from delib_fast.engine.rendezvous import Rendezvous
    from delib_fast.training.context import RunContext
    from delib_fast.training.run_directory import RunDirectory

Facts = dict[str, tuple[str, str]]
"""What one rank has: for each name, the value as it is shown, and the hash by which it is compared."""

# Keys of the configuration that may differ: folders of a machine.
_OF_A_MACHINE = ("cache_dir",)
_PACKAGES = (
    "delib-fast",
    "torch",
    "transformers",
    "deepspeed",
    "accelerate",
    "datasets",
    "huggingface-hub",
    "jinja2",
    "liger-kernel",
    "bitsandbytes",
    "flash-attn",
    "numpy",
    "peft",
    "pyarrow",
    "safetensors",
    "tokenizers",
    "triton",
)
# Environment variables that change numbers, or the order of collectives.
_ENVIRONMENT = re.compile(
    r"(ATEN_CPU_CAPABILITY|CUBLAS(LT)?_|CUDNN_|DEEPSPEED_|DELIB_FAST_|DNNL_|DS_ACCELERATOR|FLASH_ATTENTION_"
    r"|MKL_|NCCL_(ALGO|PROTO|NVLS)|NVIDIA_TF32_OVERRIDE|ONEDNN_|OPENBLAS_CORETYPE|PYTORCH_|TORCHDYNAMO_|TORCHINDUCTOR_"
    r"|TORCH_(ALLOW_TF32|BLAS|COMPILE|CUDNN|DISABLE|LINALG)|TRITON_|USE_(FLASH|MEM_EFFICIENT))"
)
# … except those that only say where files are kept, what is logged, how memory is allocated, or how long to wait.
_NO_EFFECT = re.compile(
    r"(_(DIR|PATH|HOME|CACHE|LOGS?|LEVEL|VERBOSE|TIMEOUT)$|DEBUG|ALLOC_CONF|NUM_THREADS|DYNAMIC|WORKERS|KERNEL_DUMP"
    r"|DELIB_FAST_CACHE|PYTORCH_(BUILD|VERSION|NVML))"
)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def refuse_differences(rendezvous: Rendezvous, facts: Facts) -> None:
    """Compare the facts of all ranks. A collective, through the rendezvous.

    Raises:
        RanksDifferError: on every rank, if they differ; the message has each difference with its values and ranks.
    """
    report = rendezvous.merge(json.dumps(facts), lambda texts: describe_differences([json.loads(t) for t in texts]))
    if report:
        rendezvous.leave()
        raise RanksDifferError(report)


def describe_differences(facts: Sequence[Mapping[str, Sequence[str]]]) -> str:
    """A message about every difference between the facts of the ranks, in rank order; empty if there is none.

    Only one hash of each rank is compared, unless the hashes differ.
    """
    if len({digest_of(json.dumps(rank, sort_keys=True)) for rank in facts}) == 1:
        return ""
    lines = []
    for name in dict.fromkeys(name for rank in facts for name in rank):
        groups: dict[str, list[int]] = {}
        shown: dict[str, str] = {}
        for number, rank in enumerate(facts):
            text, digest = rank.get(name, ("not there", ""))
            groups.setdefault(digest, []).append(number)
            shown[digest] = text
        if len(groups) > 1:
            if len(set(shown.values())) == 1:  # secrets, or values that differ after the part that is shown
                shown = {digest: f"{text} (value {n})" for n, (digest, text) in enumerate(shown.items(), 1)}
            largest_last = sorted(groups.items(), key=lambda item: (len(item[1]), item[1][0]))
            values = "; ".join(f"{shown[digest]} on {ranks_text(numbers)}" for digest, numbers in largest_last[:4])
            more = f"; and {len(groups) - 4} more values" if len(groups) > 4 else ""
            lines.append(f"  {name}: {values}{more}")
    more_lines = [f"  and {len(lines) - 20} more"] if len(lines) > 20 else []
    return "\n".join(
        [
            "the ranks differ, so the run does not start:",
            *lines[:20],
            *more_lines,
            "give every rank the same configuration, files, packages and environment",
        ]
    )


# --- what is compared ---------------------------------------------------------------------------------------


def start_facts(config: Config, device: torch.device) -> Facts:
    """What must be the same before the ranks connect: configuration, packages, environment and kind of device."""
    import torch

    tree = config.model_dump(mode="json")
    facts = {"stages": fact(", ".join(stage.name for stage in config.stages))}
    tree["stages"] = {stage["name"]: stage for stage in tree["stages"]}  # keys are then as in other messages
    redacted = flatten(redact(tree))
    for key, value in flatten(tree).items():
        if not key.startswith(_OF_A_MACHINE):
            facts[key] = fact(value, shown=redacted[key])
    facts |= {f"version of {name}": fact(number) for name, number in _versions().items()}
    facts["sha256 of the files of delib_fast"] = hash_fact(package_hash())
    for name, value in sorted(os.environ.items()):
        if _ENVIRONMENT.match(name) and not _NO_EFFECT.search(name):
            facts[f"environment variable {name}"] = fact(value, shown=redact({name: value})[name])
    facts["CUDA (of torch)"] = fact(torch.version.cuda)
    facts["device"] = fact(device.type)
    facts["byte order and processor"] = fact(platform.machine())
    if device.type == "cpu":
        facts["threads of torch (OMP_NUM_THREADS)"] = fact(torch.get_num_threads())
    return facts


def source_facts(run: RunContext, names: Sequence[str]) -> Facts:
    """The hash of the rows of each source."""
    facts = {}
    for name in names:
        source = run.dataset.source(name)
        facts[f"data.{name}: sha256 of {run.config.data[name].path}"] = hash_fact(source.sha256)
        facts[f"data.{name}: rows (trained on, held out)"] = fact(f"{source.num_train}, {len(source.held_out)}")
    return facts


def compare_directories(rendezvous: Rendezvous, directory: RunDirectory, config: Config) -> None:
    """Refuse ranks whose run directories are not the same one, or hold other checkpoints. A collective.

    Raises:
        RanksDifferError: on every rank, if they differ.
    """
    file = directory.heartbeats / f"shared-{rendezvous.merge('', lambda texts: secrets.token_hex(8))}"

    def create() -> None:
        directory.heartbeats.mkdir(mode=0o700, exist_ok=True)
        file.touch()

    def collect() -> Facts:
        facts = {
            "run_dir: shows the files of rank 0": fact("yes" if file.exists() else "no"),
            "run_dir: ledger.json": fact(
                json.dumps([directory.ledger[part] for part in ("stages", "evaluations")], sort_keys=True),
                shown=_describe_ledger(directory.ledger),
            ),
        }
        for stage in config.stages:
            facts[f"stages.{stage.name}: checkpoint"] = fact(_newest_checkpoint(directory.checkpoints(stage.name)))
        return facts

    rendezvous.on_first(create)
    refuse_differences(rendezvous, rendezvous.raise_together(collect))
    rendezvous.on_first(file.unlink)


def stage_facts(run: RunContext, stages: Sequence[StageConfig], settings: Mapping[str, Any]) -> Facts:
    """What must be the same before the first step, besides what was compared before.

    Args:
        stages: the stages that are not finished yet.
        settings: settings that each rank has derived from its device, e.g. the precision.
    """
    dataset = run.dataset
    facts = {name: fact(value) for name, value in settings.items()}
    facts["sha256 of the tokenizer and its chat template"] = hash_fact(dataset.tokenizer_fingerprint)
    facts |= {name: hash_fact(value) for name, value in _model_facts(run.config).items()}
    for stage in stages:
        where = f"stages.{stage.name}"
        facts[f"{where}: number of steps"] = fact(dataset.batches(stage).num_steps)
        facts[f"{where}: sha256 of the examples and their order"] = hash_fact(dataset.fingerprint(stage))
        for key, owner in (("spec", stage), ("teacher.spec", getattr(stage, "teacher", None))):
            if spec := getattr(owner, "spec", None):
                facts[f"{where}.{key}: sha256 of {spec}"] = hash_fact(hash_file(Path(spec)))
    return facts


def fact(value: Any, *, shown: Any = None) -> tuple[str, str]:
    """A value as `Facts` has it.

    Args:
        shown: what messages show instead of the value, for secrets.
    """
    text = str(value if shown is None else shown)
    return " ".join(text.split())[:80], digest_of(repr(value))


def hash_fact(sha256: str) -> tuple[str, str]:
    """A hash as `Facts` has it. Messages show its beginning."""
    return sha256[:16], sha256


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def package_hash() -> str:
    """The sha256 of all files of this package: sources, templates and compiled libraries."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(root)} {hash_file(path)}\n".encode())
    return digest.hexdigest()


def _describe_ledger(ledger: Mapping[str, Any]) -> str:
    entries = ", ".join(f"{entry['name']} {entry['status']}" for entry in ledger["stages"])
    return entries or "no stage has begun"


def _newest_checkpoint(root: Path) -> str:
    """The name of a stage's newest checkpoint and the hash of its manifest."""
    steps = list_steps(root)
    if not steps:
        return "none"
    folder = step_folder(root, steps[-1])
    with contextlib.suppress(OSError):
        return f"{folder.name}, manifest {hash_file(folder / MANIFEST)}"
    return f"{folder.name}, without a manifest"


# --- model files --------------------------------------------------------------------------------------------


def _model_facts(config: Config) -> dict[str, str]:
    from delib_fast.models import local_model

    lora, zero_stage = config.model.lora, config.engine.zero_stage
    paths = {
        "model.path": config.model.path,
        "model.lora.path": lora.path if lora is not None else None,
        "tokenizer.path": config.tokenizer.path,
    }
    teachers = {teacher_key(stage): other_teacher(config, stage) for stage in config.stages}
    paths |= {key: teacher.path for key, teacher in teachers.items() if teacher is not None}
    facts = {}
    for key, path in paths.items():
        if path is None:
            continue
        # Of a GGUF file, the folder that it was converted to is compared. The cache folder is a machine's own.
        folder = path if key == "model.lora.path" else local_model(path, key=key, weights=key != "tokenizer.path")
        if not Path(folder).is_dir():
            facts[f"{key}: revision of {path}"] = _hub_revision(path)
            continue
        # At ZeRO 3 only rank 0 reads the weights: the others get theirs from it.
        files = model_files(Path(folder), weights_too=zero_stage < 3 or key in teachers)
        facts |= {f"{key}: sha256 of {name} in {path}": value for name, value in files.items()}
    return facts


def model_files(folder: Path, *, weights_too: bool) -> dict[str, str]:
    """The sha256 of each file directly inside a model folder, keyed by file name. Hidden files are excluded.

    Args:
        weights_too: whether to hash files of weights; otherwise the value of such a file is its size.
    """
    return {
        path.name: f"{path.stat().st_size} B" if path.suffix in _WEIGHTS and not weights_too else hash_file_once(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".")
    }


def _hub_revision(name: str) -> str:
    """The commit of a hub model in the local cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for file in ("config.json", "tokenizer.json"):
        with contextlib.suppress(HFValidationError):
            found = try_to_load_from_cache(name, file)
            if isinstance(found, str):
                return Path(found).parent.name
    return "not in the cache"
