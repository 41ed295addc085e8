"""A disk that fails at any system call: errors are reported, nothing that was saved is lost, and the run resumes."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from helpers.launch import ROOT

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> Path:
    """The compiled disk_faults.c."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and LD_PRELOAD")
    library = tmp_path_factory.mktemp("shim") / "disk_faults.so"
    command = [compiler, "-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", str(library), str(HERE / "disk_faults.c")]
    subprocess.run([*command, "-ldl"], check=True)
    return library


def test_every_call_of_a_save(shim, tmp_path, full):
    """Ledger, folder, lines, metrics, checkpoint: each call fails once, and from then on; and writes are short."""
    errors = [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, 0] if full else [errno.EIO, 0]
    done = subprocess.run(
        [sys.executable, str(HERE / "faulty_disk.py"), str(tmp_path), *map(str, errors)],
        env=os.environ | {"LD_PRELOAD": str(shim), "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    print(f"\n{done.stdout}")
    found = json.loads(done.stdout)
    assert found["outcomes"]["reported, the old state intact"] >= 90, "a checkpoint alone makes more than 20 calls"


@pytest.mark.full
def test_random_faults_in_whole_runs(shim, tmp_path, monkeypatch):
    """Each run meets a fault, and then resumes on a disk that works; the result is that of a run without faults."""
    from helpers.forking import ForkServer
    from helpers.run_facts import facts
    from helpers.tiny_run import short_run

    generator, outcomes = random.Random(0), Counter()
    monkeypatch.setenv("LD_PRELOAD", str(shim))
    with ForkServer() as server:

        def run(folder: Path, **env: str) -> tuple[int, str]:
            job = server.start("helpers.tiny_run:run", [folder / "run.yaml"], **env)
            (code,) = server.wait(job, timeout=300)
            return code, server.output(job)[0]

        def fresh(name: str) -> Path:
            folder = tmp_path / name
            path = short_run(folder)
            tree = yaml.safe_load(path.read_text())
            tree["log"]["tensorboard"] = False  # its own thread prints a traceback if it cannot write
            path.write_text(yaml.safe_dump(tree))
            return folder

        reference = fresh("reference")
        assert run(reference)[0] == 0
        expected = facts(reference / "run")
        for number in range(20):
            folder = fresh(str(number))
            error = generator.choice([errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, 0])
            settings = {
                "ROOT": str(folder / "run"),
                "OPS": "write,fsync,rename,open,mkdir,unlink" if error else "write",
                "AT": str(generator.randrange(1, 260)),
                "ERRNO": str(error),
                "LASTING": generator.choice("01"),
                "SERIAL": "1",
            }
            code, output = run(folder, **{f"FAULT_{name}": value for name, value in settings.items()})
            readable = code in (0, 1, 2) and "Traceback" not in output
            assert readable, f"{settings}: exit code {code}\n{output}"
            code_after, after = run(folder)
            assert code_after == 0, f"{settings}: it does not resume after\n{output}\n{after}"
            assert facts(folder / "run") == expected, f"{settings}: another result"
            outcomes["finished in spite of the fault" if code == 0 else "reported and resumed"] += 1
            shutil.rmtree(folder)
    print(f"\n{dict(outcomes)}")
