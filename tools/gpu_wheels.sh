#!/usr/bin/env bash
# Make the folder that bench/gpu.sh installs from on a GPU machine without network access.
#
#     bash tools/gpu_wheels.sh [FOLDER]      FOLDER: wheels; PYTHON_VERSION=3.12
#
# FOLDER/part-1, part-2, … hold at most PART_MIB (64) each, so that each can be carried alone: wheels for Linux x86-64 of the
# packages that a machine with torch, triton, transformers and peft may lack, DeepSpeed as a pure Python wheel (nothing of
# it is compiled here), and libdelib_fast_cuda.so, which needs neither torch nor Python, if nvcc is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-wheels} version=${PYTHON_VERSION:-3.12} python=${PYTHON:-python3} part_mib=${PART_MIB:-64}
rm -rf "$folder"; mkdir -p "$folder"; folder=$(cd "$folder" && pwd)
scratch=$(mktemp -d); trap 'rm -rf "$scratch"' EXIT

get() {
  "$python" -m pip download -q --disable-pip-version-check --dest "$scratch" --only-binary=:all: \
    --implementation cp --python-version "$version" --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 --platform any "$@"
}
get pydantic hjson  # with what they depend on
get --no-deps datasets dill multiprocess liger-kernel cut-cross-entropy trl py-cpuinfo pytest pytest-benchmark \
  pytest-xdist pytest-timeout execnet pluggy iniconfig
"$python" -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir "$scratch" "${DEEPSPEED:-deepspeed}"
rm -f "$scratch"/typing_extensions-*  # torch has it
if nvcc=$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null); then
  "$nvcc" -O3 -std=c++17 -ftz=true -Icsrc -Xcompiler=-fPIC -shared -cudart=static -gencode=arch=compute_80,code=sm_80 \
    -gencode=arch=compute_90a,code=sm_90a -gencode=arch=compute_80,code=compute_80 $(find csrc -name '*.cu') \
    -o "$scratch/libdelib_fast_cuda.so"
else
  echo "nvcc was not found: libdelib_fast_cuda.so is not included, and bench/gpu.sh compiles it there" >&2
fi
part=1 used=0
for file in $(ls -S "$scratch"); do
  size=$(stat -c %s "$scratch/$file")
  [ "$size" -le $((part_mib << 20)) ] || { echo "$file is larger than $part_mib MiB: raise PART_MIB" >&2; exit 1; }
  if [ $((used + size)) -gt $((part_mib << 20)) ]; then part=$((part + 1)) used=0; fi
  mkdir -p "$folder/part-$part"; mv "$scratch/$file" "$folder/part-$part/"; used=$((used + size))
done
du -sh "$folder"/part-*
