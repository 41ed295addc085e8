// The loss for any float dtype, with every GEMM in float32 (float64 for float64 inputs).
//
// Per chunk of C live rows, over blocks of the vocabulary: logits^T block = W block . X^T, taken into the softmax
// statistics while in cache; then, block by block again, dz in place, dX += dz^T . W block and
// dW block += dz . X. Bytes moved per chunk: the weight twice (bfloat16 and float16 blocks are widened into one
// small buffer, never the whole matrix), the logits once out and once back in, dW once in and once out.
// Overwritten in place: the logits by dz. Held besides the results: one chunk of logits, one widened block.
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "linear_cross_entropy/cpu.h"

namespace delib_fast {
namespace {

constexpr std::int64_t LOGITS_BYTES = std::int64_t{320} << 20;
constexpr std::int64_t MOST_TOKENS = 2048;  // past this a larger chunk no longer saves time
constexpr std::int64_t BLOCK_ROWS = 2048;   // of the vocabulary

template <typename acc_t>
struct WidenedTable;
template <>
struct WidenedTable<float> {
  static auto sweeps(const Results& results) {
    return results.choose(row_kernels().plain_f32, row_kernels().shaped_f32);
  }
};
template <>
struct WidenedTable<double> {
  static auto sweeps(const Results& results) {
    return results.choose(row_kernels().plain_f64, row_kernels().shaped_f64);
  }
};

// The weight in blocks of rows, each in the type that is computed in.
class WideWeight {
 public:
  WideWeight(const at::Tensor& weight, at::ScalarType dtype) : weight_(weight), same_(weight.scalar_type() == dtype) {
    if (!same_) buffer_ = at::empty({std::min(BLOCK_ROWS, weight.size(0)), weight.size(1)}, dtype);
  }
  at::Tensor block(std::int64_t begin, std::int64_t rows) {
    at::Tensor part = weight_.narrow(0, begin, rows);
    if (same_) return part;
    at::Tensor wide = buffer_.narrow(0, 0, rows);
    wide.copy_(part);
    return wide;
  }

 private:
  const at::Tensor& weight_;
  const bool same_;
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
  if (results.want_grad_hidden) grad_rows = at::zeros_like(chunk.hidden);
  for (std::int64_t v = 0; v < vocabulary; v += BLOCK_ROWS) {
    const std::int64_t rows = std::min(BLOCK_ROWS, vocabulary - v);
    at::Tensor dz = logits.narrow(0, v, rows);
    chunk.to_gradient(Block<acc_t>{dz.data_ptr<acc_t>(), logits.stride(0), v, rows}, sweeps);
    if (results.want_grad_hidden) grad_rows.addmm_(dz.t(), weight.block(v, rows));
    if (results.want_grad_weight) {
      at::Tensor grad_block = results.grad_weight.narrow(0, v, rows);
      if (first) {
        at::mm_out(grad_block, dz, chunk.hidden);  // no zero fill to write and read back
      } else {
        grad_block.addmm_(dz, chunk.hidden);
      }
    }
  }
  if (results.want_grad_hidden) {
    results.grad_hidden.index_copy_(0, chunk.positions, grad_rows.to(results.grad_hidden.scalar_type()));
  }
}

template <typename acc_t>
void run(const at::Tensor& hidden, const at::Tensor& weight, const LiveRows& rows, std::int64_t chunk_tokens,
         Results& results) {
  const at::ScalarType dtype = c10::CppTypeToScalarType<acc_t>::value;
  const std::int64_t vocabulary = weight.size(0);
  const std::int64_t fits = LOGITS_BYTES / (vocabulary * static_cast<std::int64_t>(sizeof(acc_t)));
  const std::int64_t most = chunk_tokens > 0 ? chunk_tokens : std::clamp<std::int64_t>(fits, 16, MOST_TOKENS);
  const std::int64_t step = equal_chunk(rows.size(), most);
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
    if (results.want_gradient()) backward(chunk, wide, logits, sweeps, begin == 0, results);
  }
}

}  // namespace

void run_widened(const at::Tensor& hidden, const at::Tensor& weight, const LiveRows& rows,
                 std::int64_t chunk_tokens, Results& results) {
  if (hidden.scalar_type() == at::kDouble) {
    run<double>(hidden, weight, rows, chunk_tokens, results);
  } else {
    run<float>(hidden, weight, rows, chunk_tokens, results);
  }
}

}  // namespace delib_fast
