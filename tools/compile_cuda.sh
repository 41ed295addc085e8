#!/usr/bin/env bash
# Compile every .cu file for sm_80 and sm_90a. This needs nvcc, but neither a GPU nor torch.
set -euo pipefail
cd "$(dirname "$0")/.."
nvcc=${NVCC:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
if [ ! -x "$nvcc" ]; then
  echo "nvcc was not found; set NVCC=/path/to/nvcc, or install the CUDA toolkit" >&2
  exit 2
fi
out=$(mktemp -d); trap 'rm -rf "$out"' EXIT
count=0
while IFS= read -r source; do
  for arch in 80 90a; do
    echo "nvcc sm_$arch $source"
    "$nvcc" -O3 -std=c++17 -ftz=true -Icsrc -Xcompiler=-fPIC,-Wall -Werror=all-warnings \
      -gencode="arch=compute_$arch,code=sm_$arch" -c "$source" -o "$out/$(basename "$source").$arch.o"
    count=$((count + 1))
  done
done < <(find csrc -name '*.cu' | sort)
echo "compiled $count object files"
