// The loops over a block of transposed logits, (rows, columns) = (vocabulary entries, tokens), in plain C types. There
// is one table of functions per instruction set, selected at run time. Tokens are contiguous in memory, so every loop
// runs along tokens and no vector register is ever reduced to a scalar.
#pragma once

#include <cstdint>

#include "fused_head/block.h"

namespace delib_fast {

// Running softmax statistics, one entry per token: the maximum, the first entry that has it, Σ exp(logit - max) and,
// for the general kernels only, Σ logit. `shift`, `partial` and `partial_total` are scratch.
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

// The values that the gradient needs, one entry per token.
template <typename acc_t>
struct Finished {
  const acc_t* max;
  const acc_t* factor;  // weight / sum, the factor of exp(logit - max). (exp(logit - lse) is inexact for large logits.)
  const acc_t* offset;  // subtracted from every entry by the general kernels (label smoothing)
};

// Updates the running statistics with columns [begin, end) of a block.
template <typename scalar_t, typename acc_t>
using StatisticsFn = void (*)(Block<scalar_t>, Running<acc_t>, acc_t softcap, std::int64_t begin, std::int64_t end);

// Replaces columns [begin, end) of a block with the gradient of the logits.
template <typename scalar_t, typename acc_t>
using GradientFn = void (*)(Block<scalar_t>, Finished<acc_t>, acc_t softcap, std::int64_t begin, std::int64_t end);

// The two sweeps over a block. The plain ones support neither softcap nor label smoothing, and are faster.
template <typename scalar_t, typename acc_t>
struct Sweeps {
  StatisticsFn<scalar_t, acc_t> statistics;
  GradientFn<scalar_t, acc_t> gradient;
};

// logits[i] = softcap * tanh(logits[i] / softcap), bitwise identical to what the general sweeps compute.
template <typename acc_t>
using CapFn = void (*)(acc_t* logits, std::int64_t count, acc_t softcap);

struct RowKernels {
  const char* name;
  Sweeps<float, float> plain_f32, general_f32;
  Sweeps<double, double> plain_f64, general_f64;
  Sweeps<bf16_bits, float> plain_bf16, general_bf16;
  CapFn<float> cap_f32;
  CapFn<double> cap_f64;
};

// The table for the widest instruction set that this processor supports.
const RowKernels& row_kernels();

}  // namespace delib_fast
