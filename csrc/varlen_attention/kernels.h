// The loops of packed causal attention, as one table of functions per instruction set. This file does not depend on
// torch.
//
// Sizes: L tokens of a sequence, D head dim of q and k, V head dim of v, G query heads that share a kv head.
#pragma once

#include <cstdint>

namespace delib_fast::attention {

using bf16_bits = std::uint16_t;

constexpr std::int64_t QUERIES = 32;  // per block
constexpr std::int64_t KEYS = 128;    // per block; a block of scores, QUERIES x KEYS float32, fits the L1 cache
constexpr std::int64_t D_MULTIPLE = 16;
constexpr std::int64_t MAX_D = 256;  // of D and of V
constexpr std::int64_t BF16_BLOCK = 64;  // queries and keys per block where the processor multiplies bfloat16

// One or several heads of one sequence. Element (token, head, d) is at
// data[token * token_stride + head * head_stride + d].
template <typename scalar_t>
struct Heads {
  scalar_t* data;
  std::int64_t token_stride, head_stride;
};

// What defines the attention of one sequence under one kv head, except for its tensors.
struct Problem {
  std::int64_t length, dim, value_dim, group;
  std::int64_t window;  // tokens that a token attends to, itself included; `length` or more for all
  float scale;
  float softcap;  // a score s becomes softcap * tanh(s / softcap); 0 for no cap
};

template <typename scalar_t>
struct Forward : Problem {
  Heads<const scalar_t> q, k, v;  // q has G heads; k and v have one
  Heads<scalar_t> out;
  Heads<float> lse;    // (L, G), log-sum-exp of the scores and the sink
  const float* sinks;  // (G), a score of each head whose value is zero; null without sinks
};

// The gradients of q, k and v. `out` and `lse` contain the effect of the sinks.
template <typename scalar_t>
struct Backward : Problem {
  Heads<const scalar_t> d_out, q, k, v, out;
  Heads<const float> lse;
  Heads<scalar_t> dq, dk, dv;
};

inline std::int64_t padded(std::int64_t length) { return (length + KEYS - 1) / KEYS * KEYS; }

// Scratch memory of one task, in floats. It suffices for the loops of both dtypes. Those for bfloat16 keep as many
// copies of k and v, of half the size, and need MARGIN for their blocks and for alignment.
constexpr std::int64_t MARGIN = 4 * BF16_BLOCK * BF16_BLOCK + 16 * 15;
inline std::int64_t forward_scratch(std::int64_t length, std::int64_t dim, std::int64_t value_dim) {
  return padded(length) * (dim + value_dim + 16) + BF16_BLOCK * (dim + value_dim + KEYS + 16) + MARGIN;
}
inline std::int64_t backward_scratch(std::int64_t length, std::int64_t dim, std::int64_t value_dim) {
  return padded(length) * (3 * dim + 2 * value_dim + 16) + BF16_BLOCK * 3 * (dim + value_dim + 16) + MARGIN;
}

struct Kernels {
  const char* name;
  void (*forward_f32)(const Forward<float>&, float* scratch);
  void (*forward_bf16)(const Forward<bf16_bits>&, float* scratch);
  void (*backward_f32)(const Backward<float>&, float* scratch);
  void (*backward_bf16)(const Backward<bf16_bits>&, float* scratch);
};

// Loops for processors that multiply bfloat16.
struct Bf16Kernels {
  const char* name;
  void (*forward)(const Forward<bf16_bits>&, float* scratch);
  void (*backward)(const Backward<bf16_bits>&, float* scratch);
};

// The table for the widest instruction set that this processor supports.
const Kernels& kernels();

// The loops for AMX or AVX-512 BF16, or null if the processor has neither.
const Bf16Kernels* bf16_kernels();

}  // namespace delib_fast::attention
