// The driver for any float dtype, with every GEMM in float32 (float64 for float64 inputs).
//
// For each chunk of C supervised rows, there are two loops over blocks of the vocabulary. The first computes a block of
// logits^T = W . X^T and gives it to the objective while the block is in cache. The second replaces the block with its
// gradient dz, and adds dz^T . W to dX and dz . X to the block's part of dW.
//
// Memory traffic per chunk: the weight is read twice (a bfloat16 or float16 block is converted into one small buffer,
// never the whole matrix), the logits are written once and read once, dW is read once and written once. Buffers besides
// the results and those of the objective: one chunk of logits, one converted block of the weight.
#pragma once

#include <ATen/ops/mm.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "fused_head/head.h"

namespace delib_fast {

// The weight in blocks of rows, converted to the dtype of the computation.
class WideWeight {
 public:
  static constexpr std::int64_t BLOCK_ROWS = 2048;  // of the vocabulary

  WideWeight(const at::Tensor& weight, at::ScalarType dtype)
      : weight_(weight), is_wide_(weight.scalar_type() == dtype) {
    if (!is_wide_) buffer_ = at::empty({std::min(BLOCK_ROWS, weight.size(0)), weight.size(1)}, dtype);
  }
  at::Tensor block(std::int64_t begin, std::int64_t rows) {
    at::Tensor part = weight_.narrow(0, begin, rows);
    if (is_wide_) return part;
    at::Tensor wide = buffer_.narrow(0, 0, rows);
    wide.copy_(part);
    return wide;
  }

 private:
  const at::Tensor weight_;
  const bool is_wide_;
  at::Tensor buffer_;
};

template <typename Objective>
class WidenedHead {
 public:
  WidenedHead(const at::Tensor& weight, std::int64_t chunk_tokens, Objective& objective, HeadGradients& gradients)
      : objective_(objective), gradients_(gradients), vocabulary_(weight.size(0)), weight_(weight, DTYPE) {
    const std::int64_t token_bytes = vocabulary_ * (1 + objective.matrices()) * std::int64_t{sizeof(scalar_t)};
    const std::int64_t fits = std::clamp<std::int64_t>(LOGITS_BYTES / token_bytes, 16, MAX_TOKENS);
    step_ = equal_chunk(objective.size(), chunk_tokens > 0 ? chunk_tokens : fits);
    buffer_ = large_empty({vocabulary_ * step_}, DTYPE);
    objective.reserve(vocabulary_, step_, /*by_token=*/false);
  }

  void run() {
    for (std::int64_t begin = 0; begin < objective_.size(); begin += step_) {
      const std::int64_t tokens = std::min(step_, objective_.size() - begin);
      objective_.begin(begin, begin + tokens);
      const std::int64_t leading = leading_dimension(tokens);
      const at::Tensor logits =
          buffer_.narrow(0, 0, vocabulary_ * leading).view({vocabulary_, leading}).narrow(1, 0, tokens);
      forward(logits);
      objective_.finish(block_at(logits, 0, vocabulary_));
      if (gradients_.need_gradient()) backward(logits, begin == 0);
    }
  }

 private:
  using scalar_t = typename Objective::scalar_t;
  static constexpr at::ScalarType DTYPE = dtype_of<scalar_t>;
  static constexpr std::int64_t LOGITS_BYTES = std::int64_t{320} << 20;  // including the objective's matrices
  static constexpr std::int64_t MAX_TOKENS = 2048;                       // larger chunks save no more time

  Block<scalar_t> block_at(const at::Tensor& logits, std::int64_t v, std::int64_t rows) const {
    return {data_of<scalar_t>(logits) + v * logits.stride(0), logits.stride(0), v, rows};
  }

  void forward(const at::Tensor& logits) {
    const at::Tensor hidden_t = objective_.hidden().t();
    for (std::int64_t v = 0; v < vocabulary_; v += WideWeight::BLOCK_ROWS) {
      const std::int64_t rows = std::min(WideWeight::BLOCK_ROWS, vocabulary_ - v);
      at::Tensor out = logits.narrow(0, v, rows);
      const at::Tensor weight = weight_.block(v, rows);
      at::mm_out(out, weight, hidden_t);
      objective_.add_logits(block_at(logits, v, rows), weight);
    }
  }

  void backward(const at::Tensor& logits, bool first) {
    const at::Tensor& hidden = objective_.hidden();
    at::Tensor grad_rows;
    if (gradients_.need_grad_hidden) grad_rows = at::zeros_like(hidden);
    for (std::int64_t v = 0; v < vocabulary_; v += WideWeight::BLOCK_ROWS) {
      const std::int64_t rows = std::min(WideWeight::BLOCK_ROWS, vocabulary_ - v);
      const at::Tensor dz = logits.narrow(0, v, rows);
      objective_.to_gradient(block_at(logits, v, rows));
      if (gradients_.need_grad_hidden) grad_rows.addmm_(dz.t(), weight_.block(v, rows));
      if (gradients_.need_grad_weight) {
        at::Tensor grad_block = gradients_.grad_weight.narrow(0, v, rows);
        if (first) {
          at::mm_out(grad_block, dz, hidden);  // the first product needs no zero fill
        } else {
          grad_block.addmm_(dz, hidden);
        }
      }
    }
    if (gradients_.need_grad_hidden) {
      const auto dtype = gradients_.grad_hidden.scalar_type();
      gradients_.grad_hidden.index_copy_(0, objective_.positions(), grad_rows.to(dtype));
    }
  }

  Objective& objective_;
  HeadGradients& gradients_;
  std::int64_t vocabulary_, step_ = 0;
  WideWeight weight_;
  at::Tensor buffer_;
};

}  // namespace delib_fast
