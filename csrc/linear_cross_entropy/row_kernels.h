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

// Running softmax statistics, one entry a token: the maximum, where it first was, Σ exp(logit - max) and, of the
// shaped kernels, Σ logit. `shift`, `partial` and `partial_total` are scratch.
template <typename acc_t>
struct Running {
  acc_t* max;
  acc_t* sum;
  acc_t* total;
  acc_t* shift;
  acc_t* partial;
  acc_t* partial_total;
  std::int32_t* argmax;
};

// What the gradient needs of each token.
template <typename acc_t>
struct Finished {
  const acc_t* max;
  const acc_t* factor;  // weight / sum, of exp(logit - max). (A rounded lse would cost the digits of large logits.)
  const acc_t* offset;  // subtracted from every entry by the shaped kernels: label smoothing
};

// Columns [begin, end) of a block are brought into the running statistics.
template <typename scalar_t, typename acc_t>
using StatisticsFn = void (*)(Block<scalar_t>, Running<acc_t>, acc_t softcap, std::int64_t begin, std::int64_t end);

// Columns [begin, end) become the gradient of the logits, in place.
template <typename scalar_t, typename acc_t>
using GradientFn = void (*)(Block<scalar_t>, Finished<acc_t>, acc_t softcap, std::int64_t begin, std::int64_t end);

// The two sweeps over a block. The plain ones know of no softcap and no label smoothing, and are faster.
template <typename scalar_t, typename acc_t>
struct Sweeps {
  StatisticsFn<scalar_t, acc_t> statistics;
  GradientFn<scalar_t, acc_t> gradient;
};

// logits[i] = softcap * tanh(logits[i] / softcap), to the bit what the shaped sweeps make of them.
template <typename acc_t>
using CapFn = void (*)(acc_t* logits, std::int64_t count, acc_t softcap);

// to[i] = from[i] * scale, multiplied in the wider type and rounded once.
template <typename from_t, typename to_t>
using ScaleFn = void (*)(const from_t* from, to_t* to, std::int64_t count, float scale);

struct RowKernels {
  const char* name;
  Sweeps<float, float> plain_f32, shaped_f32;
  Sweeps<double, double> plain_f64, shaped_f64;
  Sweeps<bf16_bits, float> plain_bf16, shaped_bf16;
  CapFn<float> cap_f32;
  CapFn<double> cap_f64;
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
