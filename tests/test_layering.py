"""The arrows of the design: who may import whom. Read from the source, so lazy imports count too."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "delib_fast"

# Each may import itself and what stands before it.
ORDER = ("config", "ops", "data", "losses", "models", "engine", "train", "stages", "evals", "looking", "study", "cli")
# Modules beside the folders of the design, and the layer each belongs to.
LAYER = {
    "config_file": "config",
    "config_base": "config",
    "config_model": "config",
    "bookkeeping": "train",
    "corpus": "train",
    "progress": "train",
    "run_directory": "train",
    "handover": "train",
    "memory": "train",
    "environment": "train",
    "slurm": "train",
    "throughput": "train",
    "trackers": "train",
}
ALLOWED = {
    "deliberate": {"config", "data", "models", "deliberate"},
    "integrations": {"config", "ops", "data", "losses", "models", "integrations"},
}
# Libraries that only some layers may touch.
ONLY_IN = {"transformers": {"models", "integrations"}, "deepspeed": {"engine"}, "peft": {"models", "integrations"}}
OPS_MAY_IMPORT = {"torch", "triton", "flash_attn", "flash_attn_interface", "delib_fast"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return LAYER.get(first, first)


def imports_of(path: Path) -> set[str]:
    """Dotted names imported anywhere in the file, those under TYPE_CHECKING left out."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    only_types: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            only_types |= set(ast.walk(node))
    for node in ast.walk(tree):
        if node in only_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it in full"
            found.add(node.module or "")
            if node.module == "delib_fast":
                found |= {f"delib_fast.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_one_way(path):
    layer = layer_of(path)
    if layer == "__init__":
        return
    allowed = ALLOWED.get(layer) or set(ORDER[: ORDER.index(layer) + 1])
    if layer == "cli":
        allowed |= {"deliberate"}
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "delib_fast" and len(parts) > 1 and parts[1] not in ("_C", "__version__"):
            target = LAYER.get(parts[1], parts[1])
            assert target in allowed, f"{path.name} ({layer}) imports {name}"
        if parts[0] in ONLY_IN:
            assert layer in ONLY_IN[parts[0]], f"{path.name} ({layer}) imports {name}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_ops_need_only_torch(path):
    roots = {name.split(".")[0] for name in imports_of(path)}
    strangers = roots - OPS_MAY_IMPORT - set(sys.stdlib_module_names)
    assert not strangers


def test_no_module_shadows_a_package():
    """train.py runs as a script: a module here named like an installed package would be found in its place."""
    names = {p.name.removesuffix(".py") for p in PACKAGE.iterdir() if p.suffix == ".py" or p.is_dir()}
    assert not names & {
        "datasets",
        "types",
        "triton",
        "inspect",
        "tokenizers",
        "transformers",
        "torch",
        "logging",
        "typing",
        "queue",
        "random",
        "profile",
        "platform",
        "test",
        "code",
    }


def test_files_are_of_a_size_to_read():
    """400 lines a file. What is longer says why in its docstring, with the words 'longer than'."""
    for path in [*modules(), *sorted((PACKAGE.parent / "bench").rglob("*.py"))]:
        text = path.read_text()
        if text.count("\n") > 400:
            lines = text.count("\n")
            assert "longer than" in (ast.get_docstring(ast.parse(text)) or ""), f"{path} has {lines} lines"
