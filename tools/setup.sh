#!/usr/bin/env bash
# Create the virtual environment $VENV with torch and delib_fast. If $PYTHON already has torch, that torch is used.
set -euo pipefail
python=${PYTHON:-python3} venv=${VENV:-.venv} torch=${TORCH:-torch==2.13.0}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "delib_fast needs Python 3.11 or newer; $("$python" --version) is too old. Try: make PYTHON=python3.12" >&2; exit 2; }

# An environment without a working pip was left by a set-up that was killed.
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  rm -rf "$venv"
  if "$python" -c 'import torch' 2>/dev/null; then
    echo "using the torch that $python has"
    "$python" -m venv --system-site-packages "$venv"
  else
    "$python" -m venv "$venv"
  fi
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }
quietly() {  # show the output of a command only if it fails
  local log; log=$(mktemp)
  if ! "$@" >"$log" 2>&1; then cat "$log" >&2; rm -f "$log"; return 1; fi
  rm -f "$log"
}

if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
  echo "installing $torch"
  quietly pip install "$torch"
fi
# Pin torch, so that no later install replaces it.
pins=$(mktemp); trap 'rm -f "$pins"' EXIT
"$venv/bin/python" - >"$pins" <<'PY'
import importlib.metadata as metadata
print("torch==" + metadata.version("torch"))
PY
echo "installing delib_fast and its dependencies, with torch $(sed 's/torch==//' "$pins")"
quietly pip install -c "$pins" 'setuptools>=77' wheel 'pybind11>=2.12' ninja packaging numpy py-cpuinfo
# DeepSpeed is a source package whose build imports torch: no build isolation.
quietly pip install -c "$pins" --no-build-isolation deepspeed
quietly pip install -c "$pins" --no-build-isolation -e '.[dev]'
"$venv/bin/delib-fast" env --brief
