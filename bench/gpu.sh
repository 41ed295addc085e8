#!/usr/bin/env bash
# Check and measure everything that needs a GPU, in one call of at most 400 seconds, on a machine without network access.
#
#     bash bench/gpu.sh [--dry-run] [OUTDIR]          OUTDIR: bench/results/gpu
#
# The parts run in the order of what must be known first, each with its own limit, and the rest runs even if one fails.
# OUTDIR/summary.txt says which parts passed, failed, ran out of time or were skipped; OUTDIR/log.txt has all output;
# OUTDIR/cases.jsonl gets a line as soon as a case is measured, so that a limit loses one case at most. At its limit, or
# if this script gets SIGINT or SIGTERM, a part is interrupted as by Ctrl-C, so that it still writes its JSON, which is
# stored in bench/results/<device>/. Eight files hold everything.
# The torch of $PYTHON (default python3; torch 2.11 with Python 3.12 is enough) is used and never replaced. Missing
# packages come from $WHEELS (default wheels/, made by tools/gpu_wheels.sh), never from the network. What each part needs is
# imported before anything is measured; a part that lacks a package is skipped, and counts as not passed.
# --dry-run runs every part without a GPU: small cases, and the device checks inverted where a part has any.
# SECONDS_SCALE=2 doubles every limit. Exit status: the number of parts that did not pass.
set -uo pipefail
# A program that is started in the background of a script ignores SIGINT, and so would every part.
if [ -z "${SIGNALS_ARE_DEFAULT:-}" ] && env --default-signal=INT true 2>/dev/null; then
  SIGNALS_ARE_DEFAULT=1 exec env --default-signal=INT,TERM bash "$0" "$@"
fi
cd "$(dirname "$0")/.."
dry=0; if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
out=${1:-bench/results/gpu} python=${PYTHON:-python3} wheels=${WHEELS:-wheels} scale=${SECONDS_SCALE:-1} budget=${BUDGET:-400}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
summary=$out/summary.txt log=$out/log.txt failures=0 interrupted=0 child=0
: >"$summary"; : >"$log"; : >"$out/cases.jsonl"
export python out TORCHINDUCTOR_COMPILE_THREADS=8 DELIB_FAST_CASES=$out/cases.jsonl PYTHONUNBUFFERED=1
set -m  # without job control, bash makes background commands ignore SIGINT, and a part could not be interrupted
trap 'interrupted=1; [ "$child" -gt 0 ] && kill -INT "$child" 2>/dev/null' INT TERM

say() { echo "$*" | tee -a "$summary"; }
declare -A lacks=()
part() {  # part NAME SECONDS COMMAND...
  local name=$1 limit=$(($2 * scale)) begin=$SECONDS status=0 size; shift 2
  local left=$((budget * scale - SECONDS))
  [ "$limit" -gt "$left" ] && limit=$left
  [ "$interrupted" = 1 ] && { say "skipped   $name (interrupted)"; return 1; }
  [ -n "${lacks[$name]:-}" ] && { say "skipped   $name (cannot import ${lacks[$name]})"; failures=$((failures + 1)); return 1; }
  [ "$limit" -lt 5 ] && { say "skipped   $name (the budget of $((budget * scale)) s is used up)"; return 1; }
  echo "=== $name" >>"$log"; size=$(stat -c %s "$log")
  timeout --signal=INT --kill-after=10 "$limit" "$@" >>"$log" 2>&1 &
  child=$!
  while wait "$child"; status=$?; kill -0 "$child" 2>/dev/null; do :; done  # a signal ends wait, not the part
  child=0
  case $status in
    0) say "passed    $name ($((SECONDS - begin)) s)" ;;
    124 | 137) say "timed out $name (limit $limit s)"; failures=$((failures + 1)) ;;
    *) say "FAILED    $name (exit $status; $(tail -c "+$((size + 1))" "$log" | tail -n 1 | cut -c 1-120))"; failures=$((failures + 1)) ;;
  esac
  tail -c "+$((size + 1))" "$log" | grep -E '^(passed|FAILED)  |^ceiling' | sed 's/^/          /' | tee -a "$summary"
  return $status
}
missing() {  # the modules that cannot be imported, of those given
  "$python" - "$@" <<'PY'
import importlib.util, sys
print(*[name for name in sys.argv[1:] if importlib.util.find_spec(name) is None])
PY
}

install() {  # install MODULE...: the wheel of each, if there is one; status 0 if one was installed
  local name file status=1
  for name in "$@"; do  # the names of wheels use underscores
    case $name in cpuinfo) name=py_cpuinfo ;; xdist) name=pytest_xdist ;; yaml) name=pyyaml ;; esac
    file=$(find "$wheels" -name '*.whl' 2>/dev/null | grep -iE "/$name-[0-9]" | head -n 1)
    if [ -n "$file" ]; then "$python" -m pip install -q --no-index --no-deps --disable-pip-version-check "$file" >>"$log" 2>&1 && status=0; fi
  done
  return $status
}
cannot_import() {  # lines "PART MODULE": the first module that the imports of each part lack
  "$python" - 2>>"$log" <<'PY'
import importlib, sys
sys.path[:0] = [".", "bench", "tests"]
bench = ["pytest", "pytest_benchmark.plugin", "harness", "delib_fast.ops"]
parts = {
    "smoke": ["numpy", "pytest", "delib_fast.engine", "delib_fast.models", "step_cases"],
    "loss": bench,
    "attention": bench,
    "step": [*bench, "step_cases", "peft", "datasets", "delib_fast.engine"],
    "roofline": [*bench, "step_cases", "delib_fast.engine"],
    "tests": ["pytest", "xdist.workermanage", "delib_fast.engine", "delib_fast.models", "peft"],
    "peers": bench,
}
for part, modules in parts.items():
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # noqa: BLE001 - whatever a broken installation raises
            name = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
            print(part, name or f"{module}:{type(error).__name__}", flush=True)
            break
PY
}

