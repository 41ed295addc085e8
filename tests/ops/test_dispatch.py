"""The choice of a backend, and the ops without the compiled module."""

import logging
import os
import subprocess
import sys

import pytest

from delib_fast.ops import _dispatch
from delib_fast.ops._dispatch import Backend, BackendUnavailable, choose

CAN = Backend("can", run=lambda: None, why_not=lambda *args: None)
OTHER = Backend("other", run=lambda: None, why_not=lambda *args: None)
CANNOT = Backend("cannot", run=lambda: None, why_not=lambda *args: "wrong device")


def test_auto_selects_the_first_available_backend_and_logs_it_once(caplog, monkeypatch):
    monkeypatch.setattr(_dispatch, "_logged", set())
    with caplog.at_level(logging.INFO, "delib_fast.ops"):
        assert choose("op", (CANNOT, CAN, OTHER), "auto") is CAN
        assert choose("op", (CANNOT, CAN, OTHER), "auto") is CAN
    assert [record.getMessage() for record in caplog.records] == ["op runs on can (cannot: wrong device)"]


def test_a_requested_backend_is_used_or_raises():
    assert choose("op", (CAN, OTHER), "other") is OTHER
    with pytest.raises(BackendUnavailable) as error:
        choose("op", (CANNOT, CAN), "cannot")
    expected = "op: backend='cannot' cannot run these inputs (cannot: wrong device); these backends can: can"
    assert str(error.value) == expected
    with pytest.raises(ValueError, match="backend='cna' does not exist; choose from auto, cannot, can"):
        choose("op", (CANNOT, CAN), "cna")


def test_no_available_backend_raises():
    with pytest.raises(BackendUnavailable, match=r"no backend can run these inputs \(cannot: wrong device\)$"):
        choose("op", (CANNOT,), "auto")


def test_without_the_compiled_module_the_reference_runs_with_a_warning():
    program = """
import sys
sys.modules["delib_fast._C"] = None
import torch
from delib_fast.ops import BackendUnavailable, linear_cross_entropy
hidden = torch.randn(5, 4, requires_grad=True)
inputs = (hidden, torch.randn(9, 4, requires_grad=True), torch.arange(5))
linear_cross_entropy(*inputs).loss_sum.backward()
assert hidden.grad.abs().sum() > 0
try:
    linear_cross_entropy(*inputs, backend="cpu")
except BackendUnavailable as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "cpu: delib_fast._C is not built; install a C++ compiler" in done.stdout
    assert "linear_cross_entropy runs on reference" in done.stderr


def test_a_compiled_module_of_another_version_raises():
    program = """
import sys, types
sys.modules["delib_fast._C"] = types.ModuleType("delib_fast._C")
try:
    import delib_fast.ops
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == (
        "delib_fast._C was built from another version of delib_fast; rebuild it: "
        "pip install --no-build-isolation -e .\n"
    )
