// What the two CPU paths share: the supervised rows of a call, and its results.
//
// T packed tokens, H hidden size, V vocabulary, C tokens of a chunk. Logits are kept transposed, (V, C): dz is
// then laid out as the weight gradient's GEMM wants it, and softmax runs along tokens.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "large_buffer.h"
#include "linear_cross_entropy/row_kernels.h"
#include "linear_cross_entropy/row_math.h"

namespace delib_fast {

// The supervised rows: where they are, what they are to predict, with what weight.
struct LiveRows {
  std::vector<std::int64_t> positions;
  std::vector<std::int64_t> targets;
  std::vector<double> weights;
  std::int64_t size() const { return static_cast<std::int64_t>(positions.size()); }
};

struct Results {
  at::Tensor nll;          // (T,) float32, or float64 for float64 inputs; zeros on entry
  at::Tensor correct;      // (T,) bool; false on entry
  at::Tensor grad_hidden;  // (T, H) of the inputs' dtype, zeros on entry; empty if not wanted
  at::Tensor grad_weight;  // (V, H) float32 or float64, uninitialised on entry; empty if not wanted
  at::Tensor dz, rows;     // in the place of grad_weight, its factors: (V, K) and (K, H), uninitialised; else empty
  double loss_sum = 0;
  RowOptions<double> options{1, 0, 0, 0};  // the scale is in the hidden states already
  bool want_grad_hidden = false;
  bool want_grad_weight = false;
  bool keeps_dz() const { return dz.numel() > 0; }
  bool want_gradient() const { return want_grad_hidden || want_grad_weight; }
  // Whether the logits are more to the sweeps than a softmax. (A z-loss only changes a token's factor.)
  bool shaped() const { return options.softcap != 0 || options.smoothing != 0; }
  template <typename scalar_t, typename acc_t>
  Sweeps<scalar_t, acc_t> choose(const Sweeps<scalar_t, acc_t>& plain, const Sweeps<scalar_t, acc_t>& shaped_) const {
    return shaped() ? shaped_ : plain;
  }
};

inline double value_of(const float* x) { return *x; }
inline double value_of(const double* x) { return *x; }
inline double value_of(const bf16_bits* x) { return c10::BFloat16(*x, c10::BFloat16::from_bits()); }
inline void assign(float* to, float x) { *to = x; }
inline void assign(double* to, double x) { *to = x; }
inline void assign(bf16_bits* to, float x) { *to = c10::BFloat16(x).x; }

// One chunk of live rows, in the type it is computed in, with its softmax statistics. Rows [begin, end) of
// `rows`, which must outlive it.
template <typename acc_t>
struct Chunk {
  Chunk(const at::Tensor& all_hidden, const LiveRows& rows, std::int64_t begin, std::int64_t end,
        at::ScalarType dtype, const RowOptions<double>& options);

  // Takes a block of logits into the statistics, while it is in cache. (V block, C) as `block` says.
  template <typename scalar_t>
  void add_logits(Block<scalar_t> block, const Sweeps<scalar_t, acc_t>& sweeps) {
    const Running<acc_t> running{max.data(),     sum.data(),           total.data(), shift.data(),
                                 partial.data(), partial_total.data(), argmax.data()};
    at::parallel_for(0, size, COLUMNS, [&](std::int64_t begin, std::int64_t end) {
      sweeps.statistics(block, running, options.softcap, begin, end);
    });
    for (std::int64_t c = 0; c < size; ++c) {
      const std::int64_t row = targets[c] - block.first_row;
      if (row >= 0 && row < block.rows) target_logit[c] = value_of(block.data + row * block.leading + c);
    }
  }

  // After the last block: what the gradient needs and, written to `results`, nll, correct and the loss.
  void finish(std::int64_t vocabulary, Results& results);

  // Turns a block of logits into their gradient, in place; the target's entry is computed in full precision, and
  // only then rounded.
  template <typename scalar_t>
  void to_gradient(Block<scalar_t> block, const Sweeps<scalar_t, acc_t>& sweeps) {
    const Finished<acc_t> finished{max.data(), factor.data(), offset.data()};
    at::parallel_for(0, size, COLUMNS, [&](std::int64_t begin, std::int64_t end) {
      sweeps.gradient(block, finished, options.softcap, begin, end);
    });
    for (std::int64_t c = 0; c < size; ++c) {
      const std::int64_t row = targets[c] - block.first_row;
      if (row >= 0 && row < block.rows) assign(block.data + row * block.leading + c, target_gradient[c]);
    }
  }

  // Fewest columns worth a thread: a cache line of float32, so that threads share none.
  static constexpr std::int64_t COLUMNS = 16;

  std::int64_t size;
  const std::int64_t* live_positions;
  const std::int64_t* targets;
  const double* weights;
  RowOptions<acc_t> options;
  std::vector<acc_t> max, sum, total, shift, partial, partial_total, target_logit, factor, offset, target_gradient;
  std::vector<std::int32_t> argmax;
  at::Tensor positions;  // (C,) int64
  at::Tensor hidden;     // (C, H)
};

// Elements from one row of a chunk's logits to the next: whole cache lines. MKL writes rows that begin anywhere at
// little more than half the speed.
inline std::int64_t leading_dimension(std::int64_t tokens) { return (tokens + 15) / 16 * 16; }

// Chunks of nearly equal size, each at most `most` rows (but not less than 16) and whole cache lines of float32.
std::int64_t equal_chunk(std::int64_t rows, std::int64_t most);

// Any float dtype: blocks of the weight are widened as they are used, and every GEMM is float32 (or float64).
void run_widened(const at::Tensor& hidden, const at::Tensor& weight, const LiveRows& rows,
                 std::int64_t chunk_tokens, Results& results);

// bfloat16 in, bfloat16 GEMMs (AMX, AVX-512), weight gradient accumulated in float32, or left as its factors.
void run_bfloat16(const at::Tensor& hidden, const at::Tensor& weight, const LiveRows& rows,
                  std::int64_t chunk_tokens, Results& results);

// scale * dz (V, K) . rows (K, H) as bfloat16, K even: accumulated and scaled in float32, rounded once.
at::Tensor bfloat16_product(const at::Tensor& dz, const at::Tensor& rows, float scale);

}  // namespace delib_fast