# --- what is missing, before anything is measured
"$python" -c 'import torch' 2>/dev/null || { say "FAILED    $python cannot import torch: set PYTHON"; exit 1; }
needed="triton numpy yaml pytest pluggy iniconfig pytest_benchmark cpuinfo xdist execnet pydantic pydantic_core
  annotated_types typing_inspection hjson deepspeed transformers peft datasets dill multiprocess pyarrow"
peers="liger_kernel cut_cross_entropy trl"
absent=$(missing $needed $peers)
if [ -n "$absent" ]; then
  say "missing   $absent"
  if [ -n "$(find "$wheels" -name '*.whl' 2>/dev/null)" ]; then
    install $absent
  else
    say "          no wheels in $wheels: make them with tools/gpu_wheels.sh, and set WHEELS"
  fi
  absent=$(missing $needed); say "installed; still missing: ${absent:-nothing} (peers: $(missing $peers))"
fi
for _ in 1 2 3 4; do  # an import names one missing module at a time
  lacks=()
  while read -r name module; do lacks[$name]=$module; done < <(cannot_import)
  [ "${#lacks[@]}" -gt 0 ] && install "${lacks[@]}" || break
done
for name in smoke loss attention step roofline tests peers; do
  [ -z "${lacks[$name]:-}" ] || say "          $name will be skipped: it cannot import ${lacks[$name]}"
done
library=$(find "$wheels" -name libdelib_fast_cuda.so 2>/dev/null | head -n 1)
if [ -n "$library" ] && [ "$dry" = 0 ]; then
  cp "$library" delib_fast/
elif [ ! -f delib_fast/libdelib_fast_cuda.so ]; then
  part build 60 env DELIB_FAST_CPP=0 DELIB_FAST_CUDA=1 "$python" setup.py build_ext --inplace
fi

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  gpu=1; nvidia-smi --query-gpu=name,driver_version,clocks.sm,memory.total --format=csv >>"$log" 2>&1
else
  gpu=0; say "NO GPU: these are small cases on the CPU; they say nothing about GPUs"
  [ "$dry" = 1 ] || { say "          give --dry-run to run them all the same"; exit 1; }
fi

# --- the parts
ceilings() {
  "$python" - <<'PY'
import sys, time
import torch
device = "cuda" if torch.cuda.is_available() else "cpu"
wait = torch.cuda.synchronize if device == "cuda" else lambda: None
def best(call):
    call(); times = []
    for _ in range(5):
        wait(); began = time.perf_counter(); call(); wait(); times.append(time.perf_counter() - began)
    return min(times)
n = 8192 if device == "cuda" else 512
a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
print(sys.version.split()[0], torch.__version__, torch.version.cuda, torch.cuda.get_device_name() if device == "cuda" else "no GPU")
print(f"ceiling   copy {4 * a.numel() / best(lambda: b.copy_(a)) / 1e9:.0f} GB/s, bf16 GEMM of {n}: {2 * n**3 / best(lambda: a @ b) / 1e12:.1f} TFLOP/s")
PY
}
bench() {  # bench NAME FILE [pytest arguments]
  local name=$1 file=$2; shift 2
  "$python" -m pytest "bench/bench_$file.py" -v -rA -p no:cacheprovider --benchmark-json "$out/$name.json" "$@"
}
export -f ceilings bench

part ceilings 20 bash -c ceilings
part smoke ${SMOKE_SECONDS:-$((gpu ? 45 : 300))} "$python" bench/gpu_smoke.py
if [ "$gpu" = 1 ]; then
  part loss 60 bash -c 'bench loss linear_cross_entropy -k "4096-151936 and bfloat16 and (100 or 50) and (ours-cuda or ours-triton or liger or cut)"'
  part attention 40 bash -c 'bench attention varlen_attention -k "bench_varlen_attention and full and not sdpa_dense"'
  part step 90 bash -c 'bench step step -k "(1.7b-full or 8b-lora64) and short and ours"'
  part roofline 45 bash -c 'bench roofline roofline -k "1.7b-full and none"'
  part tests 60 "$python" -m pytest tests/ops tests/models -q -p no:cacheprovider -m gpu -n 8 --maxfail=10
  part peers 120 bash -c 'bench peers linear_cross_entropy -k "4096-151936 and bfloat16 and 100 and (compile or eager-compact or trl)"'
else
  part loss 120 bash -c 'bench loss linear_cross_entropy --quick -k "bfloat16 and 50"'
  part attention 120 bash -c 'bench attention varlen_attention --quick -k "bench_varlen_attention and full"'
  part step 120 bash -c 'bench step step --quick -k ours'
  part roofline 120 bash -c 'bench roofline roofline --quick'
  part tests 300 "$python" -m pytest tests/ops/test_gpu_dispatch.py -q -p no:cacheprovider -n 2
fi
if [ "$gpu" = 1 ] && compgen -G "$out/*.json" >/dev/null; then part record 15 "$python" bench/report.py --record "$out"/*.json; fi
[ "$interrupted" = 0 ] || say "interrupted; what was measured is kept"
say "$failures parts did not pass; log, JSON and $(wc -l <"$out/cases.jsonl") cases are in $out"
[ "$interrupted" = 0 ] || exit 130
exit "$failures"
