#!/usr/bin/env bash
# Run the build, the GPU tests and the benches in under 9 minutes, on a GPU machine without network access.
#
#     bash bench/gpu.sh [OUTDIR]          OUTDIR: bench/results/gpu
#
# Each part has its own time limit and its own log, and the other parts run even if one fails. OUTDIR/summary.txt lists
# which parts passed, failed or ran out of time; the figures are stored in bench/results/<device>/.
# The torch of $PYTHON (default python3; torch 2.11 with Python 3.12 is enough) is used and never replaced. Missing
# packages are installed from $WHEELS (default wheels/, which git ignores), never from the network. Without a GPU, the
# same parts run on small cases, and the summary says so.
# SECONDS_SCALE=2 doubles every limit. Exit status: the number of parts that did not pass.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results/gpu} python=${PYTHON:-python3} wheels=${WHEELS:-wheels} scale=${SECONDS_SCALE:-1}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
summary=$out/summary.txt failures=0
: >"$summary"

say() { echo "$*" | tee -a "$summary"; }
part() {  # part NAME SECONDS COMMAND...
  local name=$1 limit=$(($2 * scale)) begin=$SECONDS status; shift 2
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1; status=$?
  case $status in
    0) say "passed    $name ($((SECONDS - begin)) s)" ;;
    124 | 137) say "timed out $name (limit $limit s; $out/$name.log)"; failures=$((failures + 1)) ;;
    *) say "FAILED    $name (exit $status; $(tail -n 1 "$out/$name.log" | cut -c 1-120))"; failures=$((failures + 1)) ;;
  esac
  return $status
}

# Installs the packages that the build and the tests need and that are missing. --no-deps: pip must not replace torch.
install_missing() {
  local name missing=()
  for name in setuptools wheel pybind11 pytest pytest_benchmark cpuinfo; do
    "$python" -c "import $name" 2>/dev/null || missing+=("${name/cpuinfo/py-cpuinfo}")
  done
  [ ${#missing[@]} -eq 0 ] && { echo "nothing is missing"; return 0; }
  echo "missing: ${missing[*]}"
  [ -d "$wheels" ] || { echo "the folder $wheels does not exist: set WHEELS=/folder/with/wheels of ${missing[*]}"; return 1; }
  "$python" -m pip install --no-index --find-links "$wheels" --no-deps "${missing[@]/_/-}" pluggy iniconfig packaging
}

build() { DELIB_FAST_CUDA=${DELIB_FAST_CUDA:-auto} MAX_JOBS=8 "$python" setup.py build_ext --inplace; }

environment() {
  "$python" - <<'PY'
import sys
import torch
from delib_fast.ops.linear_cross_entropy import BACKENDS
device = "cuda" if torch.cuda.is_available() else "cpu"
print(sys.version, torch.__version__, torch.version.cuda, torch.cuda.get_device_name() if device == "cuda" else "no GPU")
tensor = torch.zeros(2, 64, dtype=torch.bfloat16, device=device)
for backend in BACKENDS:
    print(f"linear_cross_entropy {backend.name}: {backend.why_not(tensor, tensor) or 'runs'}")
PY
}

bench() {  # bench NAME PART [pytest arguments]
  local name=$1 part=$2; shift 2
  "$python" -m pytest "bench/bench_$name.py" -q -p no:cacheprovider --benchmark-json "$out/${name}_$part.json" "$@"
}
has() { "$python" -c "import $1" 2>/dev/null; }
export -f install_missing build environment bench
export python wheels out

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  quick=() tests=()
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,memory.total --format=csv >"$out/nvidia-smi.csv" 2>&1
else
  say "NO GPU: these are small cases on the CPU; they say nothing about GPUs"
  quick=(--quick) tests=(-k "cuda or dispatch")
fi

part install 20 bash -c install_missing
if [ "${BUILD:-1}" = 1 ]; then part build 110 bash -c build; else say "skipped   build (BUILD=0)"; fi
part environment 15 bash -c environment && sed 's/^/          /' "$out/environment.log" | tee -a "$summary"
# Not the slow cases (inductor, Triton's interpreter), which do not depend on the GPU.
part tests 100 "$python" -m pytest tests/ops -q -p no:cacheprovider -m "not slow" ${tests[@]+"${tests[@]}"}
if [ ${#quick[@]} -gt 0 ]; then
  part bench_loss 70 bash -c 'bench linear_cross_entropy quick --quick'
  part bench_attention 60 bash -c 'bench varlen_attention quick --quick'
  layers=--quick
else  # a part writes its JSON at its end, so several small parts lose less when one runs out of time
  part bench_loss_100 65 bash -c 'bench linear_cross_entropy 100 -k "4096-151936 and bfloat16 and 100"'
  part bench_loss_50 60 bash -c 'bench linear_cross_entropy 50 -k "4096-151936 and bfloat16 and 50"'
  part bench_attention 50 bash -c 'bench varlen_attention all'
  layers=-k=4096
fi
if has transformers; then part bench_layers 50 bash -c "bench layers all $layers"; else say "skipped   bench_layers (transformers is not installed)"; fi
if has deepspeed && has transformers; then
  part bench_step 55 bash -c "bench step all ${quick[*]-}"
else
  say "skipped   bench_step (deepspeed or transformers is not installed)"
fi
if compgen -G "$out/*.json" >/dev/null; then part record 10 "$python" bench/report.py --record "$out"/*.json; fi
say "$failures parts did not pass; logs and JSON are in $out"
exit "$failures"
