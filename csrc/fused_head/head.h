// What the fused heads share on the CPU: their gradients, and the drivers that compute them.
//
// A fused head projects hidden states (T, H) to logits with a weight (V, H), and computes a loss of the logits and its
// gradients, without ever storing all logits. T packed tokens, H hidden size, V vocabulary, C tokens of a chunk, K
// columns of dz if it is kept. Logits are stored transposed, (V, C): the gradient of the logits, dz, then has the layout
// that the GEMM of the weight's gradient needs, and the softmax loops run along tokens. Without that gradient the bfloat16
// driver may store them by token, (C, V).
//
// A driver (widened.h, bfloat16.h) has the loops over chunks of supervised rows and over blocks of the vocabulary, and
// the GEMMs. What a head does with the logits is its objective, a class with these members:
//
//   scalar_t                       the type of the logits: float, double or bf16_bits
//   HAS_LOOPS_BY_TOKEN             whether there are loops for logits by token
//   size()                         the number of supervised rows
//   matrices()                     how many matrices a chunk needs besides its logits, of the same shape and type
//   reserve(vocabulary, step, by_token)   allocates them for chunks of at most `step` tokens, and sets the layout
//   begin(first, last)             starts the chunk of the supervised rows [first, last)
//   hidden(), positions()          of the chunk: (C, H), and (C,) int64 rows of the packed hidden states
//   add_logits(block, weight)      takes a block of logits, while it is in cache, and the rows of the weight that gave it
//   finish(logits)                 called after the last block, with all logits of the chunk
//   to_gradient(block)             replaces a block of logits with dz
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cstdint>
#include <optional>
#include <string_view>

#include "fused_head/block.h"
#include "large_buffer.h"

namespace delib_fast {

// The stride between rows of a chunk's transposed logits, in elements: whole cache lines. MKL writes unaligned rows at
// little more than half the speed.
inline std::int64_t leading_dimension(std::int64_t tokens) { return (tokens + 15) / 16 * 16; }

// The stride between rows of logits (C, V): an odd number of cache lines of bfloat16, so that the rows of a block do not
// share a few sets of the cache if V is a power of 2.
inline std::int64_t leading_by_token(std::int64_t vocabulary) { return ((vocabulary + 31) / 32 | 1) * 32; }

// The size of chunks that are nearly equal: a multiple of 16 rows (a cache line of float32), at most max(max_rows, 16).
std::int64_t equal_chunk(std::int64_t rows, std::int64_t max_rows);

// Minimum columns per thread: one cache line of float32, so that no two threads write to the same line.
constexpr std::int64_t MIN_COLUMNS = 16;

inline double value_of(const float* x) { return *x; }
inline double value_of(const double* x) { return *x; }
inline double value_of(const bf16_bits* x) { return c10::BFloat16(*x, c10::BFloat16::from_bits()); }
inline void assign(float* to, float x) { *to = x; }
inline void assign(double* to, double x) { *to = x; }
inline void assign(bf16_bits* to, float x) { *to = c10::BFloat16(x).x; }

template <typename scalar_t>
constexpr at::ScalarType dtype_of = c10::CppTypeToScalarType<scalar_t>::value;
template <>
inline constexpr at::ScalarType dtype_of<bf16_bits> = at::kBFloat16;

template <typename scalar_t>
scalar_t* data_of(const at::Tensor& tensor) {
  return static_cast<scalar_t*>(tensor.data_ptr());
}

struct HeadGradients {
  at::Tensor grad_hidden;  // (T, H) in the dtype of the inputs, zeros on entry; empty if not needed
  at::Tensor grad_weight;  // (V, H) float32 or float64, uninitialised on entry; empty if not needed
  at::Tensor dz, rows;     // the factors of grad_weight, kept instead of it: (V, K) and (K, H), uninitialised on entry
  bool need_grad_hidden = false;
  bool need_grad_weight = false;
  bool keeps_dz() const { return dz.numel() > 0; }
  bool need_gradient() const { return need_grad_hidden || need_grad_weight; }

  HeadGradients(const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& loss_positions,
                bool need_grad_hidden, bool need_grad_weight, bool keep_dz, std::string_view gemm);
  void set_to_zero();  // if no row is supervised
};

// The positions of a call's candidates for supervision: those that loss_positions lists, or all rows.
class Candidates {
 public:
  Candidates(const std::optional<at::Tensor>& loss_positions, std::int64_t tokens);
  std::int64_t size() const { return size_; }
  std::int64_t operator[](std::int64_t i) const;  // raises ValueError if the position is not a row

 private:
  at::Tensor listed_;
  const std::int64_t* positions_ = nullptr;
  std::int64_t tokens_, size_;
};

// Raises ValueError if `target`, the target of the row `position`, is outside the vocabulary.
void check_target(std::int64_t target, std::int64_t position, std::int64_t vocabulary);

}  // namespace delib_fast
