// The supervised rows of a call of the loss, a chunk of them, and the results. fused_head/head.h explains the layout.
#pragma once

#include <cstdint>
#include <vector>

#include "fused_head/head.h"
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
  double loss_sum = 0;
  RowOptions<double> options{0, 0, 0};
  // Whether the general sweeps are needed. The plain ones support a z-loss, which only changes a token's factor.
  bool general() const { return options.softcap != 0 || options.smoothing != 0; }
};

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

}  // namespace delib_fast
