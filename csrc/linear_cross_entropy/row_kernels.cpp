// Compiles row_kernels_impl.h for each instruction set. for_each_simd_target.h explains the order of the includes.
#include <math.h>

#include <cstdint>

#include "linear_cross_entropy/row_kernels.h"

#define SIMD_LOOPS "linear_cross_entropy/row_kernels_impl.h"
#include "for_each_simd_target.h"

namespace delib_fast {

const RowKernels& row_kernels() { return SIMD_SELECT(ROW_KERNELS); }

}  // namespace delib_fast
