// Multiplication of an array by a number, per instruction set.
#pragma once

#include "fused_head/block.h"

namespace delib_fast {

// to[i] = from[i] * scale, multiplied in the wider type and rounded once.
template <typename from_t, typename to_t>
using ScaleFn = void (*)(const from_t* from, to_t* to, std::int64_t count, float scale);

struct ScaleKernels {
  ScaleFn<float, float> f32;
  ScaleFn<float, bf16_bits> f32_to_bf16;
  ScaleFn<bf16_bits, bf16_bits> bf16;
};

// The table for the widest instruction set that this processor supports.
const ScaleKernels& scale_kernels();

}  // namespace delib_fast
