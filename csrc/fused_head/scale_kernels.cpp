// Compiles scale_kernels_impl.h for each instruction set. for_each_simd_target.h explains the order of the includes.
#include "fused_head/scale_kernels.h"

#include <math.h>

#include <cstdint>

#define SIMD_LOOPS "fused_head/scale_kernels_impl.h"
#include "for_each_simd_target.h"

namespace delib_fast {

const ScaleKernels& scale_kernels() { return SIMD_SELECT(SCALE_KERNELS); }

}  // namespace delib_fast
