// Declarations that the two CPU paths share: the supervised rows of a call, a chunk of them, and the results.
//
// T packed tokens, H hidden size, V vocabulary, C tokens of a chunk, K columns of dz if it is kept. Logits are stored
// transposed, (V, C): the gradient of the logits, dz, then has the layout that the GEMM of the weight's gradient needs,
// and the softmax loops run along tokens.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "large_buffer.h"
#include "linear_cross_entropy/row_kernels.h"
#include "linear_cross_entropy/row_math.h"

namespace delib_fast {

// The supervised rows: their positions, their targets and their weights.
struct SupervisedRows {
  std::vector<std::int64_t> positions;
  std::vector<std::int64_t> targets;
  std::vector<double> weights;
  std::int64_t size() const { return static_cast<std::int64_t>(positions.size()); }
};

struct Results {
  at::Tensor nll;          // (T,) float32, or float64 for float64 inputs; zeros on entry
  at::Tensor correct;      // (T,) bool; false on entry
  at::Tensor grad_hidden;  // (T, H) in the dtype of the inputs, zeros on entry; empty if not needed
  at::Tensor grad_weight;  // (V, H) float32 or float64, uninitialised on entry; empty if not needed
  at::Tensor dz, rows;     // the factors of grad_weight, kept instead of it: (V, K) and (K, H), uninitialised on entry
  double loss_sum = 0;
  RowOptions<double> options{0, 0, 0};
  bool need_grad_hidden = false;
  bool need_grad_weight = false;
  bool keeps_dz() const { return dz.numel() > 0; }
  bool need_gradient() const { return need_grad_hidden || need_grad_weight; }
  // Whether the general sweeps are needed. The plain ones support a z-loss, which only changes a token's factor.
  bool general() const { return options.softcap != 0 || options.smoothing != 0; }
  template <typename scalar_t, typename acc_t>
  Sweeps<scalar_t, acc_t> choose(const Sweeps<scalar_t, acc_t>& plain, const Sweeps<scalar_t, acc_t>& other) const {
    return general() ? other : plain;
  }
};

inline double value_of(const float* x) { return *x; }
inline double value_of(const double* x) { return *x; }
inline double value_of(const bf16_bits* x) { return c10::BFloat16(*x, c10::BFloat16::from_bits()); }
inline void assign(float* to, float x) { *to = x; }
inline void assign(double* to, double x) { *to = x; }
inline void assign(bf16_bits* to, float x) { *to = c10::BFloat16(x).x; }

// One chunk of supervised rows, in the dtype of the computation, with its softmax statistics. It covers [begin, end) of
// `rows`, which must outlive the chunk.
template <typename acc_t>
struct Chunk {
  Chunk(const at::Tensor& all_hidden, const SupervisedRows& rows, std::int64_t begin, std::int64_t end,
        at::ScalarType dtype, const RowOptions<double>& options);

  // Updates the statistics with a block of logits, while the block is in cache.
  template <typename scalar_t>
  void add_logits(Block<scalar_t> block, const Sweeps<scalar_t, acc_t>& sweeps) {
    const Running<acc_t> running{max.data(),     sum.data(),           total.data(), shift.data(),
                                 partial.data(), partial_total.data(), argmax.data()};
    at::parallel_for(0, size, MIN_COLUMNS, [&](std::int64_t begin, std::int64_t end) {
      sweeps.statistics(block, running, options.softcap, begin, end);
    });
    for (std::int64_t c = 0; c < size; ++c) {
      const std::int64_t row = targets[c] - block.first_row;
      if (row >= 0 && row < block.rows) target_logit[c] = value_of(block.data + row * block.leading + c);
    }
  }

  // Call after the last block. Computes what the gradient needs, and writes nll, correct and the loss to `results`.
  void finish(std::int64_t vocabulary, Results& results);

  // Replaces a block of logits with their gradient. The target's entry is computed in full precision and rounded once.
  template <typename scalar_t>
  void to_gradient(Block<scalar_t> block, const Sweeps<scalar_t, acc_t>& sweeps) {
    const Finished<acc_t> finished{max.data(), factor.data(), offset.data()};
    at::parallel_for(0, size, MIN_COLUMNS, [&](std::int64_t begin, std::int64_t end) {
      sweeps.gradient(block, finished, options.softcap, begin, end);
    });
    for (std::int64_t c = 0; c < size; ++c) {
      const std::int64_t row = targets[c] - block.first_row;
      if (row >= 0 && row < block.rows) assign(block.data + row * block.leading + c, target_gradient[c]);
    }
  }

  // Minimum columns per thread: one cache line of float32, so that no two threads write to the same line.
  static constexpr std::int64_t MIN_COLUMNS = 16;

  std::int64_t size;
  const std::int64_t* row_positions;
  const std::int64_t* targets;
  const double* weights;
  RowOptions<acc_t> options;
  std::vector<acc_t> max, sum, total, shift, partial, partial_total, target_logit, factor, offset, target_gradient;
  std::vector<std::int32_t> argmax;
  at::Tensor positions;  // (C,) int64
  at::Tensor hidden;     // (C, H)
};

// The stride between rows of a chunk's transposed logits, in elements: whole cache lines. MKL writes unaligned rows at
// little more than half the speed.
inline std::int64_t leading_dimension(std::int64_t tokens) { return (tokens + 15) / 16 * 16; }

// The size of chunks that are nearly equal: a multiple of 16 rows (a cache line of float32), at most max(max_rows, 16).
std::int64_t equal_chunk(std::int64_t rows, std::int64_t max_rows);

// For any float dtype: every GEMM is float32 (or float64), and blocks of the weight are converted when they are used.
void run_widened(const at::Tensor& hidden, const at::Tensor& weight, const SupervisedRows& rows,
                 std::int64_t chunk_tokens, Results& results);

// For bfloat16: bfloat16 GEMMs (AMX, AVX-512). The weight's gradient is accumulated in float32, or kept as its factors.
void run_bfloat16(const at::Tensor& hidden, const at::Tensor& weight, const SupervisedRows& rows,
                  std::int64_t chunk_tokens, Results& results);

// Returns scale * dz (V, K) . rows (K, H) as bfloat16. K must be even. Sums and scaling are in float32, rounded once.
at::Tensor bfloat16_product(const at::Tensor& dz, const at::Tensor& rows, float scale);

}  // namespace delib_fast
