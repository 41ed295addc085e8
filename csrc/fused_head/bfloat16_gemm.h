// The matrix product that ATen cannot compute: bfloat16 inputs, accumulated into a float32 output. It uses the brgemm of
// oneDNN, tile by tile.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>

#include "fused_head/block.h"

namespace delib_fast {

constexpr std::int64_t TILE_M = 64;       // vocabulary entries in a tile of dW
constexpr std::int64_t TILE_N = 64;       // hidden units in a tile of dW
constexpr std::int64_t TILE_PAIRS = 512;  // pairs of tokens per product, so that both factors stay in cache

// X (C, H), C even, in the layout of the second operand of brgemm: pairs of tokens, (C/2, TILE_N, 2) for each tile of
// TILE_N columns of H.
class PackedHidden {
 public:
  explicit PackedHidden(const at::Tensor& hidden) : width_(hidden.size(1)), pairs_(hidden.size(0) / 2) {
    packed_ = at::empty({tiles() * pairs_ * TILE_N * 2}, hidden.options());
    const auto* from = reinterpret_cast<const bf16_bits*>(hidden.const_data_ptr());
    at::parallel_for(0, tiles() * pairs_, 64, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) pack_pair(from, i / pairs_, i % pairs_);
    });
  }
  std::int64_t tiles() const { return (width_ + TILE_N - 1) / TILE_N; }
  std::int64_t pairs() const { return pairs_; }
  std::int64_t columns(std::int64_t tile) const { return std::min(TILE_N, width_ - tile * TILE_N); }
  const bf16_bits* tile(std::int64_t i) const { return data() + i * pairs_ * TILE_N * 2; }

 private:
  bf16_bits* data() const { return reinterpret_cast<bf16_bits*>(packed_.data_ptr()); }
  void pack_pair(const bf16_bits* from, std::int64_t tile, std::int64_t pair) const {
    bf16_bits* to = data() + (tile * pairs_ + pair) * TILE_N * 2;
    const bf16_bits* even = from + 2 * pair * width_ + tile * TILE_N;
    for (std::int64_t n = 0; n < columns(tile); ++n) {
      to[2 * n] = even[n];
      to[2 * n + 1] = even[width_ + n];
    }
  }
  std::int64_t width_, pairs_;
  at::Tensor packed_;
};

// Copies columns [begin, end) of a (rows, C) block to rows [begin, end) of `to`.
void transpose(Block<bf16_bits> block, std::int64_t begin, std::int64_t end, bf16_bits* to, std::int64_t to_ld);

// Whether dz is copied to a (C, V) layout for dX. With AMX the product of a transposed view runs at half the speed;
// without AMX the speed is the same.
bool copies_dz();

// rows of dW (+)= rows of dz . X, for the vocabulary entries of one block. dW is (V, H) float32, dz is (V, C).
void accumulate_grad_weight(const Block<bf16_bits>& dz, const PackedHidden& hidden, bool add, at::Tensor& grad_weight);

// Returns scale * dz (V, K) . rows (K, H) as bfloat16. K must be even. Sums and scaling are in float32, rounded once.
at::Tensor bfloat16_product(const at::Tensor& dz, const at::Tensor& rows, float scale);

}  // namespace delib_fast
