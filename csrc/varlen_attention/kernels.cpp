// Compiles kernels_impl.h for each instruction set. for_each_simd_target.h explains the order of the includes.
#include <math.h>

#include <cstdint>

#include "varlen_attention/kernels.h"

#define SIMD_LOOPS "varlen_attention/kernels_impl.h"
#include "for_each_simd_target.h"

namespace delib_fast::attention {

const Kernels& kernels() { return SIMD_SELECT(KERNELS); }

}  // namespace delib_fast::attention
