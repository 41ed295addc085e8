"""A build that was killed does not block later ones, and nothing starts DeepSpeed except `engine.Ranks`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.launch import ROOT


def builder(begun):
    from torch.utils.file_baton import FileBaton

    from delib_fast.engine.jit_builds import guard_builds

    class Builder:
        """Builds as `torch.utils.cpp_extension.load` does, up to its lock."""

        name = "some_op"

        def jit_load(self, verbose=True):
            folder = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / self.name
            folder.mkdir(exist_ok=True)
            begun.append(folder)
            baton = FileBaton(str(folder / "lock"))
            assert baton.try_acquire(), "the lock of a killed build is still there: torch would wait forever"
            if len(begun) == 1:
                raise KeyboardInterrupt  # as after SIGKILL, the lock is not released
            baton.release()
            return "the op"

    guard_builds(Builder)
    return Builder()


def test_a_killed_build_does_not_block_the_next(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("DELIB_FAST_CACHE", str(tmp_path))
    begun: list[Path] = []
    with pytest.raises(KeyboardInterrupt):
        builder(begun).jit_load()
    assert (begun[0] / "lock").exists()
    assert builder(begun).jit_load() == "the op"
    assert begun[0] == begun[1]
    assert begun[0].is_relative_to(tmp_path / "torch_extensions")
    assert "TORCH_EXTENSIONS_DIR" not in os.environ


def test_a_folder_that_the_user_chose_is_kept(monkeypatch, tmp_path):
    """Another program may build there, so its lock is not deleted."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    begun: list[Path] = []
    with pytest.raises(KeyboardInterrupt):
        builder(begun).jit_load()
    with pytest.raises(AssertionError, match="still there"):
        builder(begun).jit_load()


def test_deepspeed_builds_are_guarded():
    from delib_fast.engine.import_deepspeed import deepspeed

    assert deepspeed.ops.op_builder.builder.OpBuilder.jit_load.__module__ == "delib_fast.engine.jit_builds"
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


def test_only_ranks_start_deepspeed():
    """`deepspeed.init_distributed` compiles a shared-memory op unless the engine has turned that off before."""
    folders = (ROOT / name for name in ("delib_fast", "tests", "bench", "examples", "tools"))
    files = [path for folder in folders for path in folder.rglob("*.py")]
    calls = [str(path.relative_to(ROOT)) for path in files if "deepspeed.init_distributed(" in path.read_text()]
    assert calls == ["delib_fast/engine/ranks.py", "tests/engine/test_builds.py"]


def test_a_stale_lock_of_the_font_list_is_removed(monkeypatch, tmp_path):
    """matplotlib waits 5 s for the lock of a killed process, and then warns that it cannot write its list."""
    (tmp_path / "matplotlib").mkdir()
    stale = tmp_path / "matplotlib" / "fontlist-v390.json.matplotlib-lock"
    stale.touch()
    code = (
        "from delib_fast.reports.plots import pyplot\n"
        "plt = pyplot('this test draws', 'test')\n"
        "import matplotlib\n"
        "print(matplotlib.get_cachedir())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "MPLCONFIGDIR"} | {"DELIB_FAST_CACHE": str(tmp_path)}
    output = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, text=True, capture_output=True)
    assert output.stdout.split() == [str(tmp_path / "matplotlib")], output.stderr
    assert not stale.exists()
    assert list((tmp_path / "matplotlib").glob("fontlist-*.json"))
