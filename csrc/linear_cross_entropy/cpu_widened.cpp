// The loss for any float dtype, with every GEMM in float32 (float64 for float64 inputs).
//
// For each chunk of C supervised rows, there are two loops over blocks of the vocabulary. The first computes a block of
// logits^T = W . X^T and updates the softmax statistics while the block is in cache. The second replaces the block with
// its gradient dz, and adds dz^T . W to dX and dz . X to the block's part of dW.
//
// Memory traffic per chunk: the weight is read twice (a bfloat16 or float16 block is converted into one small buffer,
// never the whole matrix), the logits are written once and read once, dW is read once and written once. Buffers besides
// the results: one chunk of logits, one converted block of the weight.
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "linear_cross_entropy/cpu.h"

namespace delib_fast {
namespace {

constexpr std::int64_t LOGITS_BYTES = std::int64_t{320} << 20;
constexpr std::int64_t MAX_TOKENS = 2048;   // larger chunks save no more time
constexpr std::int64_t BLOCK_ROWS = 2048;   // of the vocabulary

template <typename acc_t>
struct WidenedTable;
template <>
struct WidenedTable<float> {
  static auto sweeps(const Results& results) {
    return results.choose(row_kernels().plain_f32, row_kernels().general_f32);
  }
};
template <>
struct WidenedTable<double> {
  static auto sweeps(const Results& results) {
    return results.choose(row_kernels().plain_f64, row_kernels().general_f64);
  }
};

// The weight in blocks of rows, converted to the dtype of the computation.
class WideWeight {
 public:
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
  const at::Tensor& weight_;
  const bool is_wide_;
  at::Tensor buffer_;
};

template <typename acc_t>
void forward(Chunk<acc_t>& chunk, WideWeight& weight, const at::Tensor& logits, const Sweeps<acc_t, acc_t>& sweeps) {
  const std::int64_t vocabulary = logits.size(0);
  const at::Tensor hidden_t = chunk.hidden.t();
  for (std::int64_t v = 0; v < vocabulary; v += BLOCK_ROWS) {
    const std::int64_t rows = std::min(BLOCK_ROWS, vocabulary - v);
    at::Tensor out = logits.narrow(0, v, rows);
    at::mm_out(out, weight.block(v, rows), hidden_t);
    chunk.add_logits(Block<acc_t>{out.data_ptr<acc_t>(), logits.stride(0), v, rows}, sweeps);
  }
}

template <typename acc_t>
void backward(Chunk<acc_t>& chunk, WideWeight& weight, const at::Tensor& logits, const Sweeps<acc_t, acc_t>& sweeps,
              bool first, Results& results) {
  const std::int64_t vocabulary = logits.size(0);
  at::Tensor grad_rows;
  if (results.need_grad_hidden) grad_rows = at::zeros_like(chunk.hidden);
  for (std::int64_t v = 0; v < vocabulary; v += BLOCK_ROWS) {
    const std::int64_t rows = std::min(BLOCK_ROWS, vocabulary - v);
    at::Tensor dz = logits.narrow(0, v, rows);
    chunk.to_gradient(Block<acc_t>{dz.data_ptr<acc_t>(), logits.stride(0), v, rows}, sweeps);
    if (results.need_grad_hidden) grad_rows.addmm_(dz.t(), weight.block(v, rows));
    if (results.need_grad_weight) {
      at::Tensor grad_block = results.grad_weight.narrow(0, v, rows);
      if (first) {
        at::mm_out(grad_block, dz, chunk.hidden);  // the first product needs no zero fill
      } else {
        grad_block.addmm_(dz, chunk.hidden);
      }
    }
  }
  if (results.need_grad_hidden) {
    results.grad_hidden.index_copy_(0, chunk.positions, grad_rows.to(results.grad_hidden.scalar_type()));
  }
}

template <typename acc_t>
void run(const at::Tensor& hidden, const at::Tensor& weight, const SupervisedRows& rows, std::int64_t chunk_tokens,
         Results& results) {
  const at::ScalarType dtype = c10::CppTypeToScalarType<acc_t>::value;
  const std::int64_t vocabulary = weight.size(0);
  const std::int64_t fits = LOGITS_BYTES / (vocabulary * static_cast<std::int64_t>(sizeof(acc_t)));
  const std::int64_t max_tokens = chunk_tokens > 0 ? chunk_tokens : std::clamp<std::int64_t>(fits, 16, MAX_TOKENS);
  const std::int64_t step = equal_chunk(rows.size(), max_tokens);
  const at::Tensor buffer = large_empty({vocabulary * step}, dtype);
  WideWeight wide(weight, dtype);
  const Sweeps<acc_t, acc_t> sweeps = WidenedTable<acc_t>::sweeps(results);
  for (std::int64_t begin = 0; begin < rows.size(); begin += step) {
    Chunk<acc_t> chunk(hidden, rows, begin, std::min(begin + step, rows.size()), dtype, results.options);
    const std::int64_t leading = leading_dimension(chunk.size);
    const at::Tensor logits =
        buffer.narrow(0, 0, vocabulary * leading).view({vocabulary, leading}).narrow(1, 0, chunk.size);
    forward(chunk, wide, logits, sweeps);
    chunk.finish(vocabulary, results);
    if (results.need_gradient()) backward(chunk, wide, logits, sweeps, begin == 0, results);
  }
}

}  // namespace

void run_widened(const at::Tensor& hidden, const at::Tensor& weight, const SupervisedRows& rows,
                 std::int64_t chunk_tokens, Results& results) {
  if (hidden.scalar_type() == at::kDouble) {
    run<double>(hidden, weight, rows, chunk_tokens, results);
  } else {
    run<float>(hidden, weight, rows, chunk_tokens, results);
  }
}

}  // namespace delib_fast
