// What is done to a block of transposed logits, (rows, columns) = (vocabulary entries, tokens), in plain C
// types: one table of functions per instruction set, chosen once at run time. Tokens lie side by side in
// memory, so every loop runs along tokens and no vector is ever reduced.
#pragma once

#include <cstdint>

namespace delib_fast {

using bf16_bits = std::uint16_t;

// A block of transposed logits and where its first row lies in the vocabulary.
template <typename scalar_t>
struct Block {
  scalar_t* data;
  std::int64_t leading;    // elements from one row to the next
  std::int64_t first_row;  // vocabulary entry of row 0
  std::int64_t rows;
};

// Running softmax statistics, one entry a token: the maximum, where it first was, and Σ exp(logit - max). `shift`
// and `partial` are scratch.
template <typename acc_t>
struct Running {
  acc_t* max;
  acc_t* sum;
  acc_t* shift;
  acc_t* partial;
  std::int32_t* argmax;
};

// Columns [begin, end) of a block are brought into the running statistics.
template <typename scalar_t, typename acc_t>
using StatisticsFn = void (*)(Block<scalar_t>, Running<acc_t>, std::int64_t begin, std::int64_t end);

// Columns [begin, end) become factor * exp(logit - max), in place, the factor being weight / sum. (Subtracting a
// rounded lse instead would cost the digits that large logits have.)
template <typename scalar_t, typename acc_t>
using GradientFn = void (*)(Block<scalar_t>, const acc_t* max, const acc_t* factor, std::int64_t begin,
                            std::int64_t end);

// to[i] = from[i] * scale, multiplied in the wider type and rounded once.
template <typename from_t, typename to_t>
using ScaleFn = void (*)(const from_t* from, to_t* to, std::int64_t count, float scale);

struct RowKernels {
  const char* name;
  StatisticsFn<float, float> statistics_f32;
  StatisticsFn<double, double> statistics_f64;
  StatisticsFn<bf16_bits, float> statistics_bf16;
  GradientFn<float, float> gradient_f32;
  GradientFn<double, double> gradient_f64;
  GradientFn<bf16_bits, float> gradient_bf16;
  ScaleFn<float, float> scale_f32;
  ScaleFn<float, bf16_bits> scale_f32_to_bf16;
  ScaleFn<bf16_bits, bf16_bits> scale_bf16;
};

extern const RowKernels row_kernels_generic;
#if defined(__x86_64__)
extern const RowKernels row_kernels_avx2;
extern const RowKernels row_kernels_avx512;
#endif

// The widest table that this processor runs.
const RowKernels& row_kernels();

}  // namespace delib_fast
