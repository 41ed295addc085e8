#!/usr/bin/env bash
# From a spec and an endpoint to an evaluation table in one command: generate rows and documents, then run MSM and AFT.
#
#   bash examples/datagen/end_to_end.sh                                   # a small teacher, trained and served locally
#   OPENAI_API_KEY=… BASE_URL=https://…/v1 MODEL=NAME SPEC=spec.md PROMPTS=prompts.jsonl \
#     bash examples/datagen/end_to_end.sh                                 # a real endpoint
#
# After an interruption, run it again: every step resumes. BIN is the folder with the commands of the environment.
set -euo pipefail
cd "$(dirname "$0")/../.."
BIN=${BIN:-.venv/bin}
OUT=${OUT:-runs/end_to_end}
HERE=examples/datagen
RANKS=${RANKS:-1}
server=""
# Stop the server whenever this script exits.
trap '[ -z "$server" ] || kill "$server" 2>/dev/null || true' EXIT
mkdir -p "$OUT"

free_port() { "$BIN/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
train() { "$BIN/deepspeed" --num_accelerators "$RANKS" --master_port "$(free_port)" delib_fast/train.py "$@"; }

if [ -z "${BASE_URL:-}" ]; then
  # No endpoint: train a small model on the answer formats and serve it locally.
  MODEL=$OUT/teacher/model
  SPEC=$HERE/short_spec.md PROMPTS=$HERE/prompts.jsonl
  ROW_SETTINGS=(--config $HERE/local.yaml --set "generator.model=$MODEL")
  DOCUMENT_SETTINGS=(--config $HERE/local_documents.yaml --set "generator.model=$MODEL" --tokens "${TOKENS:-6k}")
  if [ ! -d "$MODEL" ]; then
    "$BIN/python" $HERE/make_lessons.py "$OUT/lessons.jsonl"
    train --config $HERE/teacher.yaml --set "run_dir=$OUT/teacher" --set "data.lessons.path=$OUT/lessons.jsonl"
  fi
  # `transformers serve` samples only if generation_config.json says so; otherwise it decodes greedily at every temperature.
  "$BIN/python" - "$MODEL/generation_config.json" <<'PY'
import json, pathlib, sys
file = pathlib.Path(sys.argv[1])
file.write_text(json.dumps({**json.loads(file.read_text()), "do_sample": True}, indent=2))
PY
  port=$(free_port)
  BASE_URL=http://127.0.0.1:$port/v1
  HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$BIN/transformers" serve "$MODEL" --host 127.0.0.1 --port "$port" --device cpu > "$OUT/serve.log" 2>&1 &
  server=$!
  echo "waiting for transformers serve on port $port"
  for _ in $(seq 120); do
    if "$BIN/python" -c "import urllib.request as u; u.urlopen('http://127.0.0.1:$port/health', timeout=2)" 2>/dev/null; then break; fi
    kill -0 "$server" || { tail -5 "$OUT/serve.log"; exit 1; }
    sleep 1
  done
else
  ROW_SETTINGS=(--model "${MODEL:?the name of the model at BASE_URL}" -n "${SAMPLES:-4}" --best-of "${BEST_OF:-1}")
  DOCUMENT_SETTINGS=(--model "$MODEL" --tokens "${TOKENS:-1M}")
fi

"$BIN/delib-fast" deliberate "${SPEC:?}" "${PROMPTS:?}" -o "$OUT/rows" --base-url "$BASE_URL" --also-no-cot "${ROW_SETTINGS[@]}"
"$BIN/delib-fast" document "$SPEC" -o "$OUT/documents" --base-url "$BASE_URL" "${DOCUMENT_SETTINGS[@]}"
for made in rows documents; do "$BIN/delib-fast" data-report "$OUT/$made" --spec "$SPEC"; done
[ -z "$server" ] || { kill "$server"; wait "$server" 2>/dev/null || true; server=""; }

train --config "${CONFIG:-$HERE/end_to_end.yaml}" --set "run_dir=$OUT/run" \
  --set "data.documents.path=$OUT/documents/documents.jsonl" --set "data.rows.path=$OUT/rows/rows.jsonl"
"$BIN/delib-fast" eval "$OUT/run"
