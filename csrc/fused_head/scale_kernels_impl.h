// The loops declared in scale_kernels.h. for_each_simd_target.h includes this file once per instruction set.
#include "fused_head/scale_kernels.h"
#include "fused_head/simd_math.h"

namespace delib_fast::SIMD_TARGET {
namespace {

template <typename from_t, typename to_t>
void scale(const from_t* __restrict from, to_t* __restrict to, std::int64_t count, float factor) {
  for (std::int64_t i = 0; i < count; ++i) store(to + i, load(from + i) * factor);
}

const ScaleKernels SCALE_KERNELS = {&scale<float, float>, &scale<float, bf16_bits>, &scale<bf16_bits, bf16_bits>};

}  // namespace
}  // namespace delib_fast::SIMD_TARGET
