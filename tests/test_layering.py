"""Which package may import which. The source is parsed, so imports inside functions and for types count too."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "delib_fast"

# Every module and package directly in delib_fast, and what it may import besides itself: all that ARCHITECTURE.md draws
# to its left. A new one must be added here.
PRINTING = {"redaction", "terminal"}
BASE = PRINTING | {"files", "digests", "config", "ops"}
DATA = BASE | {"data", "checkpoint"}
MODELS = DATA | {"models"}
ENGINE = MODELS | {"engine"}
TRAINING = ENGINE | {"training"}
ALLOWED: dict[str, set[str]] = {
    "__init__": {"integrations"},  # `delib_fast.apply`, imported when it is first used
    "files": set(),
    "digests": {"files"},
    "redaction": set(),
    "terminal": {"redaction"},
    "config": {"files", "redaction"},
    "ops": set(),
    "data": BASE,
    "checkpoint": {"files", "digests"},
    "models": DATA - {"checkpoint"},
    "engine": MODELS,
    "training": ENGINE,
    "train": TRAINING,
    "stages": TRAINING,
    "datagen": MODELS,
    "integrations": MODELS,
    "evals": TRAINING | {"datagen"},
    "preview": TRAINING,
    "reports": TRAINING | {"datagen", "evals", "preview"},
    "study": TRAINING | {"datagen", "evals", "preview", "reports"},
    "rounds": TRAINING | {"datagen", "evals", "preview", "reports"},
    "cli": TRAINING | {"train", "stages", "datagen", "evals", "preview", "reports", "study", "rounds"},
}
# Libraries that only some packages may import.
ONLY_IN = {"transformers": {"models", "integrations"}, "deepspeed": {"engine"}, "peft": {"models", "integrations"}}
OPS_MAY_IMPORT = {"torch", "triton", "flash_attn", "flash_attn_interface", "delib_fast"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def top_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """Dotted names imported anywhere in the file, also inside functions and under TYPE_CHECKING."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it in full"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_package_is_listed():
    tops = {top_of(path) for path in modules()}
    assert tops == ALLOWED.keys()


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    top = top_of(path)
    allowed = ALLOWED[top] | {top}
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "delib_fast" and len(parts) > 1 and parts[1] not in ("_C", "__version__"):
            assert parts[1] in allowed, f"{path.relative_to(PACKAGE)} imports {name}"
        if parts[0] in ONLY_IN:
            assert top in ONLY_IN[parts[0]], f"{path.relative_to(PACKAGE)} imports {name}"


def test_no_package_is_in_a_cycle():
    graph = {
        top: {
            n.split(".")[1] for p in modules() if top_of(p) == top for n in imports_of(p) if n.startswith("delib_fast.")
        }
        - {top}
        for top in ALLOWED
    }
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_no_module_is_in_a_cycle():
    """Imports for types count. The __init__ of a package, which re-exports its modules, does not."""
    names = {dotted(path): path for path in modules()}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        if path.name != "__init__.py":
            graph[name] = {n for n in imports_of(path) if n in names and names[n].name != "__init__.py"} - {name}
    TopologicalSorter(graph).prepare()


def test_data_is_read_then_encoded_then_packed():
    """In `data`, an earlier package does not import a later one."""
    order = ["read", "encode", "pack"]
    for path in modules():
        parts = path.relative_to(PACKAGE).parts
        if parts[0] == "data" and len(parts) == 3:
            later = tuple(f"delib_fast.data.{name}" for name in order[order.index(parts[1]) + 1 :])
            assert not [name for name in imports_of(path) if later and name.startswith(later)], path


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_ops_need_only_torch(path):
    roots = {name.split(".")[0] for name in imports_of(path)}
    unexpected = roots - OPS_MAY_IMPORT - set(sys.stdlib_module_names)
    assert not unexpected


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("delib_fast", ["torch"]),
        ("delib_fast.config.load", ["torch", "transformers", "deepspeed"]),
        ("delib_fast.training.run_directory", ["deepspeed", "transformers", "torch"]),
        ("delib_fast.checkpoint.writer", ["deepspeed", "transformers"]),
        ("delib_fast.cli.main", ["deepspeed", "transformers", "torch"]),
        ("delib_fast.data", ["deepspeed", "transformers"]),
        ("delib_fast.ops", ["deepspeed", "transformers", "pydantic"]),
        ("delib_fast.training.run", ["deepspeed", "peft"]),
    ],
)
def test_import_is_light(module, absent):
    code = f"import sys, {module}; print(*(n for n in {absent} if n in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not loaded


def test_no_module_shadows_a_package():
    """train.py runs as a script, so a module with the name of an installed package would be imported instead of it."""
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


def test_files_have_at_most_400_lines():
    """A longer file must say why in its docstring, with the words "longer than"."""
    for path in [*modules(), *sorted((PACKAGE.parent / "bench").rglob("*.py"))]:
        text = path.read_text()
        if text.count("\n") > 400:
            lines = text.count("\n")
            assert "longer than" in (ast.get_docstring(ast.parse(text)) or ""), f"{path} has {lines} lines"


def test_the_names_of_test_modules_differ():
    """pytest imports a test module by its file name, so it cannot collect two of one name from two folders."""
    seen: dict[str, Path] = {}
    for path in sorted(Path(__file__).parent.rglob("test_*.py")):
        assert path.name not in seen, f"rename {path} or {seen[path.name]}: pytest cannot collect both"
        seen[path.name] = path


def test_train_py_is_short():
    assert (PACKAGE / "train.py").read_text().count("\n") <= 130


def test_only_files_py_calls_fsync_and_flock():
    for path in modules():
        if path.name != "files.py":
            text = path.read_text()
            for word in ("os.fsync", "flock("):
                assert word not in text, f"{path.relative_to(PACKAGE)} uses {word}: use delib_fast.files"
